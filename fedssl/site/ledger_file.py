"""The file of a privacy ledger: JSON lines, each with the hash of the one before it, and an anchor that knows the last.

The anchor lies in another folder, so that a backup that brings back one of the two is noticed. There is no key: whoever
may write both can write them anew, and only somebody elsewhere who remembers the last hash notices.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedssl import progress
from fedssl.errors import PrivacyError, StorageError
from fedssl.site.ledger_entries import REMEDY, Entry, Verifier, canonical, damaged, sealed
from fedssl.storage import append_durably, private_folder, write_json_durably

LEDGER, ANCHOR = "ledger.jsonl", "anchor.json"
_WHAT = "the privacy ledger"


@dataclass(frozen=True)
class Chain:
    """What a ledger's file holds.

    Attributes:
        entries: all that are whole, oldest first, verified.
        length: their length in bytes.
        torn: something follows that a killed process did not finish.
        anchored: number of the last entry that the anchor knows; None where there is no anchor that can be read.
    """

    entries: list[Entry]
    length: int
    torn: bool
    anchored: int | None


@contextlib.contextmanager
def held(path: Path, *, writing: bool, what: str = _WHAT) -> Iterator[None]:
    """Lock a chain's file: one process writes while all others wait. A reader makes no file.

    Args:
        path: the file.
        writing: whether it is made if it is not there, and whether readers wait too.
        what: the thing in words, for notes and errors.

    Raises:
        StorageError: the file cannot be opened or made.
    """
    if writing:
        private_folder(path.parent, what)
    try:
        descriptor = _locked(path, what, writing=writing)
    except OSError as error:
        raise refused("opened", error, what) from error
    if descriptor is None:
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile would hold it on
        os.close(descriptor)


def _locked(path: Path, what: str, *, writing: bool) -> int | None:
    """Lock the file that has the name ``path`` at the moment when the lock is there; None: there is none to read."""
    while writing or path.exists():
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY, 0o600)
        _wait(descriptor, fcntl.LOCK_EX if writing else fcntl.LOCK_SH, what)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # else another copy was put there meanwhile
                return descriptor
        os.close(descriptor)
    return None


def _wait(descriptor: int, kind: int, what: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.publish(progress.Note(f"Waiting for another fedssl process that uses {what}."))
        fcntl.flock(descriptor, kind)


def read_chain(path: Path, anchor: Path | None) -> Chain:
    """Read and verify a ledger; the caller holds it.

    Args:
        path: the ledger's file.
        anchor: its anchor; None: it has none.

    Raises:
        PrivacyError: an entry is damaged, or the anchor knows more entries than there are, or others.
        StorageError: a file cannot be read.
    """
    *lines, rest = _content(path).split(b"\n")
    verifier, length = Verifier(), 0
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line.decode("ascii"))
        except (ValueError, RecursionError):
            if rest or number < len(lines) - 1:
                raise damaged(number, "it is not JSON") from None
            rest = line
        else:
            verifier.add(entry, line)
            length += len(line) + 1
    anchored = _known_to(anchor, verifier.entries) if anchor else None
    return Chain(verifier.entries, length, rest != b"", anchored)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise refused("read", error) from error


def refused(deed: str, error: OSError, what: str = _WHAT) -> StorageError:
    """Say that the system does not let a file be opened, read or written."""
    return StorageError(
        f"{what[0].upper()}{what[1:]} or its anchor cannot be {deed} ({error.strerror}). Check the rights."
    )


def _known_to(anchor: Path, entries: list[Entry]) -> int | None:
    """Compare a ledger with its anchor; give the number of the last entry that the anchor knows."""
    try:
        known = json.loads(_content(anchor))
        name, number, digest = str(known["ledger"]), int(known["number"]), str(known["hash"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not entries:
        raise PrivacyError(f"The privacy ledger is missing or empty; its anchor knows {number + 1} entries. {REMEDY}")
    if name != entries[0]["ledger"]:
        raise PrivacyError(
            f"The privacy ledger is not the one that its anchor belongs to: another was put here or begun. {REMEDY}"
        )
    if not 0 <= number < len(entries):
        raise PrivacyError(
            f"Entry {number} of the privacy ledger, which its anchor knows, is not there: {len(entries)} entries are "
            f"whole. The end was cut off or damaged, or an older copy was restored from a backup. {REMEDY}"
        )
    if digest != entries[number]["hash"]:
        raise PrivacyError(
            f"Entry {number} of the privacy ledger is not the one that its anchor knows: the ledger was written anew, "
            f"or went on from an older copy. {REMEDY}"
        )
    return number


def settle(path: Path, anchor: Path, chain: Chain) -> None:
    """Put right what a killed process left: cut off what it did not finish, let the anchor know what it did.

    Raises:
        StorageError: a file cannot be written.
    """
    if chain.torn:
        try:
            os.truncate(path, chain.length)
        except OSError as error:
            raise refused("written", error) from error
        progress.publish(progress.Note("An entry of the privacy ledger that a process had not finished was removed."))
    last = len(chain.entries) - 1
    if last < 0 or chain.anchored == last:
        return
    if chain.anchored is None or last - chain.anchored > 1:  # one: a process was killed between its two writes
        state = "is lost" if chain.anchored is None else f"was {last - chain.anchored} entries behind"
        text = f"The anchor of the privacy ledger {state} and is written anew. If the ledger came from a backup, "
        text += "entries may be missing that nothing here knows of: see that it is the newest copy."
        progress.publish(progress.Note(text, alarm=True))
    append_durably(path, b"", _WHAT)  # the anchor must not know what a power cut can still take away
    _write_anchor(path, anchor, chain.entries)


def _write_anchor(path: Path, anchor: Path, entries: list[Entry]) -> None:
    known = {"ledger": entries[0]["ledger"], "number": entries[-1]["number"], "hash": entries[-1]["hash"]}
    write_json_durably(anchor, known | {"place": str(path.resolve())}, "the privacy ledger's anchor")


def place_of(anchor: Path) -> Path | None:
    """Give where the ledger of an anchor was when it was last written; None where the anchor does not say."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        return Path(json.loads(_content(anchor))["place"])
    return None


def append(path: Path, anchor: Path, entries: list[Entry], fields: Entry) -> Entry:
    """Add an entry to the file, to ``entries`` and to what the anchor knows; the caller holds the ledger.

    Raises:
        StorageError: a disk is full or a file cannot be written.
    """
    entry = sealed(entries[-1] if entries else None, fields)
    append_durably(path, canonical(entry) + b"\n", _WHAT)
    entries.append(entry)
    _write_anchor(path, anchor, entries)
    return entry
