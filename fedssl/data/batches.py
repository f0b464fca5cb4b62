"""Patient-aware batches: every batch holds each patient's images in about the patient's share."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedssl.data.cache import Pixels, Subset
from fedssl.data.pseudonym import numbered


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


@dataclass(frozen=True)
class ImageBatch:
    """Images on a device, with what is needed to show them.

    Attributes:
        values: [batch, channels, edge, edge]; Hounsfield units as (HU + 1024) / 4096, all else from 0 to 1.
        low: [batch, 1, 1, 1] the value shown as black.
        high: [batch, 1, 1, 1] the value shown as white.
        hounsfield: [batch, 1, 1, 1] the image is CT in Hounsfield units; None where none of the batch is.
    """

    values: Float[Tensor, "batch channels edge edge"]
    low: Float[Tensor, "batch 1 1 1"]
    high: Float[Tensor, "batch 1 1 1"]
    hounsfield: Bool[Tensor, "batch 1 1 1"] | None

    def __len__(self) -> int:
        """Count the images."""
        return len(self.values)

    def to(self, device: torch.device) -> "ImageBatch":
        """Copy to a device."""
        low, high = self.low.to(device, non_blocking=True), self.high.to(device, non_blocking=True)
        mask = None if self.hounsfield is None else self.hounsfield.to(device, non_blocking=True)
        return ImageBatch(self.values.to(device, non_blocking=True), low, high, mask)

    def shown(self) -> Float[Tensor, "batch channels edge edge"]:
        """Values from 0 to 1 as on a screen."""
        if self.hounsfield is None:
            return self.values
        return ((self.values - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


def image_batch(pixels: Pixels) -> ImageBatch:
    """Turn numbers from the cache into a batch."""
    low, high = (torch.from_numpy(limit)[:, None, None, None] for limit in (pixels.low, pixels.high))
    mask = torch.from_numpy(pixels.hounsfield)[:, None, None, None] if pixels.hounsfield.any() else None
    return ImageBatch(torch.from_numpy(pixels.values), low, high, mask)


@dataclass(frozen=True)
class Batches:
    """The batches of one round at one site, a pure function of ``seed``.

    Attributes:
        images: the site's training images.
        batch_size: images in a batch; lowered to what the site has.
        epochs: passes over the images in a round; may be a fraction.
        seed: decides the order.
    """

    images: Subset
    batch_size: int
    epochs: float
    seed: int

    @property
    def size(self) -> int:
        """Images in each batch."""
        return min(self.batch_size, len(self.images))

    def __len__(self) -> int:
        """Count the batches of the round, at least one."""
        return max(1, math.floor(self.epochs * len(self.images) / self.size + 1e-9))

    def positions(self) -> Iterator[np.ndarray]:
        """Give the positions of each batch; an epoch's incomplete rest is carried into the next epoch.

        At the seam of two epochs an image can be twice in a batch.
        """
        rng = np.random.default_rng(self.seed)
        patients = numbered(self.images.column("patient"))
        waiting = np.empty(0, np.int64)
        for _ in range(len(self)):
            if len(waiting) < self.size:
                waiting = np.concatenate([waiting, epoch_order(patients, rng)])
            yield waiting[: self.size]
            waiting = waiting[self.size :]

    def __iter__(self) -> Iterator[ImageBatch]:
        """Give batches of images; the next one is read while the last one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-images") as reader:
            pending = None
            for positions in self.positions():
                upcoming = reader.submit(self.images.read, positions)
                if pending is not None:
                    yield image_batch(pending.result())
                pending = upcoming
            if pending is not None:
                yield image_batch(pending.result())
