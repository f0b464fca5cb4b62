"""How well a score tells patients who trained an encoder from patients who did not.

The score may be the agreement of views (``agreement``) or a likelihood ratio (``fedssl.evaluation.leakage.
likelihood_ratio``). Figures as Carlini et al. 2022 (arXiv 2112.03570) ask for: not the area alone, but how many
members are found where nearly nobody is accused by mistake.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fedssl.evaluation.metrics import Draws, auroc, draw_patients
from fedssl.evaluation.statistics import interval
from fedssl.evaluation.targets import Targets

LEAST_PATIENTS = 10  # on each side: with fewer no figure is given
RATES = (0.01, 0.1)  # false positive rates
_PART = 256  # draws at a time

Figure = Callable[[Float[np.ndarray, "thresholds draws"], Float[np.ndarray, "thresholds draws"]], np.ndarray]


def agreement(points: Float[np.ndarray, "images views width"]) -> Float[np.ndarray, " images"]:
    """Mean cosine between the views of each image, over all pairs of views (EncoderMI-T, Liu et al. 2021, CCS).

    An encoder that was fitted to make views of an image alike does so best on the images that it was fitted on.

    Args:
        points: features or projections of each view.
    """
    unit = points / np.linalg.norm(points, axis=2, keepdims=True).clip(1e-12)
    views = points.shape[1]
    return ((np.linalg.norm(unit.sum(1), axis=1) ** 2 - views) / (views * (views - 1))).astype(np.float64)


def by_patient(
    values: Float[np.ndarray, " images"], patients: Int[np.ndarray, " images"]
) -> Float[np.ndarray, " patients"]:
    """Mean over the images of each patient; patients in the order of their numbers."""
    owner = np.unique(patients, return_inverse=True)[1].ravel()
    return np.bincount(owner, values) / np.bincount(owner)


def attack_figures(
    scores: Float[np.ndarray, " guesses"],
    member: Bool[np.ndarray, " guesses"],
    patients: Int[np.ndarray, " guesses"],
    *,
    resamples: int,
) -> dict[str, Any]:
    """Figures of an attack that calls those members whose score is high, each with a 95 % interval and chance.

    Args:
        scores: one for each guess: a patient, or a patient in one of several trainings.
        member: whether the patient trained.
        patients: whom the guess is about; intervals come from draws of whole patients.
        resamples: draws.

    Returns:
        ``members`` and ``held_out`` (patients), and by name None or ``value low high chance``: ``auroc``,
        ``advantage`` (true less false positive rate of calling the upper half members: needs no threshold that an
        attacker could not know; Yeom et al. 2018), ``tpr_at_1`` and ``tpr_at_10`` percent false positives. A rate is
        not known where it is less than one of the patients who did not train.
    """
    sides = {name: len(np.unique(patients[mask])) for name, mask in {"members": member, "held_out": ~member}.items()}
    found: dict[str, Any] = {**sides, "auroc": None, "advantage": None}
    found |= {f"tpr_at_{100 * rate:.0f}": None for rate in RATES}
    if min(sides.values()) < LEAST_PATIENTS:
        return found
    draws = draw_patients(patients, number=resamples, seed=0)
    fewest = min(sides.values())
    targets = Targets(np.eye(2)[member.astype(int)], ["held out", "member"], exclusive=True)
    found["auroc"] = _row(auroc(np.stack([-scores, scores], 1), targets, draws), fewest, 0.5)
    found["advantage"] = _row(_drawn(upper_half, scores, member, draws), fewest, 0.0)
    negatives = int((~member).sum())
    for rate in RATES:
        allowed = int(rate * negatives + 1e-9)
        if allowed:
            values = _drawn(_sensitivity(rate), scores, member, draws)
            found[f"tpr_at_{100 * rate:.0f}"] = _row(values, fewest, (allowed + 1) / (negatives + 1))
    return found


def difference(
    first: Float[np.ndarray, " patients"],
    second: Float[np.ndarray, " patients"],
    member: Bool[np.ndarray, " patients"],
    *,
    resamples: int,
) -> dict[str, float] | None:
    """AUROC of the first score less that of the second, on the same draws of the same patients; None: too few."""
    fewest = min(int(member.sum()), int((~member).sum()))
    if fewest < LEAST_PATIENTS:
        return None
    draws = draw_patients(np.arange(len(member)), number=resamples, seed=0)
    targets = Targets(np.eye(2)[member.astype(int)], ["held out", "member"], exclusive=True)
    both = [auroc(np.stack([-scores, scores], 1), targets, draws) for scores in (first, second)]
    return _row(both[0] - both[1], fewest, 0.0)


def _row(values: Float[np.ndarray, " draws"], patients: int, chance: float) -> dict[str, float]:
    value, low, high = interval(values, patients)
    return {"value": value, "low": low, "high": high, "chance": chance}


def _drawn(
    figure: Figure, scores: Float[np.ndarray, " guesses"], member: Bool[np.ndarray, " guesses"], draws: Draws
) -> Float[np.ndarray, " draws"]:
    """Work out a figure of every draw from how many members, and others, reach each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    owner, truth = draws.owner[order], member[order, None]
    values = []
    for start in range(0, draws.counts.shape[1], _PART):
        drawn = draws.counts[:, start : start + _PART][owner]
        hits, alarms = (np.cumsum(drawn * side, axis=0)[ends] for side in (truth, ~truth))
        values.append(figure(hits, alarms))
    return np.concatenate(values)


def upper_half(
    hits: Float[np.ndarray, "thresholds draws"], alarms: Float[np.ndarray, "thresholds draws"]
) -> Float[np.ndarray, " draws"]:
    """True less false positive rate where half of all are called members, between thresholds by a coin.

    Args:
        hits: members who reach each threshold, highest first.
        alarms: others who do.
    """
    rates = [_interpolated(hits + alarms, side) / np.where(side[-1] > 0, side[-1], np.nan) for side in (hits, alarms)]
    return rates[0] - rates[1]


def _interpolated(
    called: Float[np.ndarray, "thresholds draws"], side: Float[np.ndarray, "thresholds draws"]
) -> Float[np.ndarray, " draws"]:
    half = called[-1] / 2
    place = (called < half).sum(0)
    columns = np.arange(len(half))
    before = np.where(place > 0, called[place - 1, columns], 0.0)
    lower = np.where(place > 0, side[place - 1, columns], 0.0)
    share = (half - before) / np.maximum(called[place, columns] - before, 1e-12)
    return lower + share * (side[place, columns] - lower)


def _sensitivity(rate: float) -> Figure:
    """Share of members at the lowest threshold that at most a share ``rate`` of the others reach."""

    def figure(hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        reached = (hits * (alarms <= rate * alarms[-1] + 1e-9)).max(0)
        defined = (hits[-1] > 0) & (alarms[-1] > 0)
        return np.where(defined, reached / np.where(defined, hits[-1], 1.0), np.nan)

    return figure


def leaks(row: Mapping[str, float] | None) -> bool:
    """Tell whether the whole interval of a figure lies above chance."""
    return row is not None and row["low"] > row["chance"]
