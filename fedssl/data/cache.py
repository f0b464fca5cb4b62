"""A site's images, decoded once and mapped into memory by all processes that train or evaluate on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Float

from fedssl.data.decoding.picture import LUMA
from fedssl.data.index import Index
from fedssl.data.pseudonym import pseudonym
from fedssl.data.shards import Shards

HOUNSFIELD_LOW, HOUNSFIELD_SPAN = -1024.0, 4096.0


@dataclass(frozen=True)
class Pixels:
    """A batch of images as numbers.

    Attributes:
        values: [batch, channels, edge, edge]; Hounsfield units as (HU + 1024) / 4096, all else from 0 to 1.
        low: [batch] the value shown as black.
        high: [batch] the value shown as white.
        hounsfield: [batch] the image is CT in Hounsfield units.
    """

    values: Float[np.ndarray, "batch channels edge edge"]
    low: Float[np.ndarray, " batch"]
    high: Float[np.ndarray, " batch"]
    hounsfield: Bool[np.ndarray, " batch"]

    def shown(self) -> Float[np.ndarray, "batch channels edge edge"]:
        """Values from 0 to 1 as on a screen."""
        low, high = (limit[:, None, None, None] for limit in (self.low, self.high))
        return np.clip((self.values - low) / (high - low), 0.0, 1.0)


class ImageStore:
    """A site's readable images: row i of the index describes image i.

    Args:
        index: of the images.
        shards: their pixels.
        channels: 1 (colour becomes grey) or 3 (grey is repeated).
        secret: the site's key, to find images by their file.
        in_use: kept open as long as the store is used, so that nobody removes its pixels.
    """

    def __init__(
        self, index: Index, shards: Shards, channels: int = 1, secret: bytes = b"", in_use: BinaryIO | None = None
    ) -> None:
        self.index = index
        self.shards = shards
        self.channels = channels
        self.secret = secret
        self.in_use = in_use

    def __len__(self) -> int:
        """Count the images."""
        return self.index.num_rows

    def column(self, name: str) -> np.ndarray:
        """Return one column of the index as an array."""
        return self.index.column(name)

    def names_of(self, files: Sequence[str]) -> list[str]:
        """Return what the index calls files (paths below the root), to be compared with the column ``image``."""
        return [pseudonym(self.secret, "file", file) for file in files]

    @cached_property
    def _where(self) -> list[np.ndarray]:
        return [self.column(name) for name in ("part", "layout", "slot")]

    @cached_property
    def _how(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[images, 4] scale, offset, low, high; [images] Hounsfield; [images] colour."""
        numbers = np.stack([self.column(name) for name in ("scale", "offset", "low", "high")], 1)
        meaning = self.column("meaning")
        return numbers, meaning == "hounsfield", meaning == "colour"

    def read(self, rows: np.ndarray) -> Pixels:
        """Copy images out of the map.

        Raises:
            DataError: the cache was removed or cut.
        """
        part, layout, slot = (column[rows] for column in self._where)
        numbers, hounsfield, colour = (column[rows] for column in self._how)
        edge = self.shards.edge
        values = np.empty((len(rows), self.channels, edge, edge), np.float32)
        for place, (scale, offset, low, high) in enumerate(numbers):
            if hounsfield[place]:
                low, high = HOUNSFIELD_LOW, HOUNSFIELD_LOW + HOUNSFIELD_SPAN
            stored = self.shards.read(int(part[place]), int(layout[place]), int(slot[place]))
            span = high - low if high != low else np.float32(1.0)
            linear = stored * np.float32(scale / span) + np.float32((offset - low) / span)
            values[place] = self._channels(linear, colour=bool(colour[place]))
        low, high = (numbers[:, 2:].T - HOUNSFIELD_LOW) / HOUNSFIELD_SPAN
        kept = hounsfield[:, None, None, None]
        np.copyto(values, np.clip(values, 0.0, 1.0), where=~kept)
        zero, one = np.zeros(len(rows), np.float32), np.ones(len(rows), np.float32)
        return Pixels(values, np.where(hounsfield, low, zero), np.where(hounsfield, high, one), hounsfield)

    def _channels(self, values: np.ndarray, *, colour: bool) -> np.ndarray:
        if not colour:
            return values[None]
        return (values @ LUMA)[None] if self.channels == 1 else values.transpose(2, 0, 1)


def select(store: ImageStore, mask: np.ndarray) -> "Subset":
    """Choose rows of a store by a boolean mask."""
    return Subset(store, np.flatnonzero(mask))


@dataclass(frozen=True)
class Subset:
    """Rows of a store: one site's training images, a test split."""

    store: ImageStore
    rows: np.ndarray

    def __len__(self) -> int:
        """Count the images."""
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """Return one column of the index for these rows."""
        return self.store.column(name)[self.rows]

    def read(self, positions: np.ndarray) -> Pixels:
        """Copy images out of the map by their position in this subset."""
        return self.store.read(self.rows[positions])
