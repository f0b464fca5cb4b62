"""Label efficiency: every encoder, every share of the labels, every seed, the same patients for all."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedssl import progress
from fedssl.evaluation.calibration import prior_of, with_prior
from fedssl.evaluation.metrics import METRICS, Draws, draw_patients
from fedssl.evaluation.probe import PROBES
from fedssl.evaluation.statistics import combine_seeds, interval, p_value
from fedssl.evaluation.subsets import distinct_fractions, nested_label_subsets
from fedssl.evaluation.targets import Targets
from fedssl.evaluation.task import Task

AUROC, _CALIBRATION = "auroc", "calibration_error"
_BALANCED = frozenset({"linear"})  # probes that weigh classes as if they were equally frequent


@dataclass(frozen=True)
class Score:
    """One figure of one encoder with one share of the labels in one domain, with its 95 % interval.

    ``fraction`` is what was asked for; ``share`` the labelled patients over the training patients, which few patients
    or rare classes make larger. It and the two counts are the largest over the seeds.
    """

    encoder: str
    probe: str
    fraction: float
    share: float
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
        priors: by seed, ``calibration.prior_of`` the labelled images where training weighed classes as if they were
            equally frequent; None: the probabilities are used as they are.
    """

    encoder: str
    probe: str
    fraction: float
    predicted: Sequence[Mapping[str, Float[np.ndarray, "_images outputs"]]]
    priors: Sequence[Float[np.ndarray, " outputs"]] | None = None


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
        fractions: of the training patients that have labels; of those that come out equal the largest alone.
        seeds: of the subsets.
    """
    fractions = distinct_fractions(task, fractions, seeds=seeds)
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
                priors = [prior_of(task.targets.take(rows)) for rows in chosen] if probe in _BALANCED else None
                yield Cell(encoder, probe, fraction, [fitted[rows.tobytes()] for rows in chosen], priors)


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
        cells: what was predicted, one prediction for each seed of the subsets.
        task: labels and splits.
        resamples: draws of the test patients.
        metrics: keys of ``METRICS``.

    Returns:
        The scores, and the AUROC of every draw for paired comparisons.
    """
    draws = {domain: draw_patients(task.patients[m], number=resamples, seed=0) for domain, m in task.tests.items()}
    labelled = _labelled(task, cells)
    scores: list[Score] = []
    values: Resamples = {}
    for done, cell in enumerate(cells):
        for domain, mask in task.tests.items():
            for metric in metrics:
                combined = _combined(cell, domain, task.targets.take(mask), metric, draws[domain])
                if metric == AUROC:
                    values[cell.encoder, cell.probe, cell.fraction, domain] = combined
                counts = labelled[cell.fraction, len(cell.predicted)]
                key = (cell.encoder, cell.probe, cell.fraction, *counts, domain, metric)
                scores.append(Score(*key, *interval(combined, len(draws[domain].counts))))
        progress.publish(progress.Done("scoring", done + 1, len(cells)))
    return scores, values


def _labelled(task: Task, cells: Sequence[Cell]) -> dict[tuple[float, int], tuple[float, int, int]]:
    """By fraction and number of seeds: share of the training patients that is labelled, these patients, their images.

    The largest over the seeds.
    """
    asked = {(cell.fraction, len(cell.predicted)) for cell in cells}
    seeds = max((number for _, number in asked), default=0)
    subsets = nested_label_subsets(task, sorted({fraction for fraction, _ in asked}), seeds=seeds)
    patients = {key: len(np.unique(task.patients[rows])) for key, rows in subsets.items()}
    everyone = len(np.unique(task.patients[task.train]))
    counts = {}
    for fraction, number in asked:
        keys = [(fraction, seed) for seed in range(number)]
        most = max(patients[key] for key in keys)
        counts[fraction, number] = (most / everyone, most, max(len(subsets[key]) for key in keys))
    return counts


def _combined(cell: Cell, domain: str, targets: Targets, metric: str, draws: Draws) -> Float[np.ndarray, " draws"]:
    """Mean over the seeds by draw; predictions that are the same object (equal labels) are scored once."""
    known: dict[int, np.ndarray] = {}
    for seed, predicted in enumerate(cell.predicted):
        if id(predicted) not in known:
            scores = predicted[domain]
            if metric == _CALIBRATION and cell.priors is not None:
                scores = with_prior(scores, cell.priors[seed], exclusive=targets.exclusive)
            known[id(predicted)] = METRICS[metric](scores, targets, draws)
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
