"""What was found at a site, in numbers: the page of ``fedssl index``."""

import statistics
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from fedssl.data.indexing.duplicates import Duplicates
from fedssl.errors import DataError

NO_PATIENT = "belongs to no known patient (no manifest row, PatientID or folder)"
_FEW_SITES = 2
_SUFFIXES = {  # others are not shown: the last part of a name can be a patient's
    ".bmp", ".csv", ".gif", ".gz", ".hdr", ".html", ".img", ".json", ".log", ".md", ".mha", ".mhd", ".mp4", ".ndpi",
    ".nrrd", ".parquet", ".pdf", ".raw", ".rar", ".svs", ".tar", ".txt", ".xlsx", ".xml", ".yaml", ".zip",
}  # fmt: skip


class Summary:
    """Counts that are added up partition by partition and file by file."""

    def __init__(self) -> None:
        self.sites: dict[str, Counter[str]] = defaultdict(Counter)
        self.modalities: dict[str, set[str]] = defaultdict(set)
        self.flags: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.risks: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()
        self.duplicates: dict[str, int] = {}

    def add_images(self, table: pa.Table) -> None:
        """Count a partition; no patient, study or series is in two of them."""
        sites = table["site"]
        for site in sites.unique().to_pylist():
            rows = table.filter(pa.compute.equal(sites, site))
            counts = self.sites[site]
            counts["images"] += rows.num_rows
            for name, column in (("patients", "patient"), ("studies", "study"), ("series", "series")):
                counts[name] += len(rows[column].unique())
            self.modalities[site].update(rows["modality"].unique().to_pylist())
        for flags in table["flags"].to_pylist():
            self.flags.update(flags.split())

    def add_duplicates(self, found: Duplicates, patients: np.ndarray) -> None:
        """Count duplicate pairs; ``patients`` numbers the patient of each row."""
        pairs = found.every()
        across = int((patients[pairs[:, 0]] != patients[pairs[:, 1]]).sum()) if len(pairs) else 0
        self.duplicates = {
            "exact": len(found.exact), "near": len(found.near), "turned": len(found.turned), "across_patients": across,
        }  # fmt: skip

    def add_file(self, file: dict[str, Any]) -> None:
        """Count a file by what became of it."""
        if file["kind"] == "foreign":
            suffix = PurePosixPath(file["file"]).suffix.lower()
            self.foreign[suffix if suffix in _SUFFIXES else "(other)"] += 1
            return
        counts = self.sites[file["site"]]
        counts["files"] += 1
        if file["kind"] == "unreadable":
            counts["unreadable"] += 1
            self.reasons[file["reason"]] += 1
        if file["risk"]:
            self.risks[file["risk"]] += 1

    def refuse_unusable(self) -> None:
        """Refuse an index that nothing can be trained on.

        Raises:
            DataError: no image was found or read, patients are unknown, or patients were taken for sites.
        """
        images, files = (sum(counts[name] for counts in self.sites.values()) for name in ("images", "files"))
        if not files:
            raise DataError(
                f"No image was found{self._others()}. fedssl looks for DICOM, NIfTI, PNG, JPEG and TIFF below "
                "data.root, one folder a site and one a patient. Check data.root."
            )
        nameless = self.reasons[NO_PATIENT]
        if not images and nameless:
            raise DataError(
                f"No patient is known for {nameless} of {files} files, and no other can be used: splits by patient "
                "are impossible. Put the files in <site>/<patient>/ folders, give a manifest with patient_id, or, if "
                "each file truly is a new patient, say data.patient_from=file."
            )
        if not images:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(3))
            raise DataError(f"None of the {files} files could be read: {reasons}. Check the files or the export.")
        patients = [counts["patients"] for counts in self.sites.values() if counts["images"]]
        if len(patients) > _FEW_SITES and statistics.median(patients) == 1:
            raise DataError(
                f"Most of the {len(patients)} folders below data.root hold a single patient: they look like patients, "
                "not sites. Put them below one folder a site, give a manifest with image, patient_id and site, or say "
                "whose they all are (fedssl index --site NAME). If they are sites, their files hold one PatientID for "
                "everybody: give a manifest."
            )

    def _others(self) -> str:
        found = ", ".join(f"{count} {suffix}" for suffix, count in self.foreign.most_common(3))
        return f", but other files ({found})" if found else ""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        names = ("patients", "studies", "series", "files", "images", "unreadable")
        sites = [
            {
                "site": site,
                **{name: counts[name] for name in names},
                "modalities": ", ".join(sorted(self.modalities[site])),
            }
            for site, counts in sorted(self.sites.items())
        ]
        return {
            "sites": sites,
            "unreadable": dict(self.reasons.most_common()),
            "text_risk_let_through": dict(self.risks.most_common()),
            "flags": dict(self.flags.most_common()),
            "duplicate_images": self.duplicates,
            "other_files": dict(self.foreign.most_common()),
        }
