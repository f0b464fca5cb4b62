"""The site's folder for its images: secret, journals of decoded pixels by their settings, current indexes."""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from fedssl import progress
from fedssl.data.cache import ImageStore
from fedssl.data.index import Index
from fedssl.data.indexing import journal
from fedssl.data.indexing.identity import Identities
from fedssl.data.indexing.ingest import Decoding, ingest
from fedssl.data.indexing.journal import Dead
from fedssl.data.indexing.scan import read_manifest
from fedssl.data.indexing.snapshot import build_snapshot
from fedssl.data.pseudonym import site_secret
from fedssl.data.shards import Shards
from fedssl.errors import DataError, StorageError
from fedssl.storage import exclusive, write_json

_FORMAT = 6  # raise it when what a record or a row holds changes: old caches are then built again
_DECODERS = (
    "nibabel", "pillow", "pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle",
    "python-gdcm",
)  # fmt: skip
_GB = 1e9


@dataclass(frozen=True)
class Source:
    """Whose images are where.

    Attributes:
        root: a folder ``<site>/<patient>/...`` or a manifest file (CSV, Parquet).
        site: name of the one site that owns all of it (the layout is then ``<patient>/...``), or empty.
        patient_from: ``auto`` (manifest, else PatientID, else folder) or ``file`` (each file is its own patient).
    """

    root: Path
    site: str = ""
    patient_from: str = "auto"


class Store:
    """Images of one source, decoded with one set of settings.

    Args:
        folder: where secret, journals and indexes live; it stays on the site.
        source: the images.
        decoding: how they are decoded.
        budget_gb: most that all journals of this folder may take; None: no limit.
    """

    def __init__(self, folder: Path, source: Source, decoding: Decoding, budget_gb: float | None = None) -> None:
        self.folder = folder
        self.source = source
        self.decoding = decoding
        self.budget_gb = budget_gb
        settings = {"format": _FORMAT, "edge": decoding.edge, "burned_in": decoding.burned_in, "site": source.site}
        self.settings = settings | {"decoders": _decoder_versions()}
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        self.journal = folder / f"pixels-{decoding.edge}-{key}"
        self.pointer = self.journal / f"current-{source.patient_from}.json"

    def open(self, *, channels: int = 1, rescan: bool = False, verify: bool = False) -> ImageStore:
        """Map the images; index and decode what is new on the first call, and on later ones if ``rescan``.

        Args:
            channels: of the images that are handed out, 1 or 3.
            rescan: look for new, changed and removed files.
            verify: compare all pixels with their checksums first and decode damaged ones again.

        Raises:
            DataError: there is no usable image.
            StorageError: the disk is full, or the budget is spent.
        """
        with exclusive(self.folder / ".lock"):
            if verify:
                self._drop_damaged()
            if rescan or verify or not self.pointer.exists():
                self._refresh()
            index, in_use = Index(self.snapshot()), _shared_lock(self.journal)
        if not index.paths:
            raise DataError("The index was removed in part. Run fedssl index again.")
        parts = json.loads((index.folder / "parts.json").read_text())
        shards = Shards(self.journal, parts, self.decoding.edge)
        return ImageStore(index, shards, channels, site_secret(self.folder), in_use)

    def snapshot(self) -> Path:
        """Return the folder of the current index."""
        return self.journal / json.loads(self.pointer.read_text())["index"]

    def summary(self) -> dict[str, Any]:
        """Return what was found, see ``fedssl.data.indexing.summary``."""
        return json.loads((self.snapshot() / "summary.json").read_text())

    def _refresh(self) -> None:
        self.journal.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self.journal / "settings.json", self.settings, "the index")
        _sweep(self.journal, ".*.tmp")
        _sweep(self.folder, ".pixels-*.tmp")
        secret = site_secret(self.folder)
        root = self.source.root
        manifest = read_manifest(root) if root.is_file() else None
        dead = ingest(
            root if manifest is None else root.parent, self.journal, secret, self.decoding,
            site=self.source.site, manifest=manifest, make_room=self._make_room,
        )  # fmt: skip
        identities = Identities(secret, manifest, self.source.patient_from)
        name = f"index-{self.source.patient_from}-{self._inputs(dead, manifest)}"
        before = self.snapshot().name if self.pointer.exists() else ""
        if name == before and (self.journal / name).exists():
            return
        shutil.rmtree(self.journal / name, ignore_errors=True)
        build_snapshot(self.journal, self.journal / name, dead, identities, edge=self.decoding.edge)
        write_json(self.pointer, {"index": name}, "the index")
        self._forget(dead, keep={name, before})

    def _inputs(self, dead: Dead, manifest: Mapping[str, Any] | None) -> str:
        """Hash all that decides the content of an index."""
        names = journal.live_parts(self.journal, dead)
        content = {"parts": names, "dead": {name: sorted(dead[name]) for name in names if dead.get(name)}}
        return hashlib.sha256(json.dumps([content, manifest], sort_keys=True).encode()).hexdigest()[:12]

    def _forget(self, dead: Dead, keep: set[str]) -> None:
        """Remove indexes before the last one, and parts that neither of the last two indexes uses."""
        for path in self.journal.glob(f"index-{self.source.patient_from}-*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        used = {name for path in self.journal.glob("index-*/parts.json") for name in json.loads(path.read_text())}
        journal.drop_dead_parts(self.journal, dead, used)

    def _drop_damaged(self) -> None:
        damaged = journal.damaged_parts(self.journal)
        for name in damaged:
            journal.remove_part(self.journal, name)
        if damaged:
            text = f"{len(damaged)} parts of the image cache were damaged; their files are decoded again."
            progress.publish(progress.Note(text, alarm=True))

    def _make_room(self, needed: int) -> None:
        """Keep the budget: caches of other settings that nobody uses go first, the longest unused before the others."""
        if self.budget_gb is None:
            return
        sizes = {path: _size(path) for path in self.folder.glob("pixels-*")}
        others = sorted((path for path in sizes if path != self.journal), key=lambda path: path.stat().st_mtime)
        while sum(sizes.values()) + needed > self.budget_gb * _GB:
            victim = next((path for path in others if path in sizes and _unused(path)), None)
            if victim is None:
                raise StorageError(
                    f"The image cache has reached its budget of {self.budget_gb:g} GB. What was decoded is kept. Raise "
                    "data.budget_gb, or lower data.edge, and run the command again."
                )
            gone = victim.with_name(f".{victim.name}.tmp")  # a cache is there whole or not at all
            victim.rename(gone)
            shutil.rmtree(gone)
            del sizes[victim]


def _decoder_versions() -> dict[str, str]:
    """Versions of what decodes: another codec may read what could not be read before."""
    versions = {}
    for name in _DECODERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.bin"))


def _sweep(folder: Path, pattern: str) -> None:
    """Remove what a killed process left half-written or half-removed; the lock is held, so nobody else writes."""
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _shared_lock(folder: Path) -> BinaryIO:
    """Say that this process uses a cache, until the store is dropped."""
    stream = (folder / ".in-use").open("ab")
    fcntl.flock(stream, fcntl.LOCK_SH)
    return stream


def _unused(folder: Path) -> bool:
    with (folder / ".in-use").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
