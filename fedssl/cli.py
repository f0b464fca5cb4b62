"""The command ``fedssl``: verbs that call the library and turn its errors into sentences and exit codes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedssl.errors import INTERRUPTED_EXIT_CODE, ConfigError, FedsslError
from fedssl.storage import cache_folder

app = typer.Typer(
    name="fedssl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated self-supervised pretraining for medical images.\n\n"
    "Start with `fedssl demo`, then point `fedssl simulate data.root=FOLDER` at your own images.\n\n"
    "Exit codes: 0 done, 1 unforeseen, 2 configuration, 3 data, 4 federation, 5 disk, 130 interrupted.",
)
_out = Console()
_err = Console(stderr=True)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value settings, e.g. federation.rounds=10 (all: configs/config.yaml)", metavar="[KEY=VALUE]..."
    ),
]


class Format(StrEnum):
    """How a verb prints its result."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Print for people, or as JSON for programs.")]


@contextmanager
def _explained(resume: str = "") -> Iterator[None]:
    """Show progress, and end with a sentence and an exit code where something goes wrong."""
    from fedssl.console import shown

    try:
        with shown(_err):
            yield
    except FedsslError as error:
        _err.print(f"fedssl: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        _err.print(
            f"fedssl: interrupted. {resume or 'Nothing was left half-written; run the same command again.'}",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from error


_RESUME = "Finished rounds are kept; the same command with resume=true (and without overwrite=true) goes on from there."


@app.command()
def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic hospitals.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor of the number of synthetic patients.")] = 1.0,
) -> None:
    """Write five synthetic hospitals, pretrain on four, evaluate on all, write runs/demo/report.html.

    Takes about five minutes on two cores and needs no download. Everything it shows is synthetic.
    """
    with _explained(_RESUME):
        from fedssl.data.hospitals import write_hospitals

        root = write_hospitals(cache_folder() / "demo", seed=seed, scale=scale)
        _simulate([f"data.root={root}", "+experiment=demo", *(overrides or [])])


@app.command()
def index(
    root: Annotated[Path, typer.Argument(help="Folder <site>/<patient>/... of images, or a manifest (CSV, Parquet).")],
    overrides: Overrides = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Look at what is below ROOT: patients, images and unreadable files by site. Decodes the images once."""
    with _explained():
        from fedssl.build import open_images, store_folder
        from fedssl.config import load
        from fedssl.data.cache import read_index
        from fedssl.data.index import summarise, unreadable_reasons

        config = load([f"data.root={root}", *(overrides or [])])
        open_images(config, rescan=True)
        data = config["data"]
        table = read_index(store_folder(config, root), edge=data["edge"], patient_from=data["patient_from"])
        sites, reasons = summarise(table), unreadable_reasons(table)
    if output is Format.JSON:
        _print_json({"sites": sites, "unreadable": reasons})
        return
    _print_table(sites)
    for reason, count in reasons.items():
        _out.print(f"{count} x unreadable: {reason}", markup=False)


@app.command()
def simulate(overrides: Overrides = None) -> None:
    """Run a whole federation on this machine: every site, the server, and the comparison if there are labels.

    fedssl simulate data.root=FOLDER

    fedssl simulate data.root=FOLDER federation.rounds=10 encoder=resnet18 name=mine

    fedssl simulate data.root=FOLDER name=mine resume=true

    The run folder is runs/NAME; a non-empty one is never overwritten unless overwrite=true.
    """
    with _explained(_RESUME):
        _simulate(overrides or [])


def _simulate(overrides: list[str]) -> None:
    """Train the arms, evaluate where there are labels, write the report."""
    from fedssl.build import open_images
    from fedssl.config import load
    from fedssl.label_efficiency import evaluate_run, labels_fit
    from simulations.run import simulate as run

    config = load(overrides)
    labelled = labels_fit(config, open_images(config, rescan=True))
    run(overrides)
    folder = Path(config["run_dir"])
    if labelled:
        _print_headline(evaluate_run(folder))
    _write_report(folder)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in one.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV or Parquet with the column file (path below data.root) and the label.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column to predict; default: as in the run.")] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Probe a checkpoint with few and many labels, beside random weights, raw pixels and metadata; renew the report.

    fedssl evaluate runs/demo

    fedssl evaluate runs/mine --labels labels.csv --label diagnosis
    """
    with _explained():
        from fedssl.label_efficiency import evaluate_run, resolve_run

        results = evaluate_run(run, labels, {"label": label} if label else None)
        if output is Format.JSON:
            _print_json(results)
            return
        _print_headline(results)
        _write_report(resolve_run(run)[0].path)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run again from what is in its folder."""
    with _explained():
        _write_report(run)


@app.command()
def export(run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in one.")]) -> None:
    """Write the encoder as exported/encoder.onnx: standardised grey images in, features out."""
    with _explained():
        from fedssl.label_efficiency import resolve_run, trained_method
        from fedssl.release.onnx import export_onnx

        config, method = trained_method(run)
        path = resolve_run(run)[0].path / "exported" / "encoder.onnx"
        export_onnx(path, method.encoder, in_chans=config["encoder"]["in_chans"], edge=config["augment"]["global_edge"])
        _out.print(f"Encoder: {path}", markup=False, highlight=False)


@app.command()
def doctor(output: FormatOption = Format.TEXT) -> None:
    """Check this machine: Python, packages, GPU, codecs, disk. Exit code 2 if fedssl cannot run here."""
    from fedssl.doctor import examine

    checks = examine(cache_folder(), Path(__file__).resolve().parents[1] / "configs")
    if output is Format.JSON:
        _print_json([asdict(check) for check in checks])
    else:
        _print_table([asdict(check) for check in checks])
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(ConfigError.exit_code)


def _write_report(folder: Path) -> None:
    from fedssl.evaluation.report import write_report
    from fedssl.label_efficiency import SHEET, read_results
    from fedssl.run_folder import RunFolder
    from fedssl.storage import read_jsonl

    run = RunFolder(folder)
    path = folder / "report.html"
    write_report(
        path,
        name=folder.resolve().name,
        config=run.config(),
        site_rows=read_jsonl(run.metrics),
        round_rows=read_jsonl(run.round_metrics),
        results=read_results(folder),
        sheet=folder / SHEET,
        environment=json.loads((folder / "environment.json").read_text()),
    )
    _out.print(f"Report: {path}", markup=False, highlight=False)


def _print_headline(results: dict[str, Any]) -> None:
    from fedssl.evaluation.report import headline

    for sentence in headline(results):
        _out.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if results["synthetic"]:
        _out.print("Synthetic images: these figures say nothing about real patients.", markup=False)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    _out.print(table, markup=False)


def _print_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    app()
