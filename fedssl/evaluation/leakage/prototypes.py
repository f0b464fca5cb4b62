"""Do prototypes sit on single patients? Their nearest training image against their nearest held-out image.

A prototype is a point in the space of projections. If it is the mean of many patients, images that trained are no
nearer to it than others of the same sites.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fedssl.evaluation.leakage.membership import LEAST_PATIENTS, leaks
from fedssl.evaluation.metrics import draw_patients
from fedssl.evaluation.statistics import interval

NEAREST = 5  # images
NEARER = 10.0  # times: from this on a prototype is said to sit on an image
_LEAST_NEAREST = 5  # patients: by chance all of these trained in 1 of 32 cases
_ZERO = 1e-7  # distances below are rounding


def equal_sides(
    member: Bool[np.ndarray, " images"], patients: Int[np.ndarray, " images"], seed: int
) -> Int[np.ndarray, " chosen"]:
    """Choose as many patients, and as many images, of those who trained as of those who did not."""
    rng = np.random.default_rng(seed)
    names = [rng.permutation(np.unique(patients[side])) for side in (member, ~member)]
    count = min(map(len, names))
    sides = [rng.permutation(np.flatnonzero(np.isin(patients, some[:count]) & side))
             for some, side in zip(names, (member, ~member), strict=True)]  # fmt: skip
    images = min(map(len, sides))
    return np.sort(np.concatenate([side[:images] for side in sides]))


def nearest_images(
    cosines: Float[np.ndarray, "images prototypes"],
    member: Bool[np.ndarray, " images"],
    patients: Int[np.ndarray, " images"],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the distances (1 - cosine) from prototypes to images that trained and to others, equally many of each.

    Args:
        cosines: between the projection of each image and each prototype.
        member: whether the image trained.
        patients: number of each image's patient.
        resamples: draws of the patients.
        seed: chooses the images.

    Returns:
        ``member_nearest``: share of the prototypes whose nearest image trained, with its interval; chance is one half.
        ``nearest_member`` and ``nearest_held_out``: smallest distances. ``sits_on_member``: prototypes ten times nearer
        to an image that trained than to any other, and ``sits_on_held_out`` the reverse, which chance makes as often.
        ``one_patient`` and ``one_held_out_patient``: prototypes whose five nearest images of a side are of one patient.
        ``patients_near``: mean number of patients among the five nearest that trained. ``alarm``: more sit on images
        that trained than on others, or the interval lies above one half. ``too_few`` and counts of patients alone where
        no figure is given.
    """
    members, held_out = (len(np.unique(patients[side])) for side in (member, ~member))
    chosen = equal_sides(member, patients, seed)
    cosines, member, patients = cosines[chosen], member[chosen], patients[chosen]
    count = len(np.unique(patients[member]))
    if count < LEAST_PATIENTS:
        return {"too_few": True, "members": members, "held_out": held_out}
    own, other = ((1.0 - cosines[side].max(0)).clip(_ZERO) for side in (member, ~member))
    near, near_other = (_patients_near(cosines[side], patients[side]) for side in (member, ~member))
    share = _share_of_members(cosines, member, patients, resamples)
    sits, sits_other = int((own * NEARER <= other).sum()), int((other * NEARER <= own).sum())
    return {
        "prototypes": cosines.shape[1], "patients": count, "images": int(member.sum()),
        "member_nearest": share,
        "nearest_member": float(own.min()), "nearest_held_out": float(other.min()),
        "sits_on_member": sits, "sits_on_held_out": sits_other,
        "one_patient": int((near == 1).sum()), "one_held_out_patient": int((near_other == 1).sum()),
        "patients_near": float(near.mean()), "alarm": sits > sits_other or leaks(share),
    }  # fmt: skip


def _patients_near(
    cosines: Float[np.ndarray, "images prototypes"], patients: Int[np.ndarray, " images"]
) -> Int[np.ndarray, " prototypes"]:
    """Count the patients behind the five nearest images of each prototype."""
    nearest = patients[np.argsort(-cosines, axis=0, kind="stable")[:NEAREST]]
    return np.array([len(np.unique(column)) for column in nearest.T])


def _share_of_members(
    cosines: Float[np.ndarray, "images prototypes"],
    member: Bool[np.ndarray, " images"],
    patients: Int[np.ndarray, " images"],
    resamples: int,
) -> dict[str, float]:
    """Share of the prototypes whose nearest image trained, an interval by draws of the patients of nearest images.

    The interval is from 0 to 1 where these are very few: they say nothing then.
    """
    nearest = cosines.argmax(0)
    draws = draw_patients(patients[nearest], number=resamples, seed=0)
    drawn = draws.counts[draws.owner]
    shares = (drawn * member[nearest, None]).sum(0) / drawn.sum(0)
    value, low, high = interval(shares, len(draws.counts))
    if len(draws.counts) < _LEAST_NEAREST:
        low, high = 0.0, 1.0
    return {"value": value, "low": low, "high": high, "chance": 0.5}
