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
    """Say the result of every question; the first sentences are those a board asks for."""
    return [
        *_labels_saved(results["reductions"]), *_against(results), *_joining(results["joining"]),
        *_left_out(results["left_out"]), *_sooner(results["convergence"]), *_shortcuts(results["shortcuts"]),
    ]  # fmt: skip


def _labels_saved(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["probe"] != row["baseline_probe"] or (
            row["baseline_probe"] == "linear" and row["domain"] != "in domain"
        ):
            continue
        other = "training without pretraining" if row["baseline"] == "no pretraining" else row["baseline"]
        yield (
            f"{row['task']}: to do as well as {other} with all labels, {_place(row['domain'])}, the {row['encoder']} "
            f"encoder, {row['probe']}: {row['text']}; counting only measured shares from which on it holds: "
            f"{_times(row['grid'])}."
        )


def _against(results: Mapping[str, Any]) -> Iterator[str]:
    """Compare with no pretraining, natural images and pooled: linear probe, all labels and about a tenth of them."""
    shares = sorted({row["fraction"] for row in results["differences"]})
    shown = {1.0, min(shares, key=lambda share: abs(share - 0.1))} if shares else set()
    encoders = {arm["encoder"] for arm in results["arms"] if arm["kind"] in {"scratch", "natural", "pooled"}}
    for row in results["differences"]:
        if row["probe"] == "linear" and row["fraction"] in shown and row["other"] in encoders:
            yield (
                f"{row['task']}: {row['encoder']} against {row['other']}, linear probe with "
                f"{100 * row['fraction']:g} % of the labels {_place(row['domain'])}: AUROC {_gap(row)}: "
                f"{row['verdict']}."
            )


def _joining(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "reason" in row:
            yield f"{row['task']}: what {row['site']} gains by joining cannot be told: {row['reason']}."
        else:
            yield (
                f"{row['task']}: {row['site']} by joining, own labels, own {row['test_patients']} test patients: AUROC "
                f"{row['federated']:.3f} in place of {row['alone']:.3f}, {_gap(row)}: {row['verdict']}."
            )
    for row in worst_site(rows):
        yield f"{row['task']}: {row['site']} gains least by joining ({_gap(row)})."


def _left_out(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "reason" in row:
            yield f"{row['task']}: without {row['site']} nothing can be said of it: {row['reason']}."
        else:
            yield (
                f"{row['task']}: for {row['site']}, which then took no part, encoder and labels of the others give "
                f"AUROC {row['without']:.3f}; without pretraining {row['no_pretraining']:.3f}, {_gap(row)}: "
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
    return missing + texts


def _times(grid: float) -> str:
    return f"{grid:.3g} times" if grid else "none"


def _place(domain: str) -> str:
    return _PLACES.get(domain, domain)


def _gap(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
