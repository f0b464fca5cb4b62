"""The verb that attacks a trained encoder: audit."""

from pathlib import Path
from typing import Annotated

import typer

from fedssl.explained import FormatOption, explained
from fedssl.printing import Format, print_json, print_line, print_table


def audit(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in one; its images lie on this machine.")],
    shadows: Annotated[
        int, typer.Option(help="Shadow encoders to train for the likelihood-ratio attack: even, 4 or more; 0: none.")
    ] = 0,
    canaries: Annotated[int, typer.Option(help="Patients of the shadows whose images are replaced by patterns.")] = 10,
    labels: Annotated[
        Path | None, typer.Option(help="CSV or Parquet with the column file and ATTRIBUTE; default: as in the run.")
    ] = None,
    attribute: Annotated[str | None, typer.Option(help="A column that a probe shall predict, e.g. sex.")] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Measure what an encoder gives away of its patients; write audit.json and MODEL_CARD.md. See docs/audit.md.

    fedssl audit runs/mine

    fedssl audit runs/mine --shadows 16 --labels labels.csv --attribute sex

    With --shadows the run is simulated so many times again, on random halves of its patients, below
    RUN/audit/shadows. Finished shadows are not trained again.
    """
    with explained("Finished shadows are kept; the same command goes on from there."):
        from fedssl.evaluation.leakage.sentences import table
        from fedssl.leakage_audit import audit_run

        trained: list[Path] = []
        if shadows:
            from simulations.shadows import train_shadows

            trained = train_shadows(run, shadows, canaries=canaries)
        results = audit_run(run, trained, labels=labels, attribute=attribute)
        if output is Format.JSON:
            print_json(results)
            return
        print_table(table(results))
        for sentence in [*results["sentences"], *results["limits"]]:
            print_line(sentence)
        if results["synthetic"]:
            print_line("Synthetic images: these figures say nothing about real patients.")
        print_line("Figures: audit.json, MODEL_CARD.md in the run folder.")
