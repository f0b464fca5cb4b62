"""Label efficiency: every encoder, every share of the labels, every seed, the same patients for all."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedssl import progress
from fedssl.evaluation.probe import PROBES
from fedssl.evaluation.statistics import combine_seeds, interval, macro_auroc, patient_weights
from fedssl.evaluation.task import Task, nested_label_subsets


@dataclass(frozen=True)
class Score:
    """AUROC of one encoder with one share of the labels in one domain, with its 95 % interval."""

    encoder: str
    probe: str
    fraction: float
    labelled_patients: int
    labelled_images: int
    domain: str
    auroc: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """AUROC of ``encoder`` minus that of ``other`` on the same resamples; a win where ``low > 0``."""

    encoder: str
    other: str
    probe: str
    fraction: float
    domain: str
    difference: float
    low: float
    high: float


Resamples = dict[tuple[str, str, float, str], Float[np.ndarray, " resamples"]]


def score_encoders(
    features: Mapping[str, Float[np.ndarray, "images _width"]],
    task: Task,
    *,
    probes: Mapping[str, Sequence[str]],
    fractions: Sequence[float],
    seeds: int,
    resamples: int,
) -> tuple[list[Score], Resamples]:
    """Fit every probe on every subset of the labels and score it in every domain.

    Args:
        features: [images of the task, width] by encoder.
        task: labels and splits.
        probes: names of the probes of each encoder.
        fractions: of the training patients that have labels.
        seeds: of the subsets.
        resamples: of the test patients.

    Returns:
        The scores, and the AUROC of every resample for paired comparisons.
    """
    subsets = nested_label_subsets(task, fractions, seeds=seeds)
    weights = {
        domain: patient_weights(task.patients[mask], resamples=resamples, seed=0) for domain, mask in task.tests.items()
    }
    total, done = sum(map(len, probes.values())) * len(fractions), 0
    scores: list[Score] = []
    values: Resamples = {}
    for encoder, kinds in probes.items():
        for probe in kinds:
            for fraction in fractions:
                rows = [subsets[fraction, seed] for seed in range(seeds)]
                cells = _score_cell(features[encoder], task, probe, rows, weights)
                for domain, cell in cells.items():
                    values[encoder, probe, fraction, domain] = combine_seeds(cell, seed=zlib.crc32(domain.encode()))
                    estimate = interval(values[encoder, probe, fraction, domain])
                    patients = len(np.unique(task.patients[rows[0]]))
                    scores.append(Score(encoder, probe, fraction, patients, len(rows[0]), domain, *estimate))
                done += 1
                progress.publish(progress.Done("fitting probes", done, total))
    return scores, values


def _score_cell(
    features: Float[np.ndarray, "images width"],
    task: Task,
    probe: str,
    subsets: Sequence[np.ndarray],
    weights: Mapping[str, Float[np.ndarray, "resamples _tests"]],
) -> dict[str, Float[np.ndarray, "seeds resamples"]]:
    """AUROC by domain for each seed's labelled rows; equal subsets (all labels) are fitted once."""
    fitted: dict[bytes, dict[str, np.ndarray]] = {}
    for rows in subsets:
        if rows.tobytes() in fitted:
            continue
        fitted[rows.tobytes()] = {
            domain: macro_auroc(
                PROBES[probe](features[rows], task.labels[rows], features[mask], classes=len(task.classes)),
                task.labels[mask],
                weights[domain],
            )
            for domain, mask in task.tests.items()
        }
    return {domain: np.stack([fitted[rows.tobytes()][domain] for rows in subsets]) for domain in task.tests}


def compare(values: Resamples, encoder: str, others: Sequence[str]) -> list[Difference]:
    """Compare one encoder with others, resample by resample."""
    differences = []
    for (name, probe, fraction, domain), own in values.items():
        for other in others:
            if name == encoder and (other, probe, fraction, domain) in values:
                gap = interval(own - values[other, probe, fraction, domain])
                differences.append(Difference(encoder, other, probe, fraction, domain, *gap))
    return differences
