"""The egress manifest of a hospital: every message that left it, entered before it left.

An entry is on the disk before its message leaves, so the manifest may hold a message that a killed process no longer
sent, and never lacks one. It holds no tensor, only what each is: its shape, its size, its hash and its norm.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl import progress
from fedssl.errors import PolicyError
from fedssl.site.egress_file import WHAT, Walk, known_to, prepared, walk, write_anchor
from fedssl.site.egress_summary import summary
from fedssl.site.egress_tensors import TensorEntry, describe_counts, describe_state
from fedssl.site.ledger import folder_name
from fedssl.site.ledger_entries import Entry, canonical, sealed
from fedssl.site.ledger_file import held, refused
from fedssl.storage import append_durably, cache_folder, state_folder

__all__ = [
    "Egress", "TensorEntry", "bytes_since", "default_egress", "describe_counts", "describe_state", "summary", "verify",
]  # fmt: skip
MANIFEST, ANCHOR = "manifest.jsonl", "anchor.json"
_NEVER = (-1,)  # stamp of no file
_Sent = list[tuple[datetime, int]]


@dataclass
class _Seen:
    """What was verified last.

    Attributes:
        stamp: of the file: which one, its length, its times.
        line: its last line; empty where there is none.
        last: number and hash of its last entry; None where there is none.
        sent: time and bytes of every message.
    """

    stamp: tuple[int, ...]
    line: bytes = b""
    last: Entry | None = None
    sent: _Sent = field(default_factory=list)


class Egress:
    """Append-only record of what left a site, safe against kills, full disks and older copies.

    The whole file is verified when it is first used, and again whenever it is not as this object left it.

    Args:
        path: the manifest's file.
        anchor: small file in another folder that knows the last entry; None: the end of the file is not guarded.
        site: name of the site.
    """

    def __init__(self, path: Path, anchor: Path | None, site: str) -> None:
        self.path = path
        self.anchor = anchor
        self.site = unicodedata.normalize("NFC", site)
        self._seen: _Seen | None = None

    def append(self, fields: Mapping[str, Any]) -> Entry:
        """Enter a message before it leaves; it may leave when this returns, and only then.

        Args:
            fields: ``kind`` ("train", "query", "marginals", "presence", "refusal"), ``frame_bytes`` and ``sha256`` of
                all that is handed on; and, where there are any, ``run``, ``round``, ``tensors``, ``counts``,
                ``metrics``, ``facts``, ``epsilon``, ``reason``, ``content_bytes`` (default: of all tensors and counts).

        Returns:
            The entry, with its number, its time, the hash of the one before and its own.

        Raises:
            PolicyError: the manifest was altered, cut off or exchanged, or belongs to another site.
            StorageError: a disk is full or a file cannot be written.
        """
        own = prepared(fields)
        with held(self.path, writing=True, what=WHAT):
            seen = self._current(writing=True)
            entry = sealed(seen.last, {"site": self.site, "time": _now(), **own})
            line = canonical(entry) + b"\n"
            append_durably(self.path, line, WHAT)
            if self.anchor:
                write_anchor(self.anchor, entry)
            seen.sent.append(_sent(entry))
            self._seen = _Seen(_stamp(self.path), line, _end(entry), seen.sent)
        return entry

    def sent(self) -> _Sent:
        """List when each message was entered and how many bytes left with it.

        Raises:
            PolicyError: the manifest does not verify.
            StorageError: it cannot be read.
        """
        with held(self.path, writing=False, what=WHAT):
            self._seen = self._current(writing=False)
            return list(self._seen.sent)

    def _current(self, *, writing: bool) -> _Seen:
        """Give what is there, without reading it where it still is as it was left; the caller holds the manifest."""
        if self._seen is not None and self._as_left(self._seen):
            return self._seen
        whole = Walk(self.path, self.anchor)
        sent = [_sent(entry) for entry in whole]
        if whole.last and whole.last["site"] != self.site:
            raise PolicyError(
                f"This egress manifest belongs to site {whole.last['site']}, not to {self.site}. Give each its own."
            )
        if writing:
            self._settle(whole)
        line = canonical(whole.last) + b"\n" if whole.last else b""
        stamp = _NEVER if whole.torn and not writing else _stamp(self.path)
        return _Seen(stamp, line, _end(whole.last) if whole.last else None, sent)

    def _as_left(self, seen: _Seen) -> bool:
        """Tell whether this is the same file, untouched, with the same last line, and the anchor knows it."""
        if _stamp(self.path) != seen.stamp:
            return False
        if self.anchor and known_to(self.anchor) != ((seen.last["number"], seen.last["hash"]) if seen.last else None):
            return False
        if not seen.line:
            return True
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(-len(seen.line), os.SEEK_END)
                return stream.read() == seen.line
        except OSError as error:
            raise refused("read", error, WHAT) from error

    def _settle(self, whole: Walk) -> None:
        """Put right what a killed process left: cut off what it did not finish, let the anchor know what it did."""
        if whole.torn:
            try:
                os.truncate(self.path, whole.length)
            except OSError as error:
                raise refused("written", error, WHAT) from error
            text = "An entry of the egress manifest that a process had not finished was removed; nothing left."
            progress.publish(progress.Note(text))
        if not self.anchor or whole.last is None or whole.anchored == whole.last["number"]:
            return
        behind = None if whole.anchored is None else whole.last["number"] - whole.anchored
        if behind != 1:  # one: a process was killed between its two writes
            state = "is lost" if behind is None else f"was {behind} entries behind"
            text = (
                f"The anchor of the egress manifest {state} and is written anew. If the manifest came from a backup, "
            )
            text += "messages may be missing in it: see that it is the newest copy."
            progress.publish(progress.Note(text, alarm=True))
        append_durably(self.path, b"", WHAT)  # the anchor must not know what a power cut can still take away
        write_anchor(self.anchor, whole.last)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise refused("read", error, WHAT) from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _end(entry: Entry) -> Entry:
    return {"number": entry["number"], "hash": entry["hash"]}


def _sent(entry: Entry) -> tuple[datetime, int]:
    return datetime.fromisoformat(entry["time"]), entry["frame_bytes"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def verify(path: Path, anchor: Path | None) -> list[Entry]:
    """Read and verify a manifest; nothing is written. For a long one see ``fedssl.site.egress_file.walk``.

    Args:
        path: the manifest.
        anchor: that knows its last entry; None, or a file that is not there: the end is not guarded.

    Returns:
        All entries, oldest first, but one that a killed process did not finish.

    Raises:
        PolicyError: names the first entry that is damaged or missing.
        StorageError: a file cannot be read.
    """
    return list(walk(path, anchor))


def default_egress(site: str, place: Path | None = None) -> tuple[Path, Path]:
    """Give where a site's manifest and its anchor are: state folder and cache folder, as of a privacy ledger.

    Args:
        site: its name.
        place: state folder of a kit, which keeps a manifest of its own. Its anchor is in FEDSSL_CACHE or, where that is
            not set, in the kit's own cache; it is named after site and place, so that two kits of one site have two.
            Default: the state folder of this user.
    """
    name = folder_name(site)
    if place is None:
        path, cache = state_folder() / "egress" / name / MANIFEST, cache_folder()
    else:
        path = place / "egress" / MANIFEST
        cache = cache_folder() if os.environ.get("FEDSSL_CACHE") else place / "cache"
        name += f"-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    return path, cache / "egress-anchors" / name / ANCHOR


def bytes_since(source: Egress | Iterable[Entry], since: datetime) -> int:
    """Add up what left since a time, for a cap a day: whole messages, refusals too.

    An entry from the future, after a clock was set back, counts as well.

    Args:
        source: a manifest, or entries of one.
        since: with a time zone.

    Raises:
        PolicyError: the manifest does not verify.
        StorageError: it cannot be read.
    """
    sent = source.sent() if isinstance(source, Egress) else map(_sent, source)
    return sum(size for time, size in sent if time >= since)
