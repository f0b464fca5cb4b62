"""What a site has: one Parquet row an image, with pseudonyms in place of patients. It never leaves the site.

Layouts understood: ``root/<site>/<patient>/.../file`` (DICOM or PNG, JPEG, TIFF) and a manifest (CSV or Parquet) with
the columns ``image`` and ``patient_id`` and, if given, ``study_id series_id modality label site scanner``.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedssl import progress
from fedssl.data import dicom, image
from fedssl.data.pseudonym import pseudonym, public_hash
from fedssl.errors import DataError

UNKNOWN_PATIENT = ""
_MANIFEST_COLUMNS = ("image", "patient_id")


@dataclass(frozen=True)
class Row:
    """One image (one frame of one file), or one unreadable file with its ``reason``.

    ``patient``, ``study`` and ``series`` are pseudonyms. ``shuffle`` is a 16-bit hash of the patient that gives splits
    the same outcome on every machine; 16 bits are too few to name anybody.
    """

    file: str
    frame: int
    site: str
    patient: str
    study: str
    series: str
    modality: str
    scanner: str
    instance: int
    rows: int
    columns: int
    bytes: int
    modified_ns: int
    label: str
    shuffle: int
    reason: str


@dataclass(frozen=True)
class _Found:
    """A file and what the folder or the manifest says of it, before it is opened."""

    path: Path
    file: str
    site: str
    patient: str
    given: dict[str, str]


def build_index(root: Path, secret: bytes, *, patient_from: str = "auto") -> pa.Table:
    """Open the header of every image below ``root`` (or in the manifest ``root``).

    Args:
        root: a folder ``<site>/<patient>/...`` or a manifest file.
        secret: the site's key for pseudonyms (see ``fedssl.data.pseudonym``).
        patient_from: ``auto`` (PatientID, else manifest, else folder) or ``file`` (each file is its own patient).

    Returns:
        One row an image, in the order of the file names; unreadable files are rows with a ``reason``.

    Raises:
        DataError: nothing was found, or no patient is known for some images.
    """
    found = list(_from_manifest(root) if root.is_file() else _from_folder(root))
    if not found:
        raise DataError(
            "No image was found. fedssl looks for DICOM, PNG, JPEG and TIFF below data.root, one folder a site and one "
            "a patient. Check data.root."
        )
    rows: list[Row] = []
    for number, item in enumerate(found):
        rows.extend(_rows_of(item, secret, patient_from))
        if number % 200 == 0 or number == len(found) - 1:
            progress.publish(progress.Done("reading headers", number + 1, len(found)))
    _refuse_unknown_patients(rows)
    return pa.Table.from_pylist([asdict(row) for row in rows])


def _from_folder(root: Path) -> Iterator[_Found]:
    if not root.is_dir():
        raise DataError("data.root is neither a folder nor a manifest file. Check data.root=FOLDER.")
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
        parts = path.relative_to(root).parts
        if path.suffix.lower() not in image.RASTER_SUFFIXES and not _looks_like_dicom(path):
            continue
        site = parts[0] if len(parts) > 1 else "site"
        patient = parts[1] if len(parts) > 2 else UNKNOWN_PATIENT
        yield _Found(path, "/".join(parts), site, patient, {})


def _looks_like_dicom(path: Path) -> bool:
    """Files ending in .dcm are always taken, so that a damaged one is reported; others by their preamble."""
    if path.suffix.lower() in {".dcm", ".dicom"}:
        return True
    try:
        return path.suffix == "" and dicom.is_dicom(path)
    except OSError:
        return False


def _from_manifest(path: Path) -> Iterator[_Found]:
    table = read_table(path)
    missing = [name for name in _MANIFEST_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(
            f"The manifest lacks the column {' and '.join(missing)}; it has {', '.join(table.column_names)}. "
            "It needs image (a path beside the manifest) and patient_id."
        )
    for number, record in enumerate(table.to_pylist()):
        if record["image"] is None:
            raise DataError(f"Row {number + 1} of the manifest has no image path. Fill or remove it.")
        given = {key: "" if value is None else str(value) for key, value in record.items()}
        yield _Found(
            path.parent / given["image"], given["image"], given.get("site") or "site", given["patient_id"], given
        )


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


def _rows_of(item: _Found, secret: bytes, patient_from: str) -> list[Row]:
    row = Row(
        file=item.file, frame=0, site=item.site, patient="", study="", series="",
        modality=item.given.get("modality", ""), scanner=item.given.get("scanner", ""),
        instance=0, rows=0, columns=0, bytes=0, modified_ns=0,
        label=item.given.get("label", ""), shuffle=0, reason="",
    )  # fmt: skip
    try:
        status = item.path.stat()
        row = replace(row, bytes=status.st_size, modified_ns=status.st_mtime_ns)
        if status.st_size == 0:
            raise ValueError("is empty (0 bytes)")
        header = _header(item)
    except Exception as error:  # noqa: BLE001 - decoders raise anything; one bad file never stops the rest
        return [replace(row, reason=reason_of(error))]
    patient = item.file if patient_from == "file" else header.patient or item.patient
    if not patient:
        return [replace(row, rows=header.rows, columns=header.columns)]
    row = replace(
        row,
        patient=pseudonym(secret, "patient", item.site, patient),
        study=pseudonym(secret, "study", header.study or f"{item.site}/{patient}"),
        series=pseudonym(secret, "series", header.series or f"{item.site}/{patient}"),
        modality=row.modality or header.modality,
        scanner=row.scanner or header.scanner,
        instance=header.instance,
        rows=header.rows,
        columns=header.columns,
        shuffle=public_hash(item.site, patient),
    )
    return [replace(row, frame=frame) for frame in range(header.frames)]


def _header(item: _Found) -> dicom.Header:
    if dicom.is_dicom(item.path):
        return dicom.read_header(item.path)
    if item.path.suffix.lower() in {".dcm", ".dicom"}:
        raise ValueError("is no DICOM file (the DICM mark is missing)")
    frames, rows, columns = image.read_raster_size(item.path)
    return dicom.Header(
        "", item.given.get("study_id", ""), item.given.get("series_id", ""), "unknown", "", 0, frames, rows, columns
    )


def reason_of(error: Exception) -> str:
    """Say why a file cannot be read, without its path or content."""
    if isinstance(error, ValueError) and str(error).startswith(("is ", "holds ")):
        return str(error)
    kind = type(error).__name__
    return f"cannot be decoded ({kind})" if kind != "FileNotFoundError" else "is missing"


def _refuse_unknown_patients(rows: list[Row]) -> None:
    readable = [row for row in rows if not row.reason]
    if not readable:
        counts = Counter(row.reason for row in rows).most_common(3)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in counts)
        raise DataError(f"None of the {len(rows)} files could be read: {reasons}. Check the files or the export.")
    nameless = sum(row.patient == UNKNOWN_PATIENT for row in readable)
    if nameless:
        raise DataError(
            f"No patient is known for {nameless} of {len(readable)} images: splits by patient are impossible. Put "
            "the files in <site>/<patient>/ folders, give a manifest with patient_id, or, if each file truly is a new "
            "patient, say data.patient_from=file."
        )


def usable(table: pa.Table) -> pa.Table:
    """Keep the rows whose image can be read."""
    return table.filter(pa.compute.equal(table["reason"], ""))


def summarise(table: pa.Table) -> list[dict[str, str | int]]:
    """Count patients, images, unreadable files and modalities by site: the page of ``fedssl index``."""
    lines = []
    for site in sorted(set(table["site"].to_pylist())):
        rows = table.filter(pa.compute.equal(table["site"], site))
        good = usable(rows)
        lines.append(
            {
                "site": site,
                "patients": len(set(good["patient"].to_pylist())),
                "images": good.num_rows,
                "unreadable": rows.num_rows - good.num_rows,
                "modalities": ", ".join(sorted(set(good["modality"].to_pylist()))),
            }
        )
    return lines


def unreadable_reasons(table: pa.Table) -> dict[str, int]:
    """Count the files that could not be read by reason."""
    return dict(Counter(reason for reason in table["reason"].to_pylist() if reason))


def fingerprint_files(table: pa.Table, *extra: str) -> str:
    """Hash what decides a cache's content: files, frames, sizes, times and the decoding settings."""
    digest = hashlib.sha256()
    columns: Iterable[list[object]] = [table[name].to_pylist() for name in ("file", "frame", "bytes", "modified_ns")]
    for values in zip(*columns, strict=True):
        digest.update(repr(values).encode())
    digest.update("|".join(extra).encode())
    return digest.hexdigest()[:16]
