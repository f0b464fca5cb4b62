"""The entries of a privacy ledger: how they are written, what they may say, and what was spent by them."""

import contextlib
import hashlib
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedssl.errors import PrivacyError
from fedssl.privacy.accounting import Spend

Entry = dict[str, Any]
REMEDY = (
    "Nothing more is released, because what was spent is not known. Restore the newest copy that `fedssl privacy "
    "ledger` accepts. If there is none, take the budget of these patients as spent: a new ledger is only for patients "
    "who were never counted in this one."
)
DIGEST = re.compile(r"[0-9a-f]{64}")
START = "0" * 64  # what the first entry names as the hash of the one before it
_SHARED = {"number": int, "previous": str, "kind": str, "time": str, "hash": str}
_FIELDS: dict[str, dict[str, type]] = {
    "open": {"ledger": str, "site": str, "delta": float},
    "reserve": {"run": str, "round": int, "sigma": float, "rate": float, "steps": int, "epsilon": float},
    "release": {"run": str, "round": int, "sha256": str, "reservation": int},
}


@dataclass(frozen=True)
class Reservation:
    """A spend that is in the ledger.

    Attributes:
        number: of its entry.
        run: name of the run.
        round_number: of the round.
        spend: what was reserved.
        epsilon: of all that had been spent at the site with it, at the ledger's delta.
        released: SHA-256 of what was released under it; empty where nothing was.
    """

    number: int
    run: str
    round_number: int
    spend: Spend
    epsilon: float
    released: str = ""


def canonical(entry: Entry) -> bytes:
    """Write an entry in the one way that counts: sorted keys, no blanks, ASCII."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sealed(last: Entry | None, fields: Entry) -> Entry:
    """Make the entry that follows on ``last``, or the first: with its number, the hash of the one before, its own."""
    entry = {"number": last["number"] + 1 if last else 0, "previous": last["hash"] if last else START, **fields}
    return entry | {"hash": hashlib.sha256(canonical(entry)).hexdigest()}


def damaged(number: int, reason: str) -> PrivacyError:
    """Say which entry is damaged, how, and what to do."""
    return PrivacyError(f"Entry {number} of the privacy ledger is damaged: {reason}. {REMEDY}")


def head_of(entries: list[Entry]) -> str:
    """Name the last entry: "number:hash"; empty where there is none."""
    return f"{entries[-1]['number']}:{entries[-1]['hash']}" if entries else ""


def reservations(entries: list[Entry]) -> list[Reservation]:
    """List all reservations, oldest first."""
    released = {entry["reservation"]: entry["sha256"] for entry in entries if entry["kind"] == "release"}
    return [
        Reservation(
            number=entry["number"],
            run=entry["run"],
            round_number=entry["round"],
            spend=Spend(entry["sigma"], entry["rate"], entry["steps"]),
            epsilon=entry["epsilon"],
            released=released.get(entry["number"], ""),
        )
        for entry in entries
        if entry["kind"] == "reserve"
    ]


def spends_of(entries: list[Entry], run: str | None = None) -> list[Spend]:
    """List what was spent, by one run or by all, oldest first."""
    return [own.spend for own in reservations(entries) if run in {None, own.run}]


def epsilon_spent(entries: list[Entry]) -> float:
    """Give the total that the last reservation entered; 0 where nothing was reserved."""
    return next((entry["epsilon"] for entry in reversed(entries) if entry["kind"] == "reserve"), 0.0)


class Verifier:
    """Takes entries in their order and refuses the first that cannot be; ``entries`` are those that it took."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._released: set[int] = set()

    def add(self, entry: Any, line: bytes) -> None:  # noqa: ANN401 - whatever was in the file
        """Take the next entry.

        Args:
            entry: what ``line`` holds.
            line: as it stands in the file.

        Raises:
            PrivacyError: it was changed, is not the next one, or says what cannot be.
        """
        reason = _wrong_form(entry, line) or self._wrong_place(entry) or self._wrong_content(entry)
        if reason:
            raise damaged(len(self.entries), reason)
        self.entries.append(entry)

    def _wrong_place(self, entry: Entry) -> str:
        if entry["number"] != len(self.entries):
            return f"it says that it is entry {entry['number']}"
        if entry["previous"] != (self.entries[-1]["hash"] if self.entries else START):
            return "it does not follow on the entry before it"
        if (entry["kind"] == "open") != (not self.entries):
            return "a ledger is opened by its first entry, once"
        return ""

    def _wrong_content(self, entry: Entry) -> str:
        with contextlib.suppress(PrivacyError, ValueError):  # of the spend, of the time
            zone = datetime.fromisoformat(entry["time"]).tzinfo
            if zone is not None and getattr(self, f"_can_{entry['kind']}")(entry):
                return ""
        return "its values are impossible"

    def _can_open(self, entry: Entry) -> bool:
        return 0.0 < entry["delta"] < 1.0

    def _can_reserve(self, entry: Entry) -> bool:
        Spend(entry["sigma"], entry["rate"], entry["steps"])
        return epsilon_spent(self.entries) <= entry["epsilon"] < math.inf and entry["round"] >= 0

    def _can_release(self, entry: Entry) -> bool:
        number = entry["reservation"]
        if not 0 <= number < len(self.entries) or number in self._released or not DIGEST.fullmatch(entry["sha256"]):
            return False
        self._released.add(number)
        reserved = self.entries[number]
        return reserved["kind"] == "reserve" and all(reserved[name] == entry[name] for name in ("run", "round"))


def _wrong_form(entry: Any, line: bytes) -> str:  # noqa: ANN401 - whatever was in the file
    if not isinstance(entry, dict) or not _SHARED.keys() <= entry.keys():
        return "it lacks what every entry has"
    with contextlib.suppress(ValueError, RecursionError):
        rest = {name: value for name, value in entry.items() if name != "hash"}
        if canonical(entry) == line and hashlib.sha256(canonical(rest)).hexdigest() == entry["hash"]:
            fields = _SHARED | _FIELDS.get(str(entry["kind"]), {"of no known kind": object})
            right = fields == {name: type(value) for name, value in entry.items()}
            return "" if right else "its kind or its fields are unknown"
    return "its hash does not fit its content"
