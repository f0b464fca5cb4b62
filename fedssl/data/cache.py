"""Images decoded once into one memory-mapped file that all processes of a site share."""

import itertools
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt16

from fedssl import progress
from fedssl.data import image
from fedssl.data.index import build_index, fingerprint_index, reason_of, usable
from fedssl.data.pseudonym import site_secret
from fedssl.errors import DataError
from fedssl.storage import atomic_file, exclusive, write_json

_DECODERS = ("pydicom", "pillow", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle")


@dataclass(frozen=True)
class ImageStore:
    """A site's readable images: row i of ``table`` describes ``pixels[i]``.

    ``pixels`` is [images, edge, edge], 16-bit grey, memory-mapped and read-only.
    """

    table: pa.Table
    pixels: UInt16[np.ndarray, "images edge edge"]

    def __len__(self) -> int:
        """Count the images."""
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """Return one column of the index as an array."""
        return np.asarray(self.table[name].to_pylist())


def open_store(
    root: Path, folder: Path, *, edge: int, patient_from: str = "auto", site: str = "", rescan: bool = False
) -> ImageStore:
    """Index and decode what is below ``root`` on first use, then map the result; later calls only map it.

    Args:
        root: the site's images (see ``build_index``).
        folder: where index and cache live; it stays on the site.
        edge: pixels on a side.
        patient_from: see ``build_index``.
        site: see ``build_index``.
        rescan: look for new and changed files again.

    Raises:
        DataError: no readable image.
        StorageError: the disk is full.
    """
    current = folder / f"current-{edge}-{patient_from}.json"
    with exclusive(folder / ".lock"):
        if rescan or not current.exists():
            key = _refresh(root, folder, edge, patient_from, site)
            write_json(current, {"key": key}, "the index")
        key = json.loads(current.read_text())["key"]
    return load_store(folder / f"index-{key}.parquet", folder / f"pixels-{key}.npy")


def _refresh(root: Path, folder: Path, edge: int, patient_from: str, site: str) -> str:
    table = build_index(root, site_secret(folder), patient_from=patient_from, site=site)
    key = fingerprint_index(table, f"edge={edge}", patient_from, *_decoders())
    index_path, pixel_path = folder / f"index-{key}.parquet", folder / f"pixels-{key}.npy"
    if not (index_path.exists() and pixel_path.exists()):
        table = _decode(root, table, pixel_path, edge)
        with atomic_file(index_path, "the index") as stream:
            pq.write_table(table, stream)
    return key


def _decoders() -> list[str]:
    """Versions of what decodes: another codec may read what could not be read before."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    return [f"{name}={installed.get(name, '')}" for name in _DECODERS]


def read_index(folder: Path, *, edge: int, patient_from: str = "auto") -> pa.Table:
    """Read the whole index of an opened store, unreadable files included."""
    current = json.loads((folder / f"current-{edge}-{patient_from}.json").read_text())
    return pq.read_table(folder / f"index-{current['key']}.parquet")


def load_store(index_path: Path, pixel_path: Path) -> ImageStore:
    """Map a finished cache.

    Raises:
        DataError: the two files do not belong together.
    """
    if not (index_path.exists() and pixel_path.exists()):
        raise DataError("The image cache was removed in part. Delete the store's folder and run the command again.")
    table = usable(pq.read_table(index_path))
    pixels = np.load(pixel_path, mmap_mode="r")
    if len(pixels) != table.num_rows:
        raise DataError("The image cache does not fit its index. Delete the store's folder and run the command again.")
    return ImageStore(table, pixels)


def _decode(root: Path, table: pa.Table, pixel_path: Path, edge: int) -> pa.Table:
    """Decode every file once, in the table's order. Files that fail become rows with a reason.

    The row count is known only at the end, so the header is written last over a block of the same length.
    """
    base = root.parent if root.is_file() else root
    reasons = table["reason"].to_pylist()
    rows = list(zip(table["file"].to_pylist(), table["frame"].to_pylist(), strict=True))
    kept = 0
    with atomic_file(pixel_path, "the image cache") as stream:
        _write_header(stream, len(rows), edge)
        for file, group in itertools.groupby(range(len(rows)), key=lambda number: rows[number][0]):
            numbers = [number for number in group if not reasons[number]]
            squares, reason = _decode_file(base / file, edge) if numbers else ([], "")
            if numbers and not reason and len(squares) != len(numbers):
                squares, reason = [], f"holds {len(squares)} frames where its header says {len(numbers)}"
            for number in numbers:
                reasons[number] = reason
            for square in squares:
                stream.write(square.tobytes())
            kept += len(squares)
            progress.publish(progress.Done("decoding images", numbers[-1] + 1 if numbers else kept, len(rows)))
        stream.seek(0)
        _write_header(stream, kept, edge)
    return table.set_column(table.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))


def _decode_file(path: Path, edge: int) -> tuple[list[UInt16[np.ndarray, "edge edge"]], str]:
    try:
        return [image.fit_square(frame, edge) for frame in image.read_frames(path)], ""
    except Exception as error:  # noqa: BLE001 - decoders raise anything; one bad file never stops the rest
        return [], reason_of(error)


def _write_header(stream: object, count: int, edge: int) -> None:
    """Write a .npy header; its length does not depend on ``count`` (numpy pads it to a multiple of 64 bytes)."""
    header = {"descr": "<u2", "fortran_order": False, "shape": (count, edge, edge)}
    np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]


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

    def read(self, positions: np.ndarray) -> UInt16[np.ndarray, "batch edge edge"]:
        """Copy images out of the map by their position in this subset."""
        return self.store.pixels[self.rows[positions]]
