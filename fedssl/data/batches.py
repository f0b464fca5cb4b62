"""Batches of a site's images: patient-aware, paired, and read ahead while the last one trains."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedssl.data.cache import Pixels, Subset
from fedssl.data.modality import modality_groups
from fedssl.data.pairing import PAIRINGS
from fedssl.data.pseudonym import numbered

UNLABELLED = -1


@dataclass(frozen=True)
class ImageBatch:
    """Images on a device, with what is needed to show them.

    Attributes:
        values: [batch, channels, edge, edge]; Hounsfield units as (HU + 1024) / 4096, all else from 0 to 1.
        low: [batch, 1, 1, 1] the value shown as black.
        high: [batch, 1, 1, 1] the value shown as white.
        hounsfield: [batch, 1, 1, 1] the image is CT in Hounsfield units; None where none of the batch is.
        modality: [batch] group of each image, a position in ``fedssl.data.modality.MODALITIES``; None: not known.
        label: [batch] position of each image's label in the method's classes, -1 without; None: not asked for.
        patient: [batch] number of each image's patient at this site; None: not known.
        partner: the images of the other view of each row, where they are others.
    """

    values: Float[Tensor, "batch channels edge edge"]
    low: Float[Tensor, "batch 1 1 1"]
    high: Float[Tensor, "batch 1 1 1"]
    hounsfield: Bool[Tensor, "batch 1 1 1"] | None
    modality: Int[Tensor, " batch"] | None = None
    label: Int[Tensor, " batch"] | None = None
    patient: Int[Tensor, " batch"] | None = None
    partner: "ImageBatch | None" = None

    def __len__(self) -> int:
        """Count the images."""
        return len(self.values)

    def to(self, device: torch.device) -> "ImageBatch":
        """Copy to a device."""

        def sent(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        low, high = self.low.to(device, non_blocking=True), self.high.to(device, non_blocking=True)
        values, partner = self.values.to(device, non_blocking=True), self.partner and self.partner.to(device)
        return ImageBatch(
            values, low, high, sent(self.hounsfield), sent(self.modality), sent(self.label), sent(self.patient), partner
        )

    def pick(self, rows: Int[Tensor, " picked"]) -> "ImageBatch":
        """Choose images by their place in the batch, without labels and partners."""
        mask = None if self.hounsfield is None else self.hounsfield[rows]
        return ImageBatch(self.values[rows], self.low[rows], self.high[rows], mask)

    def shown(self) -> Float[Tensor, "batch channels edge edge"]:
        """Values from 0 to 1 as on a screen."""
        if self.hounsfield is None:
            return self.values
        return ((self.values - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class ViewBatch:
    """Augmented views of one batch, and what is known of its images.

    Attributes:
        views: one tensor [batch, channels, edge, edge] a view, large ones first; the first two are the pair that is
            compared. Views 0, 2, ... come from one image of a row, views 1, 3, ... from the other.
        modality: group of the image behind the first and the second view, a position in ``MODALITIES``.
        label: of the first view's image, a position in the method's classes; -1 without.
        patient: number of the patient behind the first and the second view; None: not known.
    """

    views: Sequence[Float[Tensor, "batch channels _rows _columns"]]
    modality: Int[Tensor, "2 batch"]
    label: Int[Tensor, " batch"]
    patient: Int[Tensor, "2 batch"] | None = None


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
        batch_size: rows in a batch; lowered to what the site has.
        epochs: passes over the images in a round; may be a fraction.
        seed: decides the order.
        pairing: where the two views of a row come from, a key of ``PAIRINGS``.
        labels: [images] their labels, empty where unknown; None: unlabelled.
        classes: labels that count; images with others are unlabelled.
        steps: batches of the round, instead of what ``epochs`` makes.
    """

    images: Subset
    batch_size: int
    epochs: float
    seed: int
    pairing: str = "image"
    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    steps: int | None = None

    @cached_property
    def size(self) -> int:
        """Rows in each batch."""
        rows = len(np.unique(self.images.column("group"))) if self.pairing == "patient" else len(self.images)
        return min(self.batch_size, rows)

    def __len__(self) -> int:
        """Count the batches of the round, at least one: as many rows as the site has images in an epoch."""
        if self.steps is not None:
            return self.steps
        return max(1, math.floor(self.epochs * len(self.images) / self.size + 1e-9))

    def positions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Give for each batch the positions of the images behind the first and the second views."""
        rows = PAIRINGS[self.pairing](self.images, self.size, np.random.default_rng(self.seed))
        for _ in range(len(self)):
            yield next(rows)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Give batches of images; the next one is read while the last one is used."""
        modality = torch.from_numpy(modality_groups(self.images.column("modality").tolist()))
        label, patient = torch.from_numpy(self._labels()), torch.from_numpy(numbered(self.images.column("group")))
        with ThreadPoolExecutor(1, thread_name_prefix="read-images") as reader:
            pending = None
            for pair in self.positions():
                upcoming = reader.submit(self._read, pair, modality, label, patient)
                if pending is not None:
                    yield pending.result()
                pending = upcoming
            if pending is not None:
                yield pending.result()

    def _read(
        self, pair: tuple[np.ndarray, np.ndarray], modality: Tensor, label: Tensor, patient: Tensor
    ) -> ImageBatch:
        """Read a batch and, where the rows have partners, those too."""
        first, *others = [
            replace(
                image_batch(self.images.read(rows)), modality=modality[rows], label=label[rows], patient=patient[rows]
            )
            for rows in (pair[:1] if self.pairing == "image" else pair)
        ]
        return replace(first, partner=others[0]) if others else first

    def _labels(self) -> Int[np.ndarray, " images"]:
        numbers = np.full(len(self.images), UNLABELLED, np.int64)
        for number, name in enumerate(self.classes if self.labels is not None else ()):
            numbers[self.labels == name] = number
        return numbers
