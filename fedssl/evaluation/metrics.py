"""Figures of merit of predicted probabilities: of the test sample, and of every bootstrap draw of its patients."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fedssl.evaluation.targets import Targets

BINS = 15
SPECIFICITY = 0.95
_CHUNK = 2**17  # numbers in one array of images x draws: 1 MiB, which a core's cache holds


@dataclass(frozen=True)
class Draws:
    """How often each test patient counts.

    Attributes:
        owner: [images] row of `counts` of each image.
        counts: [patients, draws] whole numbers. Column 0 is the sample itself, every patient once; the others are
            bootstrap draws of whole patients.
    """

    owner: Int[np.ndarray, " images"]
    counts: Float[np.ndarray, "patients draws"]


Metric = Callable[[Float[np.ndarray, "images outputs"], Targets, Draws], Float[np.ndarray, " draws"]]


def draw_patients(patients: np.ndarray, *, number: int, seed: int) -> Draws:
    """Draw as many patients as there are, with replacement; equal patients and seed give equal draws.

    Args:
        patients: [images] name of the patient of each image.
        number: of draws; `counts` has one column more.
        seed: of the draws.
    """
    names, owner = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=number)
    counts = np.concatenate([np.ones((1, len(names))), draws])
    return Draws(owner.ravel(), np.ascontiguousarray(counts.T))


def auroc(scores: Float[np.ndarray, "images outputs"], targets: Targets, draws: Draws) -> Float[np.ndarray, " draws"]:
    """[draws] Area under the ROC curve: how often a positive image scores above a negative one, ties counted half.

    Hanley & McNeil 1982. The mean over the outputs that the images show both ways, each against the rest; NaN in a draw
    without positive or without negative images of one of them, and everywhere if there is none.
    """
    return _mean_over_outputs(_auroc, scores, targets, draws)


def auprc(scores: Float[np.ndarray, "images outputs"], targets: Targets, draws: Draws) -> Float[np.ndarray, " draws"]:
    """[draws] Average precision: the precision at each distinct score, weighted by the step in recall there.

    The area under the precision-recall curve without interpolation (Boyd, Eng & Page 2013), as scikit-learn's
    average_precision_score. The mean over outputs and NaN as in ``auroc``.
    """
    return _mean_over_outputs(_auprc, scores, targets, draws)


def sensitivity_at_95_specificity(
    scores: Float[np.ndarray, "images outputs"], targets: Targets, draws: Draws
) -> Float[np.ndarray, " draws"]:
    """[draws] The largest sensitivity among thresholds whose specificity is at least 0.95, chosen anew in each draw.

    An image is called positive when its score reaches the threshold; zero when only calling none positive is specific
    enough. The mean over outputs and NaN as in ``auroc``.
    """
    return _mean_over_outputs(_sensitivity, scores, targets, draws)


def balanced_accuracy(
    scores: Float[np.ndarray, "images outputs"], targets: Targets, draws: Draws
) -> Float[np.ndarray, " draws"]:
    """[draws] Mean recall of the classes, the class being the one of the largest score (Brodersen et al. 2010).

    Of findings: the mean of sensitivity and specificity at the threshold 0.5 (reaching it is positive), then over
    the findings that the images show both ways. NaN in a draw without images of a class (of more than two: of those in
    the test images), or of a side of a finding, and everywhere if the images show one class alone.
    """
    if not targets.exclusive:
        return _mean_over_outputs(_halfway, scores, targets, draws)
    truth = targets.classes
    right, two = scores.argmax(1) == truth, len(targets.names) == 2 or not targets.shown_both
    classes = range(len(targets.names)) if two else targets.shown_both
    each = [_share(right[truth == number], draws.owner[truth == number], draws.counts) for number in classes]
    return np.mean(each, axis=0)


def calibration_error(
    scores: Float[np.ndarray, "images outputs"], targets: Targets, draws: Draws
) -> Float[np.ndarray, " draws"]:
    """[draws] Expected calibration error with 15 bins of equal width (Guo et al. 2017, equation 3).

    Of more than two classes: the largest probability against whether its class is right. Of two: the probability of the
    second against its share. Of findings: each like two classes, then the mean over those that the images show both
    ways, or over all if there is none. NaN in a draw without images.

    Args:
        scores: probabilities.
        targets: of the same images.
        draws: of their patients.
    """
    if targets.exclusive and len(targets.scored) > 1:
        right = scores.argmax(1) == targets.classes
        return _calibration(_Output(scores.max(1), right, draws.owner, draws.counts))
    return _mean_over_outputs(_calibration, scores, targets, draws)


METRICS: Mapping[str, Metric] = {
    "auroc": auroc,
    "auprc": auprc,
    "balanced_accuracy": balanced_accuracy,
    "sensitivity_at_95_specificity": sensitivity_at_95_specificity,
    "calibration_error": calibration_error,
}


@dataclass(frozen=True)
class _Output:
    """One output, of the images where its truth is known."""

    scores: Float[np.ndarray, " images"]
    positive: Bool[np.ndarray, " images"]
    owner: Int[np.ndarray, " images"]
    counts: Float[np.ndarray, "patients draws"]


def _mean_over_outputs(
    figure: Callable[[_Output], np.ndarray],
    scores: Float[np.ndarray, "images outputs"],
    targets: Targets,
    draws: Draws,
) -> Float[np.ndarray, " draws"]:
    """Average a figure over the outputs that the images show both ways; where there is none, over all."""
    each = []
    for output in targets.shown_both or targets.scored:
        truth = targets.values[:, output]
        known = ~np.isnan(truth)
        chosen = _Output(scores[known, output], truth[known] == 1, draws.owner[known], draws.counts)
        each.append(figure(chosen) if known.any() else np.full(draws.counts.shape[1], np.nan))
    return np.mean(each, axis=0)


def _auroc(it: _Output) -> Float[np.ndarray, " draws"]:
    """Sum over pairs of patients: the pairs of their images that are won, times how often both patients are drawn."""
    low, low_owner = it.scores[~it.positive], it.owner[~it.positive]
    holders = np.unique(it.owner[it.positive])  # patients with positive images
    won = np.empty((len(holders), len(it.counts)))
    for row, patient in enumerate(holders):
        high = np.sort(it.scores[it.positive & (it.owner == patient)])
        lost = 0.5 * (np.searchsorted(high, low, "left") + np.searchsorted(high, low, "right"))
        won[row] = np.bincount(low_owner, len(high) - lost, len(it.counts))
    areas = []
    for part in _chunks(it.counts, rows=len(it.counts)):
        pairs = _weight(it.positive, it.owner, part) * _weight(~it.positive, it.owner, part)
        areas.append(_ratio((part[holders] * (won @ part)).sum(0), pairs))
    return np.concatenate(areas)


def _auprc(it: _Output) -> Float[np.ndarray, " draws"]:
    areas = []
    for hits, alarms in _reached(it):
        steps, precision = np.diff(hits, axis=0, prepend=0), hits + alarms
        np.divide(hits, precision, out=precision, where=precision > 0)  # none reached yet: no step either
        areas.append(_ratio((steps * precision).sum(0), hits[-1] * (alarms[-1] > 0)))
    return np.concatenate(areas)


def _sensitivity(it: _Output) -> Float[np.ndarray, " draws"]:
    best = []
    for hits, alarms in _reached(it):
        allowed = alarms <= (1 - SPECIFICITY + 1e-9) * alarms[-1]
        best.append(_ratio((hits * allowed).max(0), hits[-1] * (alarms[-1] > 0)))
    return np.concatenate(best)


def _reached(
    it: _Output,
) -> Iterator[tuple[Float[np.ndarray, "thresholds part"], Float[np.ndarray, "thresholds part"]]]:
    """Count positive and negative images that reach each distinct score, highest first, some draws at a time."""
    order = np.argsort(-it.scores, kind="stable")
    truth, owner = it.positive[order, None], it.owner[order]
    starts = np.flatnonzero(np.diff(it.scores[order], prepend=np.inf))
    for part in _chunks(it.counts, rows=len(order)):
        drawn = part[owner]
        yield _cumulated(drawn * truth, starts), _cumulated(drawn * ~truth, starts)


def _cumulated(
    weights: Float[np.ndarray, "images part"], starts: Int[np.ndarray, " thresholds"]
) -> Float[np.ndarray, "thresholds part"]:
    """Sum from the first image to the last of each tie."""
    return np.cumsum(weights if len(starts) == len(weights) else np.add.reduceat(weights, starts, axis=0), axis=0)


def _halfway(it: _Output) -> Float[np.ndarray, " draws"]:
    """Mean of sensitivity and specificity at the threshold 0.5."""
    right = (it.scores >= 0.5) == it.positive
    sensitivity, specificity = (_share(right[side], it.owner[side], it.counts) for side in (it.positive, ~it.positive))
    return (sensitivity + specificity) / 2


def _calibration(it: _Output) -> Float[np.ndarray, " draws"]:
    """|B|/n |accuracy - confidence| of a bin is the sum of (truth - probability) over its images, over n."""
    bins = np.digitize(it.scores, np.arange(1, BINS) / BINS, right=True)  # a bin holds its upper edge
    gaps = np.zeros((BINS, len(it.counts)))
    np.add.at(gaps, (bins, it.owner), it.positive - it.scores.astype(np.float64))
    return _ratio(np.abs(gaps @ it.counts).sum(0), _weight(np.ones(len(it.owner)), it.owner, it.counts))


def _share(
    right: Bool[np.ndarray, " images"], owner: Int[np.ndarray, " images"], counts: Float[np.ndarray, "patients draws"]
) -> Float[np.ndarray, " draws"]:
    return _ratio(_weight(right, owner, counts), _weight(np.ones(len(owner)), owner, counts))


def _weight(
    values: np.ndarray, owner: Int[np.ndarray, " images"], counts: Float[np.ndarray, "patients draws"]
) -> Float[np.ndarray, " draws"]:
    """Sum a value over images, each as often as its patient is drawn."""
    return np.bincount(owner, values, len(counts)) @ counts


def _ratio(above: Float[np.ndarray, " draws"], below: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)


def _chunks(counts: Float[np.ndarray, "patients draws"], *, rows: int) -> Iterator[np.ndarray]:
    """Go through the draws so that an array of `rows` x draws stays small."""
    width = max(16, _CHUNK // rows)
    for start in range(0, counts.shape[1], width):
        yield counts[:, start : start + width]
