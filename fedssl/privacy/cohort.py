"""The patients of a site as private training sees them: drawn one by one by the operating system's coins."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedssl.data.batches import ImageBatch, image_batch
from fedssl.data.cache import Subset
from fedssl.data.modality import modality_groups
from fedssl.privacy.randomness import coins, some_of

PAIRINGS = ("image", "patient")


@dataclass(frozen=True)
class Cohort:
    """Who is protected: each patient with all images. Patients who share images (``group``) are one.

    Attributes:
        images: the site's training images.
        members: positions of each patient's images.
        modality: [images] group of each image.
    """

    images: Subset
    members: Sequence[np.ndarray]
    modality: Tensor

    @classmethod
    def of(cls, images: Subset) -> "Cohort":
        """Gather the images of each patient."""
        _, owner = np.unique(images.column("group"), return_inverse=True)
        order = np.argsort(owner, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(owner))[:-1]) if len(order) else []
        return cls(images, members, torch.from_numpy(modality_groups(images.column("modality").tolist())))

    def without_crowds(self, most: int) -> tuple["Cohort", int]:
        """Leave out who has more than ``most`` images; also gives how many they are."""
        kept = [one for one in self.members if len(one) <= most]
        return replace(self, members=kept), len(self.members) - len(kept)

    def draw(self, rate: float, most: int) -> list[np.ndarray]:
        """Toss each patient's coin; give up to ``most`` positions of images of each one drawn. May be empty."""
        drawn = [one for one, shown in zip(self.members, coins(len(self.members), rate), strict=True) if shown]
        return [positions[some_of(len(positions), most)] for positions in drawn]

    def read(self, positions: np.ndarray, pairing: str) -> ImageBatch:
        """Read one patient's images; by ``patient`` pairing each has another of them as its partner."""
        batch = replace(image_batch(self.images.read(positions)), modality=self.modality[positions])
        if pairing == "image" or len(positions) < 2:
            return batch
        turned = np.roll(positions, 1)
        return replace(batch, partner=replace(image_batch(self.images.read(turned)), modality=self.modality[turned]))

    def steps(self, count: int, *, rate: float, most: int, pairing: str) -> Iterator[list[ImageBatch]]:
        """Give the drawn patients of each step; those of the next step are read meanwhile."""

        def one_step() -> list[ImageBatch]:
            return [self.read(positions, pairing) for positions in self.draw(rate, most)]

        with ThreadPoolExecutor(1, thread_name_prefix="read-patients") as reader:
            pending = reader.submit(one_step)
            for number in range(count):
                current = pending.result()
                if number + 1 < count:
                    pending = reader.submit(one_step)
                yield current
