"""What a site has: one Parquet row an image, with pseudonyms in place of patients. It never leaves the site.

Layouts understood: ``root/<site>/<patient>/.../file`` (DICOM or PNG, JPEG, TIFF) and a manifest (CSV or Parquet) with
the columns ``image`` and ``patient_id`` and, if given, ``study_id series_id modality label site scanner``.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from fedssl import progress
from fedssl.data import dicom, image
from fedssl.data.pseudonym import pseudonym, public_hash
from fedssl.data.scan import UNKNOWN_PATIENT, Found, scan
from fedssl.errors import DataError

_FEW_SITES = 2


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


def build_index(root: Path, secret: bytes, *, patient_from: str = "auto", site: str = "") -> pa.Table:
    """Open the header of every image below ``root`` (or in the manifest ``root``).

    Args:
        root: a folder ``<site>/<patient>/...`` or a manifest file.
        secret: the site's key for pseudonyms (see ``fedssl.data.pseudonym``).
        patient_from: ``auto`` (manifest, else PatientID, else folder) or ``file`` (each file is its own patient).
        site: name of the one site that owns the folder; its layout is then ``root/<patient>/.../file``.

    Returns:
        One row an image, in the order of the file names; unreadable files are rows with a ``reason``.

    Raises:
        DataError: nothing was found, or no patient is known for some images.
    """
    found = list(scan(root, site))
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


def _rows_of(item: Found, secret: bytes, patient_from: str) -> list[Row]:
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
        if not 0 < header.frames <= status.st_size:
            raise ValueError(f"is said to hold {header.frames} frames")
    except Exception as error:  # noqa: BLE001 - decoders raise anything; one bad file never stops the rest
        return [replace(row, reason=reason_of(error))]
    patient = item.file if patient_from == "file" else item.given.get("patient_id") or header.patient or item.patient
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


def _header(item: Found) -> dicom.Header:
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
    _refuse_patients_as_sites(readable)


def _refuse_patients_as_sites(readable: list[Row]) -> None:
    """Catch the folder ``root/<patient>/file``, whose patients would be taken for sites and named in every report."""
    patients_of: dict[str, set[str]] = {}
    for row in readable:
        patients_of.setdefault(row.site, set()).add(row.patient)
    if len(patients_of) > _FEW_SITES and all(len(patients) == 1 for patients in patients_of.values()):
        raise DataError(
            f"Each of the {len(patients_of)} folders below data.root holds a single patient: they look like patients, "
            "not sites. Put them below one folder a site, or give a manifest with image, patient_id and site."
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


def fingerprint_index(table: pa.Table, *extra: str) -> str:
    """Hash what decides the content of a store: every column of the index and the decoding settings."""
    digest = hashlib.sha256()
    for row in table.to_pylist():
        digest.update(repr(sorted(row.items())).encode())
    digest.update("|".join(extra).encode())
    return digest.hexdigest()[:16]
