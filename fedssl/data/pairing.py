"""Which two images the two views of a batch row come from.

``image``: both from one image (SimCLR). ``patient``: from two distinct images of a patient, one patient a row (MICLe,
Azizi et al. 2021, section 3.2). ``series``: from an image and a neighbouring slice of its series.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Int

from fedssl.data.cache import Subset
from fedssl.data.pseudonym import numbered

Positions = Int[np.ndarray, " batch"]
Pairs = Iterator[tuple[Positions, Positions]]


def epoch_order(patients: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Order one epoch so that every patient's images are spread evenly over it.

    Neighbouring slices of one patient are near duplicates and make false negatives in a contrastive loss. Image j of
    a patient with n images gets the key (j + u) / n, u drawn once for the patient: an even spacing.

    Args:
        patients: [images] patient of each image.
        rng: decides the order.

    Returns:
        [images] a permutation.
    """
    shuffled = rng.permutation(len(patients))
    keys = np.empty(len(patients))
    _, owner = np.unique(patients[shuffled], return_inverse=True)
    grouped = np.argsort(owner, kind="stable")
    counts = np.bincount(owner)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    within = np.arange(len(patients)) - starts
    keys[grouped] = (within + rng.random(len(counts))[owner[grouped]]) / counts[owner[grouped]]
    return shuffled[np.argsort(keys, kind="stable")]


def image_rows(images: Subset, size: int, rng: np.random.Generator) -> Pairs:
    """Give batches of single images without end; an epoch's incomplete rest is carried into the next epoch.

    At the seam of two epochs an image can be twice in a batch.
    """
    patients = numbered(images.column("patient"))
    waiting = np.empty(0, np.int64)
    while True:
        if len(waiting) < size:
            waiting = np.concatenate([waiting, epoch_order(patients, rng)])
        yield waiting[:size], waiting[:size]
        waiting = waiting[size:]


def series_rows(images: Subset, size: int, rng: np.random.Generator) -> Pairs:
    """Give the batches of ``image_rows``, each image with the slice before or after it, by the flip of a coin.

    The neighbour is the next image of the series that trains here; an image alone in its series is its own partner.
    """
    patients, series = numbered(images.column("patient")), numbered(images.column("series"))
    before, after = _neighbours(series * (patients.max() + 1) + patients, images.column("order"))
    for rows, _ in image_rows(images, size, rng):
        backwards = rng.random(len(rows)) < 0.5
        yield rows, np.where(backwards, before[rows], after[rows])


def _neighbours(series: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of the image before and after each one in its series; at an end, the only neighbour or itself."""
    ranked = np.lexsort([order, series])
    joined = series[ranked][1:] == series[ranked][:-1]
    before, after = np.arange(len(series)), np.arange(len(series))
    before[ranked[1:][joined]] = ranked[:-1][joined]
    after[ranked[:-1][joined]] = ranked[1:][joined]
    first, last = before == np.arange(len(series)), after == np.arange(len(series))
    return np.where(first, after, before), np.where(last, before, after)


def patient_rows(images: Subset, size: int, rng: np.random.Generator) -> Pairs:
    """Give batches of patients without end: never a patient twice in a batch, two distinct images where there are two.

    Equal copies of an image (``copies`` of the index) count as one, and patients that share images (``group``) take
    turns as one: they may be one person. The patients of an epoch come in random order; the next epoch fills up the
    last batch with patients that are not in it.
    """
    members = _images_by_person(images)
    waiting: list[int] = []
    while True:
        batch, waiting = waiting[:size], waiting[size:]
        if len(batch) < size:
            fresh = rng.permutation(len(members)).tolist()
            taken = set(batch)
            filling = [patient for patient in fresh if patient not in taken][: size - len(batch)]
            batch = batch + filling
            waiting = [patient for patient in fresh if patient not in set(filling)]
        pairs = [_two_of(members[patient][rng.integers(len(members[patient]))], rng) for patient in batch]
        yield np.array([first for first, _ in pairs]), np.array([second for _, second in pairs])


def _images_by_person(images: Subset) -> list[list[np.ndarray]]:
    """Distinct images of each patient, the patients of a group together."""
    patients, groups = numbered(images.column("patient")), numbered(images.column("group"))
    _, kept = np.unique(np.stack([patients, images.column("copies")]), axis=1, return_index=True)
    kept = np.sort(kept)
    order = kept[np.argsort(patients[kept], kind="stable")]
    people: dict[int, list[np.ndarray]] = {}
    for rows in np.split(order, np.flatnonzero(np.diff(patients[order])) + 1):
        people.setdefault(int(groups[rows[0]]), []).append(rows)
    return list(people.values())


def _two_of(members: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    if len(members) == 1:
        return int(members[0]), int(members[0])
    first, second = rng.choice(members, 2, replace=False)
    return int(first), int(second)


PAIRINGS: Mapping[str, Callable[[Subset, int, np.random.Generator], Pairs]] = {
    "image": image_rows,
    "patient": patient_rows,
    "series": series_rows,
}
