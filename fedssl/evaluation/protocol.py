"""Label efficiency: every encoder, every share of the labels, every seed, the same patients for all."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedssl import progress
from fedssl.evaluation.metrics import METRICS, Draws, draw_patients
from fedssl.evaluation.probe import PROBES
from fedssl.evaluation.statistics import combine_seeds, interval, p_value
from fedssl.evaluation.subsets import nested_label_subsets
from fedssl.evaluation.task import Task

AUROC = "auroc"
_OTHER_DRAWS = 1000  # of all but AUROC: their intervals need no p-values


@dataclass(frozen=True)
class Score:
    """One figure of one encoder with one share of the labels in one domain, with its 95 % interval."""

    encoder: str
    probe: str
    fraction: float
    labelled_patients: int
    labelled_images: int
    domain: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """AUROC of ``encoder`` minus that of ``other`` on the same draws; ``p`` of no difference, two-sided."""

    encoder: str
    other: str
    probe: str
    fraction: float
    domain: str
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Cell:
    """One encoder, probed in one way with one share of the labels.

    Attributes:
        encoder: its name.
        probe: how it was used.
        fraction: of the training patients that have labels.
        predicted: by seed and domain, [test images, outputs] probabilities.
    """

    encoder: str
    probe: str
    fraction: float
    predicted: Sequence[Mapping[str, Float[np.ndarray, "_images outputs"]]]


Resamples = dict[tuple[str, str, float, str], Float[np.ndarray, " draws"]]


def probe_encoders(
    features: Mapping[str, Float[np.ndarray, "images _width"]],
    task: Task,
    *,
    probes: Mapping[str, Sequence[str]],
    fractions: Sequence[float],
    seeds: int,
) -> Iterator[Cell]:
    """Fit every probe on every subset of the labels and predict the test images; equal subsets are fitted once.

    Args:
        features: [images of the task, width] by encoder.
        task: labels and splits.
        probes: names of the probes of each encoder.
        fractions: of the training patients that have labels.
        seeds: of the subsets.
    """
    subsets = nested_label_subsets(task, fractions, seeds=seeds)
    total, done = sum(map(len, probes.values())) * len(fractions), 0
    for encoder, kinds in probes.items():
        for probe in kinds:
            for fraction in fractions:
                fitted: dict[bytes, dict[str, np.ndarray]] = {}
                chosen = [subsets[fraction, seed] for seed in range(seeds)]
                for rows in chosen:
                    if rows.tobytes() not in fitted:
                        fitted[rows.tobytes()] = _predict(features[encoder], task, probe, rows)
                done += 1
                progress.publish(progress.Done("fitting probes", done, total))
                yield Cell(encoder, probe, fraction, [fitted[rows.tobytes()] for rows in chosen])


def _predict(
    features: Float[np.ndarray, "images width"], task: Task, probe: str, rows: np.ndarray
) -> dict[str, Float[np.ndarray, "_images outputs"]]:
    return {
        domain: PROBES[probe](features[rows], task.targets.take(rows), features[mask])
        for domain, mask in task.tests.items()
    }


def score_cells(
    cells: Sequence[Cell], task: Task, *, resamples: int, metrics: Sequence[str] = (AUROC,)
) -> tuple[list[Score], Resamples]:
    """Score predictions with intervals over test patients and seeds.

    Args:
        cells: what was predicted.
        task: labels and splits.
        resamples: draws of the test patients for AUROC; other figures take up to 1,000 of them.
        metrics: keys of ``METRICS``.

    Returns:
        The scores, and the AUROC of every draw for paired comparisons.
    """
    draws = {domain: draw_patients(task.patients[m], number=resamples, seed=0) for domain, m in task.tests.items()}
    few = {domain: Draws(all_.owner, all_.counts[:, : 1 + _OTHER_DRAWS]) for domain, all_ in draws.items()}
    fractions = sorted({cell.fraction for cell in cells})
    counts = {key: _labelled(task, rows) for key, rows in nested_label_subsets(task, fractions, seeds=1).items()}
    scores: list[Score] = []
    values: Resamples = {}
    for done, cell in enumerate(cells):
        for domain, mask in task.tests.items():
            for metric in metrics:
                used = draws if metric == AUROC else few
                combined = _combined(cell, domain, task, mask, metric, used[domain])
                if metric == AUROC:
                    values[cell.encoder, cell.probe, cell.fraction, domain] = combined
                key = (cell.encoder, cell.probe, cell.fraction, *counts[cell.fraction, 0], domain, metric)
                scores.append(Score(*key, *interval(combined, len(draws[domain].counts))))
        progress.publish(progress.Done("scoring", done + 1, len(cells)))
    return scores, values


def _labelled(task: Task, rows: np.ndarray) -> tuple[int, int]:
    return len(np.unique(task.patients[rows])), len(rows)


def _combined(
    cell: Cell, domain: str, task: Task, mask: np.ndarray, metric: str, draws: Draws
) -> Float[np.ndarray, " draws"]:
    """Mean over the seeds by draw; predictions that are the same object (all labels) are scored once."""
    known: dict[int, np.ndarray] = {}
    for predicted in cell.predicted:
        if id(predicted) not in known:
            known[id(predicted)] = METRICS[metric](predicted[domain], task.targets.take(mask), draws)
    return combine_seeds(np.stack([known[id(p)] for p in cell.predicted]), seed=zlib.crc32(domain.encode()))


def compare(values: Resamples, encoder: str, others: Sequence[str], patients: Mapping[str, int]) -> list[Difference]:
    """Compare one encoder with others, draw by draw.

    Args:
        values: AUROC by draw.
        encoder: to compare.
        others: with these.
        patients: tested in each domain.
    """
    differences = []
    for (name, probe, fraction, domain), own in values.items():
        for other in others:
            if name == encoder and (other, probe, fraction, domain) in values:
                gap = own - values[other, probe, fraction, domain]
                differences.append(
                    Difference(encoder, other, probe, fraction, domain, *interval(gap, patients[domain]), p_value(gap))
                )
    return differences
