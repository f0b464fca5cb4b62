"""Which image files there are, by folder or by manifest, before any is opened."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedssl.data import dicom, image
from fedssl.errors import DataError

UNKNOWN_PATIENT = ""
_MANIFEST_COLUMNS = ("image", "patient_id")


@dataclass(frozen=True)
class Found:
    """A file and what the folder or the manifest says of it, before it is opened."""

    path: Path
    file: str
    site: str
    patient: str
    given: dict[str, str]


def scan(root: Path, site: str) -> Iterator[Found]:
    """Give every image file of a folder or a manifest in a fixed order.

    Args:
        root: a folder or a manifest file.
        site: name of the one site that owns it, or empty.

    Raises:
        DataError: there is no such folder or file, or the manifest is unusable.
    """
    return _from_manifest(root, site) if root.is_file() else _from_folder(root, site)


def _from_folder(root: Path, site: str) -> Iterator[Found]:
    if not root.is_dir():
        raise DataError("data.root is neither a folder nor a manifest file. Check data.root=FOLDER.")
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
        parts = path.relative_to(root).parts
        if path.suffix.lower() not in image.RASTER_SUFFIXES and not _looks_like_dicom(path):
            continue
        owner, *below = (site, *parts) if site else parts if len(parts) > 1 else ("site", *parts)
        yield Found(path, "/".join(parts), owner, below[0] if len(below) > 1 else UNKNOWN_PATIENT, {})


def _looks_like_dicom(path: Path) -> bool:
    """Files ending in .dcm are always taken, so that a damaged one is reported; others by their preamble."""
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    try:
        return dicom.is_dicom(path)
    except OSError:
        return False


def _from_manifest(path: Path, site: str) -> Iterator[Found]:
    table = read_table(path)
    missing = [name for name in _MANIFEST_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(
            f"The manifest lacks the column {' and '.join(missing)}; it has {', '.join(table.column_names)}. "
            "It needs image (a path beside the manifest) and patient_id."
        )
    repeated = [name for name, count in Counter(table["image"].to_pylist()).items() if count > 1]
    if repeated:
        raise DataError(f"The manifest lists {len(repeated)} images more than once. Keep one row for each image.")
    for number, record in enumerate(table.to_pylist()):
        if record["image"] is None:
            raise DataError(f"Row {number + 1} of the manifest has no image path. Fill or remove it.")
        given = {key: "" if value is None else str(value) for key, value in record.items()}
        owner = site or given.get("site") or "site"
        yield Found(path.parent / given["image"], given["image"], owner, given["patient_id"], given)


def read_table(path: Path) -> pa.Table:
    """Read a CSV or Parquet table.

    Raises:
        DataError: the file is missing or is no table.
    """
    try:
        return pq.read_table(path) if path.suffix == ".parquet" else pacsv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"The table {path.name} cannot be read ({type(error).__name__}). Give CSV with a header line, or Parquet."
        ) from error
