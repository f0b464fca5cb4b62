"""Training and test patients of each site; never a patient in both."""

import math

import numpy as np

from fedssl.data.cache import ImageStore

_HASHES = 1 << 16


def test_mask(
    store: ImageStore,
    *,
    test_fraction: float,
    unseen_sites: list[str],
    each_alone: bool = False,  # noqa: PT028
) -> np.ndarray:
    """Mark the images of test patients, [images] bool.

    In every site the patients are ranked by the 16-bit hash that the index keeps of them (ties by their place in the
    index) and the first ``test_fraction`` are held out, at least one where the site has two. Every patient of an
    unseen site is a test patient. Patients that share images (``group`` of the index) count as one, also across sites.
    The outcome is the same on every machine.

    Args:
        store: the images.
        test_fraction: share of each site's patients.
        unseen_sites: all of whose patients test.
        each_alone: hold out those with a hash in the lowest ``test_fraction``, so that whether a patient (or patients
            who share images) trains does not depend on who else is there, as differential privacy needs. Shares are
            then met only on average.
    """
    sites, patients, shuffles = store.column("site"), store.column("group"), store.column("shuffle")
    held_out: set[int] = set()
    for site in np.unique(sites):
        here = np.flatnonzero(sites == site)
        first = np.sort(np.unique(patients[here], return_index=True)[1])
        ranked = sorted(here[first], key=lambda row: int(shuffles[row]))
        if each_alone and site not in unseen_sites:
            held_out.update(patients[here[shuffles[here] < test_fraction * _HASHES]].tolist())
            continue
        count = len(ranked) if site in unseen_sites else _held_out_count(len(ranked), test_fraction)
        held_out.update(int(patients[row]) for row in ranked[:count])
    return np.isin(patients, sorted(held_out))


def _held_out_count(patients: int, fraction: float) -> int:
    if fraction == 0.0 or patients == 1:
        return 0
    return min(patients - 1, max(1, math.floor(fraction * patients + 0.5)))
