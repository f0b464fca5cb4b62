"""Uncertainty of figures of merit, and tests of their differences: the unit is the patient, never a single image."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import ndtr, ndtri, stdtrit

TAIL = 0.025  # of a 95 % interval, on each side


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


def interval(values: Float[np.ndarray, " resamples"], patients: int | None = None) -> tuple[float, float, float]:
    """Return the estimate (column 0) and the 95 % percentile interval of the resamples; NaN ones are left out.

    Args:
        values: by draw.
        patients: how many were drawn from, see ``tail_of``.
    """
    known = values[1:][~np.isnan(values[1:])]
    if not len(known):
        return float(values[0]), float("nan"), float("nan")
    tail = tail_of(patients)
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(values[0]), float(low), float(high)


def tail_of(patients: int | None) -> float:
    """Share of the draws beyond each end of a 95 % percentile interval.

    Args:
        patients: how many were drawn from: with few, percentiles are too narrow, so they are widened as Student's t is
            against the normal (Hesterberg 2015, section 4.2, "expanded percentile interval"). None: not widened.
    """
    if patients is None:
        return TAIL
    spread = np.sqrt(patients / (patients - 1)) * stdtrit(patients - 1, 1 - TAIL) if patients > 1 else np.inf
    return float(ndtr(-spread))


def p_value(differences: Float[np.ndarray, " draws"]) -> float:
    """Two-sided bootstrap p-value of no difference: twice the smaller share of draws on one side of zero.

    A draw at zero counts on both sides, and one is added to counts and draws so that p is never 0 (Davison & Hinkley
    1997, section 4.2). Draws that are NaN are left out; at most 1.

    Args:
        differences: column 0 is the estimate, the others are bootstrap draws.
    """
    drawn = differences[1:][~np.isnan(differences[1:])]
    smaller = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return min(1.0, float(2 * (smaller + 1) / (len(drawn) + 1)))


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted so that the chance of any false claim among them stays at the level (Holm 1979).

    The smallest is multiplied by their number, the next by one less and so on; none falls below the one before it.

    Returns:
        In the order given; at most 1.
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p, dtype=np.float64)[order] * factors))
    return adjusted.tolist()


def delong(
    scores: Float[np.ndarray, "tests images"],
    positive: Bool[np.ndarray, " images"],
    patients: np.ndarray | None = None,
) -> tuple[Float[np.ndarray, " tests"], Float[np.ndarray, "tests tests"]]:
    """Areas under the ROC curves of several tests on the same images, and the covariance of these areas.

    One image a patient: DeLong, DeLong & Clarke-Pearson 1988. Several: Obuchowski 1997, where components are
    summed by patient and patients with both kinds of image add a cross term.

    Args:
        scores: of each test; higher means positive.
        positive: truth of each image.
        patients: [images] name of each image's patient; without it each image is its own patient.

    Returns:
        areas, and their covariance: NaN with fewer than two patients with positive, or with negative, images.
    """
    owner = np.arange(len(positive)) if patients is None else np.unique(patients, return_inverse=True)[1].ravel()
    higher, lower = scores[:, positive].astype(np.float64), scores[:, ~positive].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        over = np.stack([_placements(high, low) for high, low in zip(higher, lower, strict=True)])
        under = 1 - np.stack([_placements(low, high) for high, low in zip(higher, lower, strict=True)])
        areas = over.sum(1) / np.float64(over.shape[1])
        of_positive = _by_patient(over - areas[:, None], owner[positive], patients=len(np.unique(owner)))
        of_negative = _by_patient(under - areas[:, None], owner[~positive], patients=len(np.unique(owner)))
        cross = of_positive @ of_negative.T * _correction(owner)
        covariance = (
            of_positive @ of_positive.T * _correction(owner[positive])
            + of_negative @ of_negative.T * _correction(owner[~positive])
            + (cross + cross.T)
        )
    return areas, covariance


def difference_interval(
    areas: Float[np.ndarray, " tests"], covariance: Float[np.ndarray, "tests tests"], first: int = 0, second: int = 1
) -> tuple[float, float, float, float]:
    """Compare two areas of `delong` by the normal approximation (DeLong et al. 1988).

    Returns:
        area of the first less that of the second, ends of its 95 % interval, two-sided p-value (1 for tests that
        order the images alike).
    """
    difference = float(areas[first] - areas[second])
    variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
    error = float(np.sqrt(np.maximum(variance, 0)))  # rounding may leave less than nothing
    half = float(ndtri(1 - TAIL)) * error
    p = float(2 * ndtr(-abs(difference) / error)) if error != 0 else float(difference == 0)
    return difference, difference - half, difference + half, p


def _placements(
    scores: Float[np.ndarray, " images"], others: Float[np.ndarray, " others"]
) -> Float[np.ndarray, " images"]:
    """Share of the others that each image scores above, ties counted half: DeLong's components, in n log n."""
    others = np.sort(others)
    below = np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")
    return below / np.float64(2 * len(others))


def _by_patient(
    components: Float[np.ndarray, "tests images"], owner: Int[np.ndarray, " images"], *, patients: int
) -> Float[np.ndarray, "tests patients"]:
    """Sum by patient, over the number of images."""
    return np.stack([np.bincount(owner, row, patients) for row in components]) / np.float64(len(owner))


def _correction(owner: Int[np.ndarray, " images"]) -> np.float64:
    """Patients over patients less one."""
    patients = np.float64(len(np.unique(owner)))
    return patients / (patients - 1)
