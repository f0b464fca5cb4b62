"""What a study says in words: wins, ties and losses alike, each with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedssl.evidence.joining import worst_site

_PLACES = {
    "in domain": "on held-out patients of the sites that took part",
    "unseen site": "on sites that never took part, with labels of the others",
    "unseen site, own labels": "on sites that never took part, with their own labels",
}


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Say the result of every question; alarms first, then what a board asks for."""
    return [
        *_alarms(results), *_labels_saved(results["reductions"]), *_joining(results["joining"]), *_against(results),
        *_left_out(results["left_out"]), *_sooner(results["convergence"]),
    ]  # fmt: skip


def _alarms(results: Mapping[str, Any]) -> Iterator[str]:
    for arm in results["arms"]:
        if arm.get("collapse"):
            yield (
                f"Alarm: the encoder {arm['encoder']} showed signs of collapse in its last round "
                f"({'. '.join(arm['collapse'])}); its figures say little."
            )
    yield from _shortcuts(results["shortcuts"])


def _labels_saved(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        nothing = row["baseline"] == "no pretraining"
        if row["domain"] != "in domain" and not nothing:
            continue
        other = f"{row['baseline']}{' at its best' if nothing else ''} ({row['baseline_probe']}) with all labels"
        yield (
            f"{row['task']}: to do as well as {other}, {_place(row['domain'])}, the {row['encoder']} encoder "
            f"({row['probe']}): {row['text']}; at measured shares only: {_times(row['grid'])}."
        )


def _against(results: Mapping[str, Any]) -> Iterator[str]:
    """Compare with no pretraining, natural images, pooled and other pretrainings: linear probe, all and few labels."""
    arms = {arm["encoder"]: arm for arm in results["arms"]}
    few = _about_a_tenth(results["differences"])
    for row in results["differences"]:
        own, other = arms[row["encoder"]], arms.get(row["other"])
        shown = row["share"] in {1.0, few.get((row["task"], row["domain"]))}
        if other is not None and row["probe"] == "linear" and shown and _worth(own, other):
            yield (
                f"{row['task']}: {row['encoder']} against {row['other']}, linear probe with "
                f"{100 * row['share']:.3g} % of the labels {_place(row['domain'])}: AUROC {_gap(row)}: "
                f"{row['verdict']}."
            )


def _about_a_tenth(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The labelled share nearest to a tenth, by task and domain."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        place = (row["task"], row["domain"])
        found[place] = min(found.get(place, 1.0), row["share"], key=lambda share: abs(share - 0.1))
    return found


def _worth(own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether a comparison answers a question: same pretraining or none, or two federated pretrainings once."""
    if other["kind"] == "federated":
        return own["variant"] == ""
    return other["kind"] in {"scratch", "natural"} or (other["kind"] == "pooled" and other["variant"] == own["variant"])


def _joining(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        who = f"{row['task']}: {row['site']}{_variant(row)}"
        if "reason" in row:
            yield f"{who}: what it gains by joining cannot be told: {row['reason']}."
        else:
            yield (
                f"{who} by joining, own labels, own {row['test_patients']} test patients: AUROC "
                f"{row['federated']:.3f} in place of {row['alone']:.3f}, {_gap(row)}: {row['verdict']}."
            )
    for row in worst_site(rows):
        yield f"{row['task']}: {row['site']}{_variant(row)} gains least by joining ({_gap(row)})."


def _variant(row: Mapping[str, Any]) -> str:
    return f" ({row['variant']})" if row["variant"] else ""


def _left_out(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "reason" in row:
            yield f"{row['task']}: nothing can be said of {row['site']} left out{_variant(row)}: {row['reason']}."
        else:
            yield (
                f"{row['task']}: for {row['site']}{_variant(row)}, which took no part, encoder and labels of the "
                f"others give AUROC {row['without']:.3f}; no pretraining {row['no_pretraining']:.3f}, {_gap(row)}: "
                f"{row['verdict']}."
            )


def _sooner(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "text" in row:
            yield f"{row['task']}: fine-tuning {row['encoder']} to the best of no pretraining: {row['text']}."


def _shortcuts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["alarm"] and row["encoder"].startswith("federated"):
            yield (
                f"Alarm, {row['task']}: the {row['what']} can be told from the {row['encoder']} embedding (balanced "
                f"accuracy {row['balanced_accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}], chance "
                f"{row['chance']:.2f}), and the label's share differs by {row['label_gap']:.2f} among them: a "
                f"classifier may learn the {row['what']} in place of the disease."
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


def _gap(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
