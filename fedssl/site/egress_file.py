"""The file of an egress manifest: JSON lines, each with the hash of the one before it, and an anchor.

The anchor knows the last entry. As with a privacy ledger there is no key: whoever may write both can write them anew,
and only somebody elsewhere who remembers the last hash notices.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedssl.errors import PolicyError
from fedssl.site.ledger_entries import DIGEST, START, Entry, canonical
from fedssl.site.ledger_file import held, refused
from fedssl.storage import write_json_durably

WHAT = "the egress manifest"
KINDS = ("train", "query", "marginals", "presence", "refusal")
REMEDY = (
    "Nothing leaves this hospital until that is settled. Keep the files for whoever looks into it; then restore the "
    "newest copy that `fedssl egress` accepts, or move manifest and anchor away together to begin a new one."
)
_FIELDS: dict[str, tuple[type, ...]] = {
    "number": (int,), "previous": (str,), "hash": (str,), "time": (str,), "site": (str,), "kind": (str,), "run": (str,),
    "round": (int,), "tensors": (list,), "counts": (list,), "metrics": (dict,), "facts": (dict,),
    "epsilon": (float, int, str, type(None)), "content_bytes": (int,), "frame_bytes": (int,), "sha256": (str,),
    "reason": (str,),
}  # fmt: skip
_TENSOR: dict[str, tuple[type, ...]] = {
    "name": (str,), "dtype": (str,), "shape": (list,), "bytes": (int,), "sha256": (str,), "norm": (float, str),
    "difference": (bool,),
}  # fmt: skip
_DEFAULTS: Entry = {
    "run": "", "round": 0, "tensors": [], "counts": [], "metrics": {}, "facts": {}, "epsilon": None, "reason": "",
}  # fmt: skip


class Walk:
    """Gives the entries that a manifest has at this moment, oldest first, each verified; the end is judged at the end.

    Args:
        path: the manifest.
        anchor: small file in another folder that knows the last entry; None: there is none.

    Attributes:
        last: newest entry that was given; None before the first.
        length: of what was given, in bytes.
        torn: something follows that a killed process did not finish; known at the end.

    Raises:
        StorageError: a file cannot be read.
    """

    def __init__(self, path: Path, anchor: Path | None) -> None:
        self.path = path
        self.last: Entry | None = None
        self.length, self.torn = 0, False
        self._end = _size(path)
        self._known = known_to(anchor) if anchor else None
        self._found = ""

    @property
    def anchored(self) -> int | None:
        """Number of the last entry that the anchor knows; None where there is no anchor that can be read."""
        return self._known[0] if self._known else None

    def __iter__(self) -> Iterator[Entry]:
        """Give the entries.

        Raises:
            PolicyError: an entry is damaged, or the anchor knows others, or more than there are.
            StorageError: the file cannot be read.
        """
        for line in self._lines():
            number = self.last["number"] + 1 if self.last else 0
            try:
                entry = json.loads(line.decode("ascii"))
            except (ValueError, RecursionError):
                if self.length + len(line) < self._end:
                    raise _damaged(number, "it is not JSON") from None
                self.torn = True
                break
            if not line.endswith(b"\n"):
                self.torn = True
                break
            reason = _wrong_form(entry, line[:-1]) or _wrong_place(entry, self.last)
            if reason:
                raise _damaged(number, reason)
            self.last, self.length = entry, self.length + len(line)
            if number == self.anchored:
                self._found = entry["hash"]
            yield entry
        self._compare()

    def _lines(self) -> Iterator[bytes]:
        if not self._end:
            return
        try:
            with self.path.open("rb") as stream:
                left = self._end
                while line := stream.readline(left):
                    left -= len(line)
                    yield line
        except OSError as error:
            raise refused("read", error, WHAT) from error

    def _compare(self) -> None:
        """Compare the end with what the anchor knows."""
        if self._known is None:
            return
        number, digest = self._known
        if self.last is None:
            raise PolicyError(
                f"The egress manifest is missing or empty; its anchor knows {number + 1} entries. {REMEDY}"
            )
        whole = self.last["number"] + 1
        if number >= whole:
            raise PolicyError(
                f"Entry {number} of the egress manifest, which its anchor knows, is not there: {whole} entries are "
                "whole. The end was cut off or damaged, or an older copy was restored from a backup. "
                f"{REMEDY}"
            )
        if digest != self._found:
            raise PolicyError(
                f"Entry {number} of the egress manifest is not the one that its anchor knows: the manifest was written "
                f"anew, or went on from an older copy, or is another one. {REMEDY}"
            )


def walk(path: Path, anchor: Path | None) -> Walk:
    """Take what a manifest holds at this moment; messages may be entered while it is read."""
    with held(path, writing=False, what=WHAT):
        return Walk(path, anchor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise refused("read", error, WHAT) from error


def known_to(anchor: Path) -> tuple[int, str] | None:
    """Give number and hash of the last entry that an anchor knows; None where it cannot be read or makes no sense.

    Raises:
        StorageError: the system does not let it be read.
    """
    try:
        known = json.loads(anchor.read_bytes())
        number, digest = known["number"], known["hash"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    except OSError as error:
        raise refused("read", error, WHAT) from error
    return (number, digest) if type(number) is int and number >= 0 and isinstance(digest, str) else None


def write_anchor(anchor: Path, entry: Entry) -> None:
    """Let the anchor know the last entry."""
    known = {name: entry[name] for name in ("site", "number", "hash")}
    write_json_durably(anchor, known, "the egress manifest's anchor")


def _damaged(number: int, reason: str) -> PolicyError:
    return PolicyError(f"Entry {number} of the egress manifest is damaged: {reason}. {REMEDY}")


def _wrong_form(entry: Any, line: bytes) -> str:  # noqa: ANN401 - whatever was in the file
    if not isinstance(entry, dict) or not _FIELDS.keys() <= entry.keys():
        return "it lacks what every entry has"
    with contextlib.suppress(ValueError, RecursionError):
        rest = {name: value for name, value in entry.items() if name != "hash"}
        if canonical(entry) == line and hashlib.sha256(canonical(rest)).hexdigest() == entry["hash"]:
            return "" if _fits(entry) else "its values are impossible"
    return "its hash does not fit its content"


def _wrong_place(entry: Entry, last: Entry | None) -> str:
    if entry["number"] != (last["number"] + 1 if last else 0):
        return f"it says that it is entry {entry['number']}"
    if entry["previous"] != (last["hash"] if last else START):
        return "it does not follow on the entry before it"
    return "" if last is None or entry["site"] == last["site"] else "it is of another site than the one before it"


def _fits(entry: Entry) -> bool:
    """Tell whether an entry is one that can be shown and added up; a later version may know more fields."""
    try:
        zone = datetime.fromisoformat(entry["time"]).tzinfo
        return (
            zone is not None
            and all(type(entry[name]) in kinds for name, kinds in _FIELDS.items())
            and all(type(one[name]) in kinds for one in _arrays(entry) for name, kinds in _TENSOR.items())
            and sum(one["bytes"] for one in _arrays(entry)) <= entry["content_bytes"]
            and entry["frame_bytes"] >= 0
            and DIGEST.fullmatch(entry["sha256"]) is not None
        )
    except (ValueError, TypeError, KeyError):
        return False


def _arrays(entry: Entry) -> list[Any]:
    return [*entry["tensors"], *entry["counts"]]


def prepared(fields: Mapping[str, Any]) -> Entry:
    """Make the fields of an entry whole and such as JSON can hold; a number that is not finite becomes a word.

    Args:
        fields: at least kind, frame_bytes and sha256; content_bytes is the sum of all arrays unless it is given.

    Raises:
        PolicyError: they cannot be of a message.
    """
    own: Entry = _DEFAULTS | _plain(fields)
    own.setdefault("content_bytes", sum(one["bytes"] for one in _arrays(own)))
    placed = {"number": 0, "previous": START, "hash": START, "time": "2000-01-01T00:00:00+00:00", "site": ""}
    if own.keys() | placed.keys() != _FIELDS.keys() or own["kind"] not in KINDS or not _fits(placed | own):
        raise PolicyError(
            f"A message of kind {own.get('kind', 'unknown')!r} cannot be entered in the egress manifest: what is said "
            "of it is incomplete or impossible. Nothing left; show this sentence to whoever runs the federation."
        )
    return own


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a message holds
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "item"):  # a number of NumPy or torch
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
