"""The page of a study: one HTML file that needs nothing beside it, for a radiologist and a hospital's board."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fedssl.evaluation.probe import LINEAR
from fedssl.evaluation.protocol import AUROC
from fedssl.evaluation.task import IN_DOMAIN, UNSEEN
from fedssl.evidence import cards, figures
from fedssl.evidence.cards import Rows, drawn, few_and_all, pivot
from fedssl.evidence.figures import Style
from fedssl.evidence.fits import TUNED
from fedssl.evidence.joining import worst_site
from fedssl.evidence.labels_needed import OWN_LABELS
from fedssl.storage import atomic_file

PAGE = "study.html"
_PLACES = {
    IN_DOMAIN: "sites that took part",
    UNSEEN: "unseen sites, labels of the others",
    OWN_LABELS: "unseen sites, own labels",
}
_METRICS = {
    AUROC: "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity_at_95_specificity": "Sensitivity at 95 % specificity",
    "calibration_error": "Calibration error",
}
_SECTIONS = (
    "scores", "differences", "delong", "reductions", "convergence", "joining", "left_out", "shortcuts", "robustness",
)  # fmt: skip
Styles = Mapping[str, Style]


def write_page(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write ``study.html``.

    Args:
        folder: of the study; its name is the title.
        results: what ``study.json`` holds.

    Returns:
        The page.

    Raises:
        StorageError: it cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl.evidence", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": _number, "gap": cards.gap, "signed": cards.signed, "p": _p, "place": _place, "factor": _factor,
        "labelled": cards.labelled, "banded": figures.banded,
    }  # fmt: skip
    styles = figures.styles_of(results["arms"], results["scores"])
    page = environment.get_template("study.html.j2").render(
        title=folder.resolve().name,
        results=results,
        styles=styles,
        answers=[_answer(task, results, styles) for task in results["tasks"]],
        told=cards.told(results),
        collapsed=cards.collapsed(results),
        notes=[note for note in results.get("notes", []) if note not in results["limits"]],
        chapters=[_chapter(task, results, styles) for task in results["tasks"]],
    )
    with atomic_file(folder / PAGE, "the page of the study") as stream:
        stream.write(page.lstrip().encode())
    return folder / PAGE


def _number(value: float | None, digits: int = 3) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return "?"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _place(domain: str) -> str:
    return _PLACES.get(domain, domain)


def _factor(times: float | None, at_least: bool = False) -> str:  # noqa: FBT001, FBT002 - a filter of the page
    if times is None:
        return "not known"
    return "≥ " * at_least + f"{times:.1f}".removesuffix(".0") if times > 0 else "not reached"


def _answer(task: Mapping[str, Any], results: Mapping[str, Any], styles: Styles) -> dict[str, Any]:
    name = task["task"]
    return {
        "task": task,
        "cards": cards.cards(name, results),
        "which": cards.which_pretraining(name, results, styles),
    }


def _chapter(task: Mapping[str, Any], results: Mapping[str, Any], styles: Styles) -> dict[str, Any]:
    """Gather what the page shows of one task."""
    own: dict[str, Rows] = {
        section: [row for row in results[section] if row["task"] == task["task"]] for section in _SECTIONS
    }
    chosen = drawn(_values(own["scores"], "encoder"), results["arms"])  # the same in every figure
    goals = cards.goals(task["task"], results)
    lines = [name for name in _values(own["convergence"], "encoder") if name in chosen]
    curves = [row for row in own["convergence"] if row["encoder"] in lines]
    return {
        "task": task,
        "efficiency": [_efficiency(own["scores"], chosen, goals, styles, probe) for probe in (LINEAR, TUNED)],
        "joining": _gains(own["joining"], "federated less alone", worst=True),
        "left_out": _gains(own["left_out"], "encoder of the others less no pretraining", worst=False),
        "comparisons": _comparisons(own["differences"], styles),
        "delong": own["delong"],
        "convergence": {
            "rows": own["convergence"],
            "figure": figures.convergence(curves, styles) if curves else "",
            "lines": _in_order(lines, styles),
        },
        "robustness": [_robustness(own["robustness"], domain, chosen, styles)
                       for domain in _values(own["robustness"], "domain")],
        "shortcuts": own["shortcuts"],
        "tables": {title: _by_domain(own["scores"], metric, styles) for metric, title in _METRICS.items()},
    }  # fmt: skip


def _values(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _in_order(names: Iterable[str], styles: Styles) -> list[str]:
    return sorted(names, key=list(styles).index)


def _efficiency(
    scores: Rows, chosen: Sequence[str], goals: Mapping[str, float], styles: Styles, probe: str
) -> dict[str, Any]:
    """Draw one panel a domain; all share the AUROC axis."""
    rows = [row for row in scores if (row["metric"], row["probe"]) == (AUROC, probe)]
    shown = [row for row in rows if row["encoder"] in chosen]
    lines = _values(shown, "encoder")
    panels = [
        figures.efficiency(
            [row for row in shown if row["domain"] == domain], styles, title=_place(domain).capitalize(),
            limits=figures.limits_of(shown), goal=goals.get(domain),
        )
        for domain in _values(shown, "domain")
    ]  # fmt: skip
    left = [name for name in _values(rows, "encoder") if name not in lines]
    return {"probe": probe, "panels": panels, "lines": _in_order(lines, styles), "left": left, "goal": bool(goals)}


def _robustness(rows: Rows, domain: str, chosen: Sequence[str], styles: Styles) -> dict[str, Any]:
    """Draw one panel a kind of change in one domain, and tabulate the mean drops."""
    here = [row for row in rows if row["domain"] == domain]
    lines = [name for name in _values(here, "encoder") if name in chosen]
    shown = [row for row in here if "level" in row and row["encoder"] in lines]
    panels = [
        figures.robustness(
            [row for row in shown if row["kind"] == kind], styles, kind=kind, limits=figures.limits_of(shown),
            place=_place(domain).capitalize(),
        )
        for kind in _values(shown, "kind")
    ]  # fmt: skip
    drops = pivot([row for row in here if "drop" in row], ["encoder"], ["kind"], styles)
    return {"domain": domain, "panels": panels, "lines": _in_order(lines, styles), "drops": drops}


def _gains(rows: Rows, axis: str, *, worst: bool) -> dict[str, Any]:
    """Draw what sites gain; sites of which nothing is known are named with the reason."""
    known = [row for row in rows if row.get("difference") is not None]
    least = list(worst_site(known)) if worst and len(known) > 1 else []
    once = {(row["site"], row["variant"]): row for row in known}.values()
    return {
        "rows": known,
        "least": least,
        "reasons": [row for row in rows if row.get("difference") is None],
        "figure": figures.forest(list(once), least, axis=f"AUROC, {axis}") if known else "",
    }


def _comparisons(rows: Rows, styles: Styles) -> list[dict[str, Any]]:
    """One table for each encoder and probe; columns are domains with about a tenth of the labels and with all."""
    tables = []
    for encoder in _values(rows, "encoder"):
        for probe in _values([row for row in rows if row["encoder"] == encoder], "probe"):
            shown = few_and_all([row for row in rows if (row["encoder"], row["probe"]) == (encoder, probe)])
            table = pivot(shown, ["other"], ["domain", "share", "labelled_patients"], styles)
            tables.append(table | {"encoder": encoder, "probe": probe})
    return tables


def _by_domain(scores: Rows, metric: str, styles: Styles) -> dict[str, Any]:
    """One table for each domain of one figure of merit, by encoder, probe and share of the labels."""
    rows = sorted((row for row in scores if row["metric"] == metric), key=lambda row: float(row["share"]))
    line, column = ["encoder", "probe"], ["share", "labelled_patients"]
    return {
        domain: pivot([row for row in rows if row["domain"] == domain], line, column, styles)
        for domain in _values(rows, "domain")
    }
