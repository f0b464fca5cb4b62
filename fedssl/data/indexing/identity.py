"""Which patient an image belongs to: the manifest's word, else PatientID, else the folder; always as a pseudonym."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fedssl.data.pseudonym import pseudonym, public_hash

Identity = tuple[str, int]  # pseudonym and 16-bit public hash; an empty pseudonym: unknown


@dataclass
class Identities:
    """Resolves the patient of rows of the journal.

    Attributes:
        secret: the site's key.
        manifest: facts by file, or None.
        patient_from: ``auto``, or ``file`` (each file is its own patient).
    """

    secret: bytes
    manifest: Mapping[str, Mapping[str, str]] | None
    patient_from: str
    named: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    nameless: set[str] = field(default_factory=set)
    cache: dict[tuple[str, str], Identity] = field(default_factory=dict)

    def learn(self, rows: pa.Table) -> None:
        """Note which PatientIDs each patient folder holds, and whether it holds images without one."""
        for folder, patient, shuffle in _distinct(rows, ["folder", "patient", "shuffle"]):
            if folder and patient:
                self.named[folder][patient] = shuffle
            elif folder:
                self.nameless.add(folder)

    def linked(self) -> list[tuple[str, str]]:
        """Pairs of identities that may be one patient: a folder with several PatientIDs and images without one."""
        unclear = [folder for folder in self.nameless if len(self.named.get(folder, ())) > 1]
        return [(folder, patient) for folder in unclear for patient in self.named[folder]]

    def of(self, row: Mapping[str, Any]) -> Identity:
        """Identify the patient of one row of the journal."""
        if self.patient_from == "file":
            return self._made(row["site"], row["file"])
        if self.manifest is not None:
            given = self.manifest[row["file"]]["patient_id"]
            return self._made(row["site"], given) if given else (row["patient"], row["shuffle"])
        if row["patient"]:
            return row["patient"], row["shuffle"]
        inside = self.named.get(row["folder"], {})
        if len(inside) == 1:
            return next(iter(inside.items()))
        return row["folder"], row["folder_shuffle"]

    def _made(self, site: str, patient: str) -> Identity:
        key = (site, patient)
        if self.patient_from == "file":
            return pseudonym(self.secret, "patient", *key), public_hash(*key)
        if key not in self.cache:
            self.cache[key] = pseudonym(self.secret, "patient", *key), public_hash(*key)
        return self.cache[key]


def _distinct(rows: pa.Table, columns: list[str]) -> list[tuple[Any, ...]]:
    grouped = rows.select(columns).group_by(columns).aggregate([])
    return list(zip(*(grouped[name].to_pylist() for name in columns), strict=True))
