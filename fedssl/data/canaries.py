"""Shadow trainings of the leakage audit: which half of the patients trains, and images planted among theirs.

Everything is a pure function of the seed, the shadow's number and who the patients are. Only a simulation deals out
images so, never a hospital's node.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fedssl.data.cache import Pixels, Subset

BLOCKS = 8  # on a side of a pattern
_HALVES, _CHOICE, _PATTERN = 1, 2, 3  # so that no two draws are the same

Patients = Int[np.ndarray, " images"]


def half_of_patients(
    patients: Patients, sites: Shaped[np.ndarray, " images"], shadow: int, seed: int
) -> Bool[np.ndarray, " images"]:
    """Mark the images of a random half of each site's patients.

    Shadows 0 and 1, 2 and 3, ... have opposite halves: of an even number of shadows every patient is in half.

    Args:
        patients: [images] number of each image's patient.
        sites: [images] their sites; a patient of several counts at that of their first image.
        shadow: number of the shadow.
        seed: of the run.
    """
    names, first = np.unique(patients, return_index=True)
    chosen = np.zeros(len(names), bool)
    for number, site in enumerate(np.unique(sites)):
        here = np.flatnonzero(sites[first] == site)
        rng = np.random.default_rng([seed, _HALVES, shadow // 2, number])
        place = np.empty(len(here), np.int64)
        place[rng.permutation(len(here))] = np.arange(len(here)) + rng.integers(2)
        chosen[here] = place % 2 == shadow % 2
    return chosen[np.searchsorted(names, patients)]


def planted_patients(patients: Patients, count: int, seed: int) -> Int[np.ndarray, " planted"]:
    """Choose the patients whose images are replaced, the same in all shadows; at most all."""
    names = np.unique(patients)
    return np.sort(np.random.default_rng([seed, _CHOICE]).permutation(names)[:count])


def pattern(patient: int, edge: int, seed: int) -> Float[np.ndarray, "edge edge"]:
    """Draw the canary of a patient: 8 x 8 blocks of random grey, like nothing that a scanner makes."""
    blocks = np.random.default_rng([seed, _PATTERN, patient]).random((BLOCKS, BLOCKS), np.float32)
    place = np.arange(edge) * BLOCKS // edge
    return blocks[place[:, None], place[None, :]]


@dataclass(frozen=True)
class CanarySubset(Subset):
    """A site's images, those of some patients replaced by a pattern that is the patient's own.

    Attributes:
        inner: the images as they are.
        planted: [images] number of the patient whose pattern stands there; -1: the image as it is.
        seed: of the patterns.
    """

    inner: Subset
    planted: Int[np.ndarray, " images"]
    seed: int

    @classmethod
    def of(cls, inner: Subset, patients: Patients, planted: Int[np.ndarray, " planted"], seed: int) -> "CanarySubset":
        """Plant patterns.

        Args:
            inner: the images.
            patients: [images] number of each image's patient, the same at every site and in every run.
            planted: patients whose images are replaced.
            seed: of the patterns.
        """
        return cls(inner.store, inner.rows, inner, np.where(np.isin(patients, planted), patients, -1), seed)

    def read(self, positions: np.ndarray) -> Pixels:
        """Copy images out of the map by their position in this subset; canaries are grey, never Hounsfield units."""
        read, planted = self.inner.read(positions), self.planted[positions]
        here = planted >= 0
        values = read.values.copy()
        for place in np.flatnonzero(here):
            values[place] = pattern(int(planted[place]), values.shape[-1], self.seed)
        low, high = np.where(here, np.float32(0.0), read.low), np.where(here, np.float32(1.0), read.high)
        return Pixels(values, low, high, read.hounsfield & ~here)
