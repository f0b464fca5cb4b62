"""One task of a study: every encoder with every share of the labels, in domain, unseen, and with own labels."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fedssl.data.cache import ImageStore
from fedssl.evaluation.features import baselines, embed
from fedssl.evaluation.label_reduction import label_reduction, speed_up
from fedssl.evaluation.metrics import METRICS
from fedssl.evaluation.probe import KNN, LINEAR
from fedssl.evaluation.protocol import Cell, Resamples, Score, compare, probe_encoders, score_cells
from fedssl.evaluation.statistics import delong, difference_interval, interval
from fedssl.evaluation.subsets import held_back
from fedssl.evaluation.task import UNSEEN, Task
from fedssl.evidence.encoders import ALONE, FEDERATED, NATURAL, NOTHING, SCRATCH, Encoder, chosen
from fedssl.evidence.fits import TUNED, Curve, Tuning, finetuned_cells

OWN_LABELS = "unseen site, own labels"
_GUESSING = 0.5


@dataclass(frozen=True)
class Shares:
    """Which shares of the labels, how often, and how intervals are drawn.

    Attributes:
        fractions: of the training patients.
        seeds: choices of the labelled patients.
        resamples: draws of the test patients.
        unseen_test: share of the unseen sites' patients who test where their own labels train.
    """

    fractions: Sequence[float]
    seeds: int
    resamples: int
    unseen_test: float


@dataclass
class Measured:
    """What one task gave.

    Attributes:
        name: of the task.
        task: labels and splits.
        features: [images, width] by encoder and baseline.
        scores: all figures with intervals.
        values: AUROC of every draw.
        cells: predictions.
        curves: validation during fine-tuning with all labels.
        patients: tested in each domain.
        notes: what could not be done, and why.
    """

    name: str
    task: Task
    features: dict[str, np.ndarray]
    scores: list[Score] = field(default_factory=list)
    values: Resamples = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    patients: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure(
    name: str, encoders: Sequence[Encoder], store: ImageStore, task: Task, shares: Shares, tuning: Tuning
) -> Measured:
    """Probe and fine-tune all encoders on one task, and on the unseen sites with their own labels."""
    features = {encoder.name: embed(encoder.module, store, task.rows, edge=encoder.edge) for encoder in encoders}
    features |= baselines(store, task.rows, task.train, task.images.covariates)
    measured = Measured(name, task, features)
    _add(measured, name, encoders, store, task, shares, tuning)
    own = held_back(task, shares.unseen_test)
    if own is None and UNSEEN in task.tests:
        measured.notes.append(
            f"{name}: the unseen sites have too few labelled patients to train with their own labels."
        )
    if own is not None:
        own = replace(own, tests={OWN_LABELS: own.tests[UNSEEN]})
        _add(measured, f"{name}, {OWN_LABELS}", encoders, store, own, shares, tuning)
    return measured


def _add(
    measured: Measured,
    name: str,
    encoders: Sequence[Encoder],
    store: ImageStore,
    task: Task,
    shares: Shares,
    tuning: Tuning,
) -> None:
    """Probe and fine-tune on one split and add what comes out."""
    names = {encoder.name for encoder in encoders}
    probes = {title: (LINEAR, KNN) if title in names else (LINEAR,) for title in measured.features}
    cells = list(probe_encoders(measured.features, task, probes=probes, fractions=shares.fractions, seeds=shares.seeds))
    for cell, curves in finetuned_cells(
        chosen(encoders, *tuning.kinds), store, task, tuning, name=name, fractions=shares.fractions, seeds=shares.seeds
    ):
        cells.append(cell)
        measured.curves.extend(curves if task is measured.task else [])
    scores, values = score_cells(cells, task, resamples=shares.resamples, metrics=tuple(METRICS))
    measured.scores += scores
    measured.values |= values
    measured.cells += cells
    measured.patients |= {domain: len(np.unique(task.patients[mask])) for domain, mask in task.tests.items()}


def score_rows(measured: Measured) -> list[dict[str, Any]]:
    """All figures of a task as rows."""
    return [{"task": measured.name, **asdict(score)} for score in measured.scores]


def difference_rows(measured: Measured, encoders: Sequence[Encoder]) -> list[dict[str, Any]]:
    """The federated encoders against every other, paired; p-values not yet corrected."""
    rows = []
    labelled = {
        (score.domain, score.fraction): {"share": score.share, "labelled_patients": score.labelled_patients}
        for score in measured.scores
    }
    for encoder in chosen(encoders, FEDERATED):
        others = [name for name in measured.features if name != encoder.name]
        gaps = compare(measured.values, encoder.name, others, measured.patients)
        for gap in gaps:
            counts = {"test_patients": measured.patients[gap.domain], **labelled[gap.domain, gap.fraction]}
            rows.append({"task": measured.name, **asdict(gap), **counts})
    return rows


def delong_rows(measured: Measured, encoders: Sequence[Encoder]) -> list[dict[str, Any]]:
    """A check of the bootstrap: linear probes with all labels, compared by DeLong's test over clusters of a patient."""
    task = measured.task
    if len(task.targets.scored) != 1:
        return []
    output = task.targets.scored[0]
    whole = {c.encoder: c.predicted[0] for c in measured.cells if c.probe == LINEAR and c.fraction == 1.0 and
             set(c.predicted[0]) <= set(task.tests)}  # fmt: skip
    rows = []
    for encoder in chosen(encoders, FEDERATED):
        for other in (name for name in whole if name != encoder.name and encoder.name in whole):
            for domain, mask in task.tests.items():
                scores = np.stack([whole[name][domain][:, output] for name in (encoder.name, other)])
                areas, covariance = delong(scores, task.targets.values[mask, output] == 1, task.patients[mask])
                gap, low, high, p = difference_interval(areas, covariance)
                rows.append(
                    {"task": measured.name, "encoder": encoder.name, "other": other, "domain": domain,
                     "difference": gap, "low": low, "high": high, "p": p}
                )  # fmt: skip
    return rows


def reduction_rows(measured: Measured, encoders: Sequence[Encoder]) -> list[dict[str, Any]]:
    """How many times fewer labels a federated encoder needs than a baseline that has them all (REMEDIS).

    The baselines: no pretraining and natural images, each in its better use (linear or fine-tuned), and every site
    alone by a linear probe; one that is not better than guessing is left out. Shares are those that were really
    labelled.
    """
    rows = []
    for encoder in chosen(encoders, FEDERATED):
        for domain, shares in _shares(measured).items():
            for other, used in _baselines(measured, encoders, domain):
                base = measured.values[other, used[0], max(shares), domain]
                if _guesses(measured, other, domain, base):
                    continue
                for probe in (LINEAR,) if used[1] == ALONE else (LINEAR, TUNED):
                    keys = [(encoder.name, probe, fraction, domain) for fraction in shares]
                    if all(key in measured.values for key in keys):
                        curve = np.stack([measured.values[key] for key in keys])
                        found = label_reduction(curve, base, list(shares.values()), measured.patients[domain])
                        rows.append(
                            {"task": measured.name, "encoder": encoder.name, "probe": probe, "baseline": other,
                             "baseline_probe": used[0], "domain": domain, **asdict(found), "text": found.text()}
                        )  # fmt: skip
    return rows


def _guesses(measured: Measured, other: str, domain: str, base: np.ndarray) -> bool:
    """Tell, and note, that a baseline with all labels is not shown to be better than guessing."""
    value, low, high = interval(base, measured.patients[domain])
    if low > _GUESSING:
        return False
    note = (
        f"{measured.name}: {other} with all labels, {domain}, is not shown to be better than guessing (AUROC "
        f"{value:.3f} [{low:.3f}, {high:.3f}]): how many labels are saved against it says nothing and is left out."
    )
    if note not in measured.notes:
        measured.notes.append(note)
    return True


def _shares(measured: Measured) -> dict[str, dict[float, float]]:
    """The share that was really labelled, by domain and nominal fraction, in ascending order."""
    shares: dict[str, dict[float, float]] = {}
    for score in sorted(measured.scores, key=lambda score: score.fraction):
        shares.setdefault(score.domain, {})[score.fraction] = score.share
    return shares


def _baselines(measured: Measured, encoders: Sequence[Encoder], domain: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Give each baseline with how it is used, with all labels, and its kind."""
    for encoder in chosen(encoders, SCRATCH, NATURAL, ALONE):
        uses = (LINEAR,) if encoder.arm.kind == ALONE else (LINEAR, TUNED)
        known = {
            use: float(values[0])
            for (name, use, fraction, place), values in measured.values.items()
            if (name, fraction, place) == (encoder.name, 1.0, domain) and use in uses
        }
        if known:
            yield encoder.name, (max(known, key=lambda use: known[use]), encoder.arm.kind)


def convergence_rows(measured: Measured) -> list[dict[str, Any]]:
    """Validation curves with all labels, and how much sooner an encoder reaches the best of no pretraining."""
    curves = [curve for curve in measured.curves if len(curve.images) > 1]
    if not curves:
        return []
    grid = np.array(max((curve.images for curve in curves), key=lambda images: images[-1]), float)
    by_encoder: dict[str, list[np.ndarray]] = {}
    for curve in curves:  # where training stopped early the last value holds
        by_encoder.setdefault(curve.encoder, []).append(np.interp(grid, curve.images, curve.values))
    stacked = {name: np.stack(own) for name, own in by_encoder.items()}
    base = stacked.get(NOTHING)
    rows = []
    for name, values in stacked.items():
        row: dict[str, Any] = {
            "task": measured.name, "encoder": name, "images": grid.tolist(), "values": values.mean(0).tolist()
        }  # fmt: skip
        if base is not None and name != NOTHING:
            found = speed_up(values, base, grid)
            row |= {"speed_up": asdict(found), "text": found.text()}
        rows.append(row)
    return rows
