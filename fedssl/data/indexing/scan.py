"""Which files there are and whose they are, by folder or by manifest, before any is opened."""

import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedssl.data.indexing.walk import Entry, order_of, walk
from fedssl.errors import DataError

_TEXT = ("image", "file", "patient_id", "site", "study_id", "series_id", "modality", "scanner", "label")
_MANIFEST_COLUMNS = ("image", "patient_id")


@dataclass(frozen=True, slots=True)
class Found:
    """A file and what the folder or the manifest says of it, before it is opened.

    ``folder`` is the patient's folder (empty: none), ``modality`` what the manifest says.
    """

    entry: Entry
    path: Path
    site: str
    folder: str
    modality: str


def scan(root: Path, site: str, manifest: Mapping[str, Mapping[str, str]] | None) -> Iterator[Found]:
    """Give every file of a folder or a manifest, sorted by ``walk.order_of``.

    Args:
        root: a folder, or the folder of the manifest.
        site: name of the one site that owns it, or empty.
        manifest: facts by file, see ``read_manifest``; None walks through the folder.

    Raises:
        DataError: there is no such folder.
    """
    if manifest is not None:
        yield from _from_manifest(root, site, manifest)
        return
    for entry in walk(root):
        parts = entry.file.split("/")
        owner, *below = (site, *parts) if site else parts if len(parts) > 1 else ("site", *parts)
        yield Found(entry, root / entry.file, owner, below[0] if len(below) > 1 else "", "")


def _from_manifest(base: Path, site: str, manifest: Mapping[str, Mapping[str, str]]) -> Iterator[Found]:
    for file in sorted(manifest, key=order_of):
        given = manifest[file]
        path = base / file
        try:
            status = path.stat()
            entry = Entry(file, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            entry = Entry(file, 0, 0, "is missing" if missing else "is unreachable")
        yield Found(entry, path, site or given.get("site") or "site", "", given.get("modality", "").strip().upper())


def read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Read a manifest: facts by file.

    Raises:
        DataError: a column or an image path is missing, or an image is listed twice.
    """
    table = read_table(path)
    missing = [name for name in _MANIFEST_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(
            f"The manifest lacks the column {' and '.join(missing)}; {known_columns(table, _TEXT)}. "
            "It needs image (a path beside the manifest) and patient_id."
        )
    empty = pc.or_(pc.is_null(table["image"]), pc.equal(table["image"], ""))
    if pc.any(empty).as_py():
        row = pc.index(empty, value=True).as_py()
        raise DataError(f"Row {row + 1} of the manifest has no image path. Fill or remove it.")
    facts = {}
    for batch in table.to_batches(max_chunksize=10_000):
        for record in batch.to_pylist():
            given = {key: "" if value is None else str(value) for key, value in record.items()}
            facts[tidy(given.pop("image"))] = given
    repeated = table.num_rows - len(facts)
    if repeated:
        raise DataError(f"The manifest lists {repeated} images more than once. Keep one row for each image.")
    return facts


def tidy(file: str) -> str:
    """Write a path below the root in one way: no ``./``, no doubled or final slash."""
    return posixpath.normpath(file)


def known_columns(table: pa.Table, known: Collection[str]) -> str:
    """Say what a table has; the names of unknown columns may be a first row, and that may be a patient."""
    names = sorted(set(known) & set(table.column_names))
    others = table.num_columns - len(names)
    shown = (
        f"it has {table.num_columns} columns, known ones: {', '.join(names) or 'none (is the header line missing?)'}"
    )
    hidden = "1 other column is" if others == 1 else f"{others} other columns are"
    return f"{shown}; {hidden} not shown here (a name in it may be a patient's)" if others else shown


def read_table(path: Path, text: Sequence[str] = ()) -> pa.Table:
    """Read a CSV or Parquet table.

    Args:
        path: of the table.
        text: columns of a CSV that are text though they look like numbers, beside names, patients and sites.

    Raises:
        DataError: the file is missing or is no table.
    """
    if not path.exists():
        raise DataError(f"The table {path.name} cannot be read: There is no such file. Check the path.")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        as_text = dict.fromkeys((*_TEXT, *text), pa.string())  # 007 is not 7, and NA may be a name
        return pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(column_types=as_text))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"The table of labels or images cannot be read ({type(error).__name__}). Give CSV in UTF-8 with a header "
            "line, or Parquet."
        ) from error
