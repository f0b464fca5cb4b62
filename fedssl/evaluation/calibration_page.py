"""The page that says in plain words how good a site's model is and how far its probabilities can be trusted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from fedssl.data.labels import half_lost

_FEW = 10  # patients with, or without, a finding: fewer make every figure a guess
_EDGE = 0.05  # a cutoff nearer to 0 or 1 gets a remark
_LEFT, _TOP, _SIDE = 46.0, 10.0, 258.0  # of the diagram's square, in its own units
_LARGEST, _SMALLEST = 9.0, 2.5  # radii

_AREAS = {"auroc", "auprc"}
_MEANINGS = {
    "auroc": (
        "AUROC",
        "Take one image with {it} and one without: how often does the one with it get the higher probability? "
        "0.5 is a coin, 1 never wrong.",
    ),
    "sensitivity_at_95_specificity": (
        "Sensitivity at 95 % specificity",
        "Of images with {it}, how many are recognised when 5 of 100 images without it may be called by mistake.",
    ),
    "auprc": (
        "Average precision",
        "Of the images called, how many truly show {it}, averaged over all cutoffs. Guessing would give the share of "
        "images with it.",
    ),
    "balanced_accuracy": (
        "Balanced accuracy",
        "The share of images of a class that get this class, averaged over the classes, when the likeliest is taken.",
    ),
}


def calibration_page(facts: Mapping[str, Any]) -> str:
    """Render the page: one file that needs nothing beside it.

    Args:
        facts: what ``model.json`` holds; no name of a patient or a file is among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("calibration.html.j2").render(
        facts=facts,
        label=_label(facts),
        predicts=_predicts(facts),
        warnings=_warnings(facts),
        figures=[_figure(name, facts) for name in _shown(facts)],
        calibration={state: _percent(figure[0]) for state, figure in facts["figures"]["calibration_error"].items()},
        diagrams=[
            {"title": title, "points": _points(facts["reliability"][state])}
            for state, title in (("before", "Before calibration"), ("after", "After calibration"))
        ],
        ticks=[(percent, _x(percent / 100), _y(percent / 100)) for percent in (0, 25, 50, 75, 100)],
        square={"left": _LEFT, "top": _TOP, "side": _SIDE},
        named={name: _named(name, facts) for name in facts["at_cutoff"]},
        cutoffs=[
            {"name": name, "cutoff": facts["cutoffs"][name], "remark": _remark(facts["cutoffs"][name]), **at}
            for name, at in facts["at_cutoff"].items()
        ],
    )


def _label(facts: Mapping[str, Any]) -> str:
    label = facts["label"]
    return label if isinstance(label, str) else ", ".join(label)


def _binary(facts: Mapping[str, Any]) -> bool:
    return facts["exclusive"] and len(facts["outputs"]) == 2


def _predicts(facts: Mapping[str, Any]) -> str:
    names = facts["outputs"]
    if not facts["exclusive"]:
        return f"For each image, how probable each of {len(names)} findings is: {', '.join(names)}."
    if _binary(facts):
        return f"For each image, how probable it is that “{_label(facts)}” is “{names[1]}” and not “{names[0]}”."
    return f"For each image, how probable each of {len(names)} classes of “{_label(facts)}” is: {', '.join(names)}."


def _named(name: str, facts: Mapping[str, Any]) -> str:
    return f"{_label(facts)}: {name}" if facts["exclusive"] else name


def _it(facts: Mapping[str, Any]) -> str:
    """Name what is looked for, within a sentence."""
    if _binary(facts):
        return f"“{_named(facts['outputs'][1], facts)}”"
    return "a class" if facts["exclusive"] else "a finding"


def _shown(facts: Mapping[str, Any]) -> list[str]:
    """Leave out what does not fit the way the model decides: of two classes or findings it takes its own cutoff."""
    several = facts["exclusive"] and not _binary(facts)
    return [name for name in _MEANINGS if several or name != "balanced_accuracy"]


def _figure(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    title, meaning = _MEANINGS[name]
    several, macro = len(facts["at_cutoff"]), name != "balanced_accuracy"
    what = "classes" if facts["exclusive"] else "findings"
    value, low, high = facts["figures"][name]["before" if macro else "after"]
    written = _decimal if name in _AREAS else _percent
    return {
        "title": title,
        "meaning": meaning.format(it=_it(facts)) + (f" Mean over {several} {what}." if several > 1 and macro else ""),
        "value": f"{written(value)} [{written(low)}, {written(high)}]",
    }


def _percent(value: float | None) -> str:
    return "not defined" if value is None else f"{100 * value:.0f} %"


def _decimal(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _remark(cutoff: float) -> str:
    """Explain a cutoff that looks like a mistake."""
    if cutoff < _EDGE:
        return "Very low: it also calls images that are most probably without it. Expect many false alarms."
    if cutoff > 1 - _EDGE:
        return "Very high: it calls only what the model is almost sure of, perhaps nothing."
    return ""


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know before any figure."""
    warnings = []
    fewest = min(min(count["with"], count["without"]) for count in facts["patients_by_output"].values())
    if fewest < _FEW:
        warnings.append(
            f"Few patients: one class or finding is present, or absent, in only {fewest}. Read the intervals, not the "
            "figures; label more before you rely on any of them."
        )
    if not facts["better_than_guessing"]:
        warnings.append(
            "On these patients the model cannot be told from guessing: the interval of AUROC reaches down to 0.5."
        )
    if facts["origin"]["had_labels"]:
        warnings.append(
            "The encoder was pretrained with labels. If these patients' labels were among them, every figure here is "
            "too good."
        )
    collapse = facts["origin"].get("collapse", {})
    if collapse:
        signs = "; ".join(f"{site}: {', '.join(texts)}" for site, texts in collapse.items())
        warnings.append(
            f"The encoder shows signs of collapse at the end of its pretraining ({signs}). It may tell images apart "
            "no better than one that was never pretrained."
        )
    labels = facts.get("labels", {"lost": 0, "listed": 0})
    if half_lost(labels["lost"], labels["listed"]):
        warnings.append(
            f"{labels['lost']} of {labels['listed']} labels belong to no readable image, so the model learned without "
            "them. Check the table and the images before you rely on any figure."
        )
    return warnings


def _points(bins: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Place each bin at its mean probability and its share that is true; the area stands for the number of images."""
    most = max((bin_["images"] for bin_ in bins), default=1)
    return [
        {
            "x": _x(bin_["score"]),
            "y": _y(bin_["positive"]),
            "r": round(_SMALLEST + (_LARGEST - _SMALLEST) * math.sqrt(bin_["images"] / most), 1),
            "words": f"{bin_['images']} at {100 * bin_['score']:.0f} % on average: {100 * bin_['positive']:.0f} % true",
        }
        for bin_ in bins
    ]


def _x(share: float) -> float:
    return round(_LEFT + _SIDE * share, 1)


def _y(share: float) -> float:
    return round(_TOP + _SIDE * (1 - share), 1)
