"""The command ``fedssl``: verbs that call the library and turn its errors into sentences and exit codes."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedssl.cli_audit import audit
from fedssl.cli_consortium import certificates, install, provision, request, revoke, sign
from fedssl.cli_deployment import server, site
from fedssl.cli_egress import egress
from fedssl.cli_evidence import finetune, predict, study
from fedssl.cli_preflight import preflight
from fedssl.cli_privacy import privacy_app
from fedssl.cli_status import status
from fedssl.errors import ConfigError
from fedssl.explained import RESUME, FormatOption, Overrides, explained
from fedssl.printing import Format, print_headline, print_index, print_json, print_line, print_table
from fedssl.storage import cache_folder

app = typer.Typer(
    name="fedssl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated self-supervised pretraining for medical images.\n\n"
    "Start with `fedssl demo`, then point `fedssl simulate data.root=FOLDER` at your own images.\n\n"
    "Exit codes: 0 done, 1 unforeseen, 2 configuration, 3 data, 4 federation, 5 disk, 6 privacy, 7 policy, "
    "130 interrupted.",
)


@app.command()
def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic hospitals.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor of the number of synthetic patients.")] = 1.0,
    whole: Annotated[bool, typer.Option("--study", help="Run the protocol of `fedssl study` on them instead.")] = False,
) -> None:
    """Write five synthetic hospitals, pretrain on four, evaluate on all, write runs/demo/report.html.

    Takes about five minutes on two cores (with --study under twenty) and needs no download. Everything it shows is
    synthetic.
    """
    with explained(RESUME):
        from fedssl.data.hospitals import write_hospitals

        root = write_hospitals(cache_folder() / "demo", seed=seed, scale=scale)
        if not whole:
            _simulate([f"data.root={root}", "+experiment=demo", *(overrides or [])])
    if whole:
        study([f"data.root={root}", "+experiment=demo_study", *(overrides or [])])


@app.command()
def index(
    root: Annotated[
        str, typer.Argument(help="Folder <site>/<patient>/..., manifest (CSV, Parquet), or dicomweb+https://HOST/PATH.")
    ],
    overrides: Overrides = None,
    site: Annotated[str, typer.Option(help="Name of the one site that owns ROOT; its layout is <patient>/...")] = "",
    verify: Annotated[bool, typer.Option(help="Compare all decoded images with their checksums; repair.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Look at what is below ROOT and decode what is new; a second run touches only new and changed files.

    Prints patients, images and unreadable files by site, and writes a contact sheet that stays at the site.

    fedssl index /export/from/pacs --site NORTH data.burned_in=mask

    fedssl index dicomweb+https://pacs.hospital/dicom-web 'data.filters={Modality: CT}'
    """
    with explained():
        from fedssl.build_images import image_store
        from fedssl.config import load
        from fedssl.data.contact_sheet import write_contact_sheet

        store = image_store(load([f"data.root={root}", *(overrides or [])]), site=site, rescan=True)
        images = store.open(rescan=True, verify=verify)
        summary = store.summary()
        sheet = write_contact_sheet(store.snapshot(), images, summary)
    if output is Format.JSON:
        print_json(summary)
        return
    print_index(summary)
    print_line(f"Contact sheet (keep it at the site): {sheet}")
    if summary["unreadable"]:
        print_line(f"Unusable files by name (keep it at the site): {sheet.with_name('unreadable.csv')}")


@app.command()
def simulate(overrides: Overrides = None) -> None:
    """Run a whole federation on this machine: every site, the server, and the comparison if there are labels.

    fedssl simulate data.root=FOLDER

    fedssl simulate data.root=FOLDER federation.rounds=10 encoder=resnet18 name=mine

    fedssl simulate data.root=FOLDER name=mine resume=true

    The run folder is runs/NAME; a non-empty one is never overwritten unless overwrite=true.
    """
    with explained(RESUME):
        _simulate(overrides or [])


def _simulate(overrides: list[str]) -> None:
    """Train the arms, evaluate where there are labels, write the report."""
    from fedssl.build_images import open_images
    from fedssl.config import load
    from fedssl.label_efficiency import evaluate_run, labels_fit
    from simulations.run import simulate as run

    config = load(overrides)
    labelled = labels_fit(config, open_images(config, rescan=True))
    run(overrides)
    folder = Path(config["run_dir"])
    if labelled:
        print_headline(evaluate_run(folder))
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
    with explained():
        from fedssl.label_efficiency import evaluate_run
        from fedssl.weights import resolve_run

        results = evaluate_run(run, labels, {"label": label} if label else None)
        if output is Format.JSON:
            print_json(results)
            return
        print_headline(results)
        _write_report(resolve_run(run)[0].path)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run again from what is in its folder."""
    with explained():
        _write_report(run)


@app.command()
def export(run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in one.")]) -> None:
    """Write the encoder as exported/encoder.onnx (standardised grey images in, features out), and MODEL_CARD.md."""
    with explained():
        from fedssl.build import image_edge
        from fedssl.release.card import write_card
        from fedssl.release.onnx import export_onnx
        from fedssl.weights import identity, resolve_run, trained_checkpoint, trained_method

        config, method = trained_method(run)
        folder, checkpoint = resolve_run(run)
        path = folder.path / "exported" / "encoder.onnx"
        export_onnx(path, method.encoder, in_chans=config["encoder"]["in_chans"], edge=image_edge(config))
        print_line(f"Encoder: {path}")
        print_line(f"Card: {write_card(folder, identity(trained_checkpoint(checkpoint), method))}")


@app.command()
def doctor(output: FormatOption = Format.TEXT) -> None:
    """Check this machine: Python, packages, GPU, codecs, disk. Exit code 2 if fedssl cannot run here."""
    from fedssl.doctor import examine

    checks = examine(cache_folder(), Path(__file__).resolve().parents[1] / "configs")
    if output is Format.JSON:
        print_json([asdict(check) for check in checks])
    else:
        print_table([asdict(check) for check in checks])
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
    print_line(f"Report: {path}")


_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Commands": (study, finetune, predict, audit),
    "A consortium's identities": (provision, request, sign, install, revoke, certificates),
    "A consortium at work": (server, site, status, egress, preflight),
}
for panel, verbs in _VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(privacy_app)

if __name__ == "__main__":
    app()
