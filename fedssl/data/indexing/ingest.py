"""From files to the journal: what is new or changed is decoded on all cores, the rest is left alone."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedssl import progress
from fedssl.data.decoding.image import VOLUME_SUFFIXES
from fedssl.data.decoding.workers import Answer, Question, decode_all
from fedssl.data.indexing import journal
from fedssl.data.indexing.journal import Dead, Known, PartWriter
from fedssl.data.indexing.scan import Found, scan
from fedssl.data.indexing.walk import order_of
from fedssl.data.pseudonym import pseudonym, public_hash

_NOTICE_EVERY_S = 0.5


@dataclass(frozen=True)
class Decoding:
    """How files are decoded.

    Attributes:
        edge: pixels on a side of the records.
        burned_in: policy for images that may show text, see ``fedssl.data.decoding.burned_in``.
        workers: processes; 0 takes all cores.
        memory_gb: address space of each.
        timeout_s: longest time for one file.
    """

    edge: int
    burned_in: str = "refuse"
    workers: int = 0
    memory_gb: float = 8.0
    timeout_s: float = 60.0

    @property
    def limits(self) -> str:
        """What a file may take, in words; where it failed for that, other limits are a reason to try again."""
        return f"{self.memory_gb:g} GB, {self.timeout_s:g} s"

    @property
    def processes(self) -> int:
        """Processes to start."""
        return self.workers or len(os.sched_getaffinity(0))


def ingest(
    root: Path,
    folder: Path,
    secret: bytes,
    decoding: Decoding,
    *,
    site: str,
    manifest: Mapping[str, Any] | None,
    make_room: Callable[[int], None],
) -> Dead:
    """Bring the journal up to date with the files.

    Args:
        root: the folder of the images.
        folder: of the journal.
        secret: the site's key for pseudonyms.
        decoding: how to decode.
        site: name of the one site that owns the folder, or empty.
        manifest: see ``fedssl.data.indexing.scan.scan``.
        make_room: is told the bytes of each part before it is written.

    Returns:
        The dead files of each part.

    Raises:
        DataError: the root cannot be read.
        StorageError: the disk is full.
    """
    dead = journal.empty_dead()
    seen = _Seen(root, len(manifest) if manifest is not None else None)
    writer = PartWriter(folder, journal.next_run(folder), decoding.edge, make_room)
    questions = _changed(scan(root, site, manifest), journal.known_files(folder, dead), dead, decoding.limits, seen)
    try:
        for answer in decode_all(
            questions, count=decoding.processes, edge=decoding.edge, burned_in=decoding.burned_in,
            memory_gb=decoding.memory_gb, timeout_s=decoding.timeout_s,
        ):  # fmt: skip
            writer.add(*_rows_of(answer, secret, decoding))
            seen.tell()
    finally:
        seen.stop()
    writer.commit()
    seen.tell(last=True)
    return dead


def _changed(
    found: Iterator[Found], known: Iterator[Known], dead: Dead, limits: str, seen: "_Seen"
) -> Iterator[Question]:
    """Walk through files and journal side by side; ask for what is new or changed, bury what is gone or changed."""
    entry = next(known, None)
    for item in found:
        key = order_of(item.entry.file)
        seen.scanned += 1
        seen.tell()
        while entry is not None and entry.key < key:
            dead[entry.part].add(entry.ordinal)
            entry = next(known, None)
        if entry is not None and entry.key == key:
            same = entry.facts == (item.entry.bytes, item.entry.modified_ns, item.site, item.modality)
            same = same and not entry.again and entry.limits in ("", limits)
            if not same:
                dead[entry.part].add(entry.ordinal)
            entry = next(known, None)
            if same:
                continue
        yield Question(_request(item), item)
    while entry is not None:
        dead[entry.part].add(entry.ordinal)
        entry = next(known, None)


def _request(item: Found) -> dict[str, Any]:
    entry = item.entry
    return {
        "path": os.fspath(item.path), "modality": item.modality, "trouble": entry.trouble,
        "bytes": entry.bytes, "modified_ns": entry.modified_ns,
    }  # fmt: skip


def _rows_of(answer: Answer, secret: bytes, decoding: Decoding) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """Turn an answer into a row for the file, one for each image, and their pixels.

    An answer that makes no sense (from a decoder whose memory was overwritten) counts as a crash.
    """
    item: Found = answer.tag
    found = answer.found
    file = {
        "file": item.entry.file, "bytes": item.entry.bytes, "modified_ns": item.entry.modified_ns, "site": item.site,
        "kind": found["kind"], "reason": str(found.get("reason", "")), "again": bool(found.get("again", False)),
        "limits": decoding.limits if found.get("limited") else "", "risk": "",
        "stated": item.modality,
    }  # fmt: skip
    if found["kind"] != "image":
        return file, [], b""
    try:
        rows = _image_rows(item, found["facts"], found["records"], secret)
        expected = sum(journal.record_bytes(row["layout"], decoding.edge) for row in rows)
        if expected != len(answer.pixels):
            raise ValueError(expected)
    except (AttributeError, LookupError, TypeError, ValueError):
        return {**file, "kind": "unreadable", "reason": "crashed its decoder (its answer makes no sense)"}, [], b""
    return {**file, "risk": str(found["facts"]["risk"])}, rows, answer.pixels


def _image_rows(
    item: Found, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]], secret: bytes
) -> list[dict[str, Any]]:
    """One row an image; identities become pseudonyms here."""
    patient, site = facts["patient"], item.site
    study = facts["study"] or f"{site}/{patient or item.folder or item.entry.file}"
    volume = item.entry.file.lower().endswith(VOLUME_SUFFIXES) or not item.folder
    series = facts["series"] or f"{site}/{item.entry.file if volume else PurePosixPath(item.entry.file).parent}"
    shared = {
        "file": item.entry.file,
        "image": pseudonym(secret, "file", item.entry.file),
        "site": site,
        "patient": pseudonym(secret, "patient", site, patient) if patient else "",
        "shuffle": public_hash(site, patient) if patient else 0,
        "folder": pseudonym(secret, "patient", site, item.folder) if item.folder else "",
        "folder_shuffle": public_hash(site, item.folder) if item.folder else 0,
        "study": pseudonym(secret, "study", study),
        "series": pseudonym(secret, "series", series),
        "modality": facts["modality"],
        "scanner": facts["scanner"],
        "description": facts["description"],
        "instance": facts["instance"],
    }
    binary = ("digest", "hash", "hash_turned")
    return [
        {**record, **{name: bytes.fromhex(record[name]) for name in binary}, **shared, "frame": frame}
        for frame, record in enumerate(records)
    ]


class _Seen:
    """Counts files for the progress display; a second, quick walk tells the total while decoding has begun."""

    def __init__(self, root: Path, total: int | None) -> None:
        self.scanned = 0
        self.told = 0.0
        self.total = total or 0
        self.stopping = threading.Event()
        if total is None:
            threading.Thread(target=self._count, args=(root,), daemon=True, name="count-files").start()

    def _count(self, root: Path) -> None:
        total = 0
        for _, folders, files in os.walk(root, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            total += sum(not name.startswith(".") for name in files)
            if self.stopping.is_set():
                return
        self.total = total

    def tell(self, *, last: bool = False) -> None:
        """Publish progress every half second."""
        now = time.monotonic()
        if last or now - self.told >= _NOTICE_EVERY_S:
            self.told = now
            counted = self.total > self.scanned
            total = self.scanned if last else self.total if counted else self.scanned + 1
            progress.publish(progress.Done("indexing files", self.scanned, total, growing=not (counted or last)))

    def stop(self) -> None:
        """End the counting walk."""
        self.stopping.set()
