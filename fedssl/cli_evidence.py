"""Verbs that turn an encoder into evidence and into a site's own model: study, finetune, predict."""

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fedssl.errors import ConfigError
from fedssl.explained import FormatOption, Overrides, explained
from fedssl.printing import Format, print_json, print_line, print_table

_AGAIN = "What is trained and fitted is kept; the same command goes on from there."
_ROOT_HELP = "Folder <site>/<patient>/... (with --site: <patient>/...), manifest, or dicomweb+https://HOST/PATH."
Settings = Annotated[list[str] | None, typer.Argument(help="Settings; see above.", metavar="[KEY=VALUE]...")]
Labels = Annotated[list[str] | None, typer.Option(help="Column to predict; several times: findings, 1, 0 or empty.")]


def study(overrides: Overrides = None, output: FormatOption = Format.TEXT) -> None:
    """Freeze a protocol, pretrain every arm that is not trained yet, evaluate all, write study.html.

    fedssl study data.root=FOLDER name=mine evaluation.labels=labels.csv evaluation.label=diagnosis

    fedssl study data.root=FOLDER name=mine 'study.variants={simclr: ["method=simclr"]}' study.leave_one_out=true

    The same command again goes on after an interruption; other settings need another name.
    """
    with explained(_AGAIN):
        from fedssl.evidence.report import write_page
        from fedssl.evidence.sentences import spoken
        from simulations.study import study as run

        folder, results = run(overrides or [])
        page = write_page(folder, results)
    if output is Format.JSON:
        print_json(results)
        return
    for sentence in [*map(spoken, results["sentences"]), *results["limits"]]:
        print_line(sentence)
    print_line(f"Study: {page}")


def finetune(
    encoder: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in one.")],
    labels: Annotated[Path, typer.Option(help="CSV or Parquet: file (path below the images' root), and the label.")],
    model: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Settings = None,
    label: Labels = None,
    images: Annotated[str, typer.Option(help=_ROOT_HELP + " Default: the run's data.root.")] = "",
    site: Annotated[str, typer.Option(help="Name of the one site that owns the images.")] = "",
    part: Annotated[str, typer.Option(help="What is trained: head, last, all.")] = "all",
    studies: Annotated[int, typer.Option("--next", help="Studies to propose for labelling next.")] = 20,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the folder.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Make a site's own model from an encoder and a few labels, with a calibration report and a list to label next.

    fedssl finetune runs/mine --labels labels.csv --label nodule --images /export/pacs --site NORTH --model model

    KEY=VALUE: finetune.KEY with KEY lr, head_lr, weight_decay, epochs, least_steps, most_steps, batch_size, checks,
    patience, validation, precision or resamples; data.KEY, e.g. data.burned_in=mask (configs/data/folder.yaml);
    training.threads (default: the run's).
    """
    with explained():
        from fedssl.evaluation.recipe import Recipe
        from fedssl.site_model import fit_site_model
        from fedssl.weights import resolve_run

        names = [field.name for field in fields(Recipe) if field.name != "part"]
        given = _given(overrides, (*names, "resamples"))
        asked = label or resolve_run(encoder)[0].config()["evaluation"]["label"]
        facts = fit_site_model(
            encoder, labels, label=asked[0] if isinstance(asked, list) and len(asked) == 1 else asked,
            images=images or None, site=site, output=model, data=given["data"], part=part,
            number_next=studies, overwrite=overwrite, **given["training"], **given["finetune"],
        )  # fmt: skip
    if output is Format.JSON:
        print_json(facts)
        return
    print_line("On patients that the model had not seen, before and after calibration:")
    print_table(_figures(facts))
    print_line("Calibration error has no interval: drawing the patients anew makes it larger than it is.")
    print_line(f"Model: {model}. Calibration report: {model / 'calibration.html'}")
    if facts["next_studies"]:
        print_line(f"To label next (keep it at the site): {model / 'next-studies.csv'}")
    elif studies:
        print_line("Every study has a label already, so next-studies.csv proposes none.")


def _given(overrides: list[str] | None, recipe: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Sort settings such as data.burned_in=mask by their section; refuse what would change nothing."""
    from fedssl.evaluation.judgement import nearest

    known = ["training.threads", *(f"finetune.{name}" for name in recipe)]
    given: dict[str, dict[str, Any]] = {"data": {}, "training": {}, "finetune": {}}
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"'{text}' is not KEY=VALUE.")
        if key == "data.root":
            raise ConfigError("data.root is not given as a setting here. Name the images' root itself; see --help.")
        if key not in known and not key.startswith("data."):
            near = nearest([key], known)
            raise ConfigError(f"'{key}' is no setting here{near}. There are data.KEY, {', '.join(known)}.")
        section, name = key.split(".", 1)
        given[section][name] = _value(key, value)
    return given


def _value(key: str, text: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of {key} cannot be read. Put it in quotes.") from error
    if isinstance(value, str) and key.startswith("finetune."):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 5e-4 for a word
    return value


def _figures(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Figures on patients that the model had not seen, with 95 % intervals; see ``finetune`` for the one without."""
    return [
        {"figure": name.replace("_", " ")}
        | {state: _estimate(*found[state], whole=name != "calibration_error") for state in ("before", "after")}
        for name, found in facts["figures"].items()
    ]


def _estimate(value: float | None, low: float | None, high: float | None, *, whole: bool) -> str:
    if value is not None and not whole:
        return f"{value:.3f}"
    if value is None or low is None or high is None:
        return "not known"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def predict(
    model: Annotated[Path, typer.Argument(help="Folder that `fedssl finetune` wrote.")],
    images: Annotated[str, typer.Argument(help=_ROOT_HELP)],
    table: Annotated[
        Path,
        typer.Option("--output", help="CSV to write; it names files (paths below IMAGES): keep it at the site."),
    ],
    overrides: Settings = None,
    site: Annotated[str, typer.Option(help="Name of the one site that owns the images.")] = "",
    overwrite: Annotated[bool, typer.Option(help="Replace predictions in the CSV.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Apply a site's model to images: a calibrated probability for each. For research only.

    fedssl predict model /export/pacs --site NORTH --output predictions.csv

    IMAGES: folder of sites or patients (with --site: of patients), manifest, or dicomweb+https://HOST/PATH. The CSV
    names files by their paths below IMAGES.

    KEY=VALUE: data.KEY, e.g. data.burned_in=mask (configs/data/folder.yaml); training.threads (default: those that the
    model was made with).
    """
    with explained():
        from fedssl.site_model import predict_images

        given = _given(overrides, ())
        facts = predict_images(
            model, images, site=site, output=table, data=given["data"], overwrite=overwrite, **given["training"]
        )
    if output is Format.JSON:
        print_json(facts)
        return
    print_table([{name: facts[name] for name in ("images", "files", "unreadable")}])
    for column, counts in facts["decisions"].items():
        print_line(f"{column}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    print_line(f"Predictions (keep them at the site): {table}")
