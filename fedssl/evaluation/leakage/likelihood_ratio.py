"""Likelihood-ratio attack: is this score more like those of encoders that saw the patient, or of those that did not?

LiRA, online variant (Carlini et al. 2022, arXiv 2112.03570, algorithm 1): shadow encoders, each trained on a random
half of the patients, give every patient scores "in" and "out", to which Gaussians are fitted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fedssl.evaluation.leakage.membership import attack_figures

TARGET, SHADOWS, PATIENTS, CANARIES = "target", "shadows", "patients", "canaries"
OWN_VARIANCE = 32  # shadows on each side, from which on a patient's own variance is fitted: 64 in all, as in LiRA
_EDGE = 1e-6  # of the cosine
_FLAT = 1e-12  # the least variance


def fisher_z(cosine: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Stretch cosines to the real line, nearly Gaussian (Fisher 1915), as LiRA does by the logit of confidence."""
    return np.arctanh(cosine.clip(-1 + _EDGE, 1 - _EDGE))


def standardised(
    values: Float[np.ndarray, " patients"], reference: Float[np.ndarray, " others"]
) -> Float[np.ndarray, " patients"]:
    """Take away what differs between trainings as a whole: the mean and the spread of reference patients there.

    An attacker can do the same: it takes no knowledge of who trained.
    """
    spread = reference.std()
    return (values - reference.mean()) / (spread if spread > 0 else 1.0)


def likelihood_ratios(
    target: Float[np.ndarray, " patients"],
    shadows: Float[np.ndarray, "shadows patients"],
    inside: Bool[np.ndarray, "shadows patients"],
) -> Float[np.ndarray, " patients"]:
    """Log of how much likelier each score of the target is if the patient trained than if not.

    With fewer than 32 shadows on a side, one variance for all patients is fitted on each side, around each patient's
    own mean (Carlini et al. found a common one better for few); with one shadow on a side, one for both sides around
    the means of all.

    Args:
        target: scores by the encoder that is attacked.
        shadows: scores by each shadow.
        inside: whether the patient trained the shadow; each patient trained some and not others.
    """
    (mean_in, variance_in), (mean_out, variance_out) = (_gaussian(shadows, side) for side in (inside, ~inside))
    if variance_in is None or variance_out is None:
        deviation = np.where(inside, shadows - shadows[inside].mean(), shadows - shadows[~inside].mean())
        variance_in = variance_out = np.full(len(target), max((deviation**2).mean(), _FLAT))
    return _log_density(target, mean_in, variance_in) - _log_density(target, mean_out, variance_out)


def _gaussian(
    shadows: Float[np.ndarray, "shadows patients"], side: Bool[np.ndarray, "shadows patients"]
) -> tuple[Float[np.ndarray, " patients"], Float[np.ndarray, " patients"] | None]:
    """Mean of each patient over the shadows of a side, and the variance; None where there is one shadow each."""
    counts = side.sum(0)
    assert counts.min() > 0
    means = (shadows * side).sum(0) / counts
    squares = (((shadows - means) * side) ** 2).sum(0)
    freedom = counts - 1
    if freedom.sum() == 0:
        return means, None
    if counts.min() >= OWN_VARIANCE:
        return means, np.maximum(squares / freedom, _FLAT)
    return means, np.full(shadows.shape[1], max(squares.sum() / freedom.sum(), _FLAT))


def _log_density(
    values: Float[np.ndarray, " patients"],
    mean: Float[np.ndarray, " patients"],
    variance: Float[np.ndarray, " patients"],
) -> Float[np.ndarray, " patients"]:
    return -((values - mean) ** 2) / (2 * variance) - np.log(variance) / 2


def each_against_the_others(
    shadows: Float[np.ndarray, "shadows patients"], inside: Bool[np.ndarray, "shadows patients"]
) -> Float[np.ndarray, "shadows patients"]:
    """Attack every shadow with the others.

    Shadows 0 and 1, 2 and 3, ... trained on opposite halves: the partner is left out too. Else a patient would have
    one reference more on the side where the attacked shadow does not have them, and that alone would shift the scores.

    Args:
        shadows: scores; an even number of shadows, four or more.
        inside: whether the patient trained the shadow.
    """
    numbers = np.arange(len(shadows))
    ratios = []
    for number in numbers:
        others = numbers // 2 != number // 2
        ratios.append(likelihood_ratios(shadows[number], shadows[others], inside[others]))
    return np.stack(ratios)


@dataclass(frozen=True)
class Shadows:
    """Who trained what.

    Attributes:
        patients: their numbers.
        member: whether the patient trained the encoder that is attacked.
        inside: [shadows, patients] whether the patient trained the shadow.
        planted: whether the patient's images were replaced by canaries in the shadows.
    """

    patients: Int[np.ndarray, " patients"]
    member: Bool[np.ndarray, " patients"]
    inside: Bool[np.ndarray, "shadows patients"]
    planted: Bool[np.ndarray, " patients"]


def ratio_rows(
    target: Float[np.ndarray, " patients"],
    shadows: Float[np.ndarray, "shadows patients"],
    who: Shadows,
    *,
    resamples: int,
) -> list[dict[str, Any]]:
    """Attack the target with shadows, and shadows with each other: patients, and canaries as the worst case.

    Args:
        target: cosines by the encoder that is attacked; of canary patients without meaning.
        shadows: cosines by each shadow.
        who: trained what; patients who did not train half of the shadows are left out.
        resamples: draws for the intervals.

    Returns:
        Figures of ``attack_figures`` with ``attacked`` (``target`` or ``shadows``) and ``who`` (``patients`` or
        ``canaries``).
    """
    half = 2 * who.inside.sum(0) == len(who.inside)
    real, planted = half & ~who.planted, half & who.planted
    stretched = fisher_z(shadows)
    level = np.stack([standardised(row, row[real]) for row in stretched])
    own = fisher_z(target)
    ratios = likelihood_ratios(standardised(own, own[real])[real], level[:, real], who.inside[:, real])
    rows = [{"attacked": TARGET, "who": PATIENTS,
             **attack_figures(ratios, who.member[real], who.patients[real], resamples=resamples)}]  # fmt: skip
    for name, side in ((PATIENTS, real), (CANARIES, planted)):
        if not side.any():
            continue
        inside = who.inside[:, side]
        guesses = each_against_the_others(level[:, side], inside).ravel()
        patients = np.tile(who.patients[side], len(inside))
        figures = attack_figures(guesses, inside.ravel(), patients, resamples=resamples)
        rows.append({"attacked": SHADOWS, "who": name, **figures})
    return rows
