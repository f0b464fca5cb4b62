"""AUROC and its uncertainty: patients are resampled, never single images of a patient."""

import numpy as np
from jaxtyping import Bool, Float, Int

PERCENTILES = (2.5, 97.5)


def weighted_auroc(
    scores: Float[np.ndarray, " images"],
    positive: Bool[np.ndarray, " images"],
    weights: Float[np.ndarray, "resamples images"],
) -> Float[np.ndarray, " resamples"]:
    """Area under the ROC curve for many weightings of the same images at once.

    The probability that a positive image scores above a negative one, ties counted half (Hanley & McNeil 1982); NaN
    where a weighting leaves one class without weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - 0.5 * negatives
    pairs = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (positives * below).sum(1) / pairs, np.nan)


def macro_auroc(
    scores: Float[np.ndarray, "images classes"],
    labels: Int[np.ndarray, " images"],
    weights: Float[np.ndarray, "resamples images"],
) -> Float[np.ndarray, " resamples"]:
    """AUROC of two classes, or the mean over more classes (those present) of each against the rest."""
    classes = [1] if scores.shape[1] == 2 else [number for number in range(scores.shape[1]) if (labels == number).any()]
    each = [weighted_auroc(scores[:, number], labels == number, weights) for number in classes]
    return np.mean(each, axis=0)


def patient_weights(patients: np.ndarray, *, resamples: int, seed: int) -> Float[np.ndarray, "resamples images"]:
    """Weights of the images: first row one (the sample itself), then bootstrap resamples of whole patients."""
    names, owner = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return np.concatenate([np.ones((1, len(names))), draws])[:, owner]


def combine_seeds(values: Float[np.ndarray, "seeds resamples"], *, seed: int) -> Float[np.ndarray, " resamples"]:
    """Mean over seeds; in the resamples the seeds are drawn with replacement too, so that their spread counts.

    Args:
        values: AUROC by seed and weighting; column 0 is the sample itself.
        seed: of the draws; equal seeds pair two encoders.
    """
    seeds, resamples = values.shape
    draws = np.random.default_rng(seed).integers(seeds, size=(seeds, resamples))
    draws[:, 0] = np.arange(seeds)
    return np.take_along_axis(values, draws, axis=0).mean(0)


def interval(values: Float[np.ndarray, " resamples"]) -> tuple[float, float, float]:
    """Return the estimate (column 0) and the 95 % percentile interval of the resamples."""
    low, high = np.nanpercentile(values[1:], PERCENTILES)
    return float(values[0]), float(low), float(high)
