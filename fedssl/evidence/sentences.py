"""What a study says in words: wins, ties and losses alike, each with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedssl.evidence.cards import few_and_all, gap
from fedssl.evidence.encoders import FEDERATED, NATURAL, NOTHING, POOLED, SCRATCH
from fedssl.evidence.joining import worst_site

_PLACES = {
    "in domain": "on held-out patients of the sites that took part",
    "unseen site": "on sites that never took part, with labels of the others",
    "unseen site, own labels": "on sites that never took part, with their own labels",
}
Row = Mapping[str, Any]
Said = Iterator[dict[str, Any]]


def sentences(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say the result of every question; alarms first, then what a board asks for.

    Returns:
        ``group`` (collapse, alarm, labels, joining, against, left_out, speed), ``task`` (empty: of all), ``text``, and
        whether it stands ``aside`` because it is of another pretraining or of many like it.
    """
    return [
        *_collapse(results["arms"]), *_shortcuts(results["shortcuts"]), *_labels_saved(results),
        *_joining(results["joining"]), *_against(results), *_left_out(results["left_out"]), *_sooner(results),
    ]  # fmt: skip


def spoken(row: Row) -> str:
    """Word a sentence by itself, with its task."""
    alarm = "Alarm: " if row["group"] in {"collapse", "alarm"} else ""
    return f"{alarm}{row['task']}: {row['text']}" if row["task"] else f"{alarm}{row['text']}"


def _said(group: str, row: Row, text: str, *, aside: bool = False) -> dict[str, Any]:
    return {"group": group, "task": row.get("task", ""), "text": text, "aside": aside}


def _collapse(arms: Sequence[Row]) -> Said:
    for arm in arms:
        if arm.get("collapse"):
            yield _said(
                "collapse",
                {},
                f"the encoder {arm['encoder']} showed signs of collapse in its last round "
                f"({'. '.join(arm['collapse'])}); its figures say little.",
            )


def _labels_saved(results: Mapping[str, Any]) -> Said:
    variants = {arm["encoder"]: arm["variant"] for arm in results["arms"]}
    for row in results["reductions"]:
        nothing = row["baseline"] == NOTHING
        if row["domain"] != "in domain" and not nothing:
            continue
        other = f"{row['baseline']}{' at its best' if nothing else ''} ({row['baseline_probe']}) with all labels"
        yield _said(
            "labels",
            row,
            f"to do as well as {other}, {_place(row['domain'])}, the {row['encoder']} encoder "
            f"({row['probe']}): {row['text']}; at measured shares only: {_times(row['grid'])}.",
            aside=not nothing or bool(variants[row["encoder"]]),
        )


def _against(results: Mapping[str, Any]) -> Said:
    """Compare with no pretraining, natural images, pooled and other pretrainings: linear probe, all and few labels."""
    arms = {arm["encoder"]: arm for arm in results["arms"]}
    for task in dict.fromkeys(row["task"] for row in results["differences"]):
        own = [row for row in results["differences"] if row["task"] == task and row["probe"] == "linear"]
        worth = [row for row in own if row["other"] in arms and _worth(arms[row["encoder"]], arms[row["other"]])]
        for row in few_and_all(worth):
            yield _said(
                "against",
                row,
                f"{row['encoder']} against {row['other']}, linear probe with {100 * row['share']:.3g} % of the labels "
                f"{_place(row['domain'])}: AUROC {gap(row)}: {row['verdict']}.",
                aside=True,
            )


def _worth(own: Row, other: Row) -> bool:
    """Tell whether a comparison answers a question: same pretraining or none, or two federated pretrainings once."""
    if other["kind"] == FEDERATED:
        return own["variant"] == ""
    return other["kind"] in {SCRATCH, NATURAL} or (other["kind"] == POOLED and other["variant"] == own["variant"])


def _joining(rows: Sequence[Row]) -> Said:
    for row in rows:
        who = f"{row['site']}{_variant(row)}"
        if "reason" in row:
            text = f"what {who} gains by joining cannot be told: {row['reason']}."
        else:
            text = (
                f"{who} by joining, own labels, own {row['test_patients']} test patients: AUROC "
                f"{row['federated']:.3f} in place of {row['alone']:.3f}, {gap(row)}: {row['verdict']}."
            )
        yield _said("joining", row, text, aside=bool(row["variant"]))
    for row in worst_site(rows):
        text = f"{row['site']}{_variant(row)} gains least by joining ({gap(row)})."
        yield _said("joining", row, text, aside=bool(row["variant"]))


def _variant(row: Row) -> str:
    return f" ({row['variant']})" if row["variant"] else ""


def _left_out(rows: Sequence[Row]) -> Said:
    for row in rows:
        if "reason" in row:
            text = f"nothing can be said of {row['site']} left out{_variant(row)}: {row['reason']}."
        else:
            text = (
                f"for {row['site']}{_variant(row)}, which took no part, encoder and labels of the others give AUROC "
                f"{row['without']:.3f}; no pretraining {row['no_pretraining']:.3f}, {gap(row)}: {row['verdict']}."
            )
        yield _said("left_out", row, text, aside=bool(row["variant"]))


def _sooner(results: Mapping[str, Any]) -> Said:
    variants = {arm["encoder"]: arm["variant"] for arm in results["arms"]}
    for row in results["convergence"]:
        if "text" in row:
            text = f"fine-tuning {row['encoder']} to the best of no pretraining: {row['text']}."
            yield _said("speed", row, text, aside=bool(variants[row["encoder"]]))


def _shortcuts(rows: Sequence[Row]) -> Said:
    for row in rows:
        if row["alarm"] and row["encoder"].startswith(FEDERATED):
            yield _said(
                "alarm",
                row,
                f"the {row['what']} can be told from the {row['encoder']} embedding (balanced accuracy "
                f"{row['balanced_accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}], chance {row['chance']:.2f}), "
                f"and the label's share differs by {row['label_gap']:.2f} among them: a classifier may learn the "
                f"{row['what']} in place of the disease.",
            )


def limits(results: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know before using a figure."""
    missing = [f"{arm['encoder']} is missing: {arm['missing']}." for arm in results["arms"] if arm["missing"]]
    texts = [
        f"Intervals come from {results['resamples']:,} bootstrap draws of whole test patients and of the "
        f"{results['seeds']} choices of labelled patients. Every encoder was pretrained once: how much another seed of "
        "the pretraining would change is not in the intervals.",
        "Better or worse is said only where the 95 % interval excludes zero and p < .05 after Holm's correction across "
        "tasks; everything else is called a tie. Encoders, domains and shares are not corrected for.",
        "Images of one patient, and patients that share images, are never on both sides of a split.",
    ]
    if results["on"] == "validation":
        texts.insert(0, "These figures are of validation patients: for choosing settings, not for claims.")
    if results["synthetic"]:
        texts.insert(0, "The images are synthetic: these figures say nothing about real patients.")
    small = [
        f"{task['task']}, {domain}: {count['patients']} test patients"
        for task in results["tasks"]
        for domain, count in task["tests"].items()
        if count["patients"] < 50
    ]
    if small:
        texts.append(f"Few test patients make wide intervals ({'; '.join(small)}).")
    return missing + list(results["notes"]) + texts


def _times(grid: float) -> str:
    return "not reached" if not grid else (f"{grid:.3g} times fewer" if grid > 1 else "as many")


def _place(domain: str) -> str:
    return _PLACES.get(domain, domain)
