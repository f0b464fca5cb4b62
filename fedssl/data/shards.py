"""The pixels of a journal's parts, mapped into memory once and shared by all processes of the site."""

import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from fedssl.data.decoding.record import LAYOUTS
from fedssl.data.indexing.journal import record_bytes
from fedssl.errors import DataError

LAYOUT_NAMES = list(LAYOUTS)


class Shards:
    """Reads records by part, layout and slot; files are mapped when they are first needed.

    Args:
        folder: of the journal.
        parts: names of the parts, by number.
        edge: pixels on a side.
    """

    def __init__(self, folder: Path, parts: Sequence[str], edge: int) -> None:
        self.folder = folder
        self.parts = list(parts)
        self.edge = edge
        self.maps: dict[tuple[int, int], np.ndarray] = {}
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # every map keeps its file open
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def read(self, part: int, layout: int, slot: int) -> Shaped[np.ndarray, "edge edge *colour"]:
        """Map one record.

        Raises:
            DataError: the part was removed or cut.
        """
        key = (part, layout)
        if key not in self.maps:
            self.maps[key] = self._map(part, LAYOUT_NAMES[layout])
        return self.maps[key][slot]

    def _map(self, part: int, layout: str) -> np.ndarray:
        path = self.folder / self.parts[part] / f"{layout}.bin"
        dtype, channels = LAYOUTS[layout]
        try:
            count, rest = divmod(path.stat().st_size, record_bytes(layout, self.edge))
        except OSError:
            count, rest = 0, 1
        if rest or not count:
            raise DataError("The image cache was removed or cut in part. Run fedssl index with --verify to repair it.")
        shape = (count, self.edge, self.edge) if channels == 1 else (count, self.edge, self.edge, channels)
        try:
            return np.memmap(path, dtype, "r", shape=shape)
        except OSError as error:
            raise DataError(
                f"The image cache cannot be mapped ({error.strerror}). Raise the limit of open files (ulimit -n)."
            ) from error

    def grey(self, part: int, layout: int, slot: int) -> Shaped[np.ndarray, "edge edge"]:
        """Read one record as plain grey numbers, for comparisons of shape only."""
        values = self.read(part, layout, slot).astype(np.float32)
        return values.mean(-1) if values.ndim == 3 else values
