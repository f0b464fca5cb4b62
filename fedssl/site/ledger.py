"""The privacy ledger of a site: what was spent on its patients, over all runs and studies.

The spend of a round is reserved before anything is computed; it counts from then on, whether or not the round ends.
What leaves is entered before it leaves. Clocks decide nothing.
"""

import contextlib
import hashlib
import math
import re
import secrets
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.site.ledger_entries import (
    DIGEST,
    REMEDY,
    Entry,
    Reservation,
    epsilon_spent,
    head_of,
    reservations,
    spends_of,
)
from fedssl.site.ledger_file import ANCHOR, LEDGER, append, held, read_chain, settle
from fedssl.storage import cache_folder, state_folder

__all__ = ["Ledger", "Reservation", "default_ledger", "folder_name"]
_HEAD = re.compile(r"(0|[1-9][0-9]{0,17}):([0-9a-f]{64})")
_LONGEST_RUN = 200


class Ledger:
    """Append-only account of one site, safe against kills, full disks and older copies.

    Nothing is made before the first ``reserve``; only ``reserve`` and ``release`` write. Every method first verifies
    the whole file and raises PrivacyError where it does not hold, StorageError where a disk fails.

    Args:
        path: the ledger's file.
        anchor: small file in another folder that knows the ledger's last entry.
        site: name of the site.
        delta: at which epsilon is counted, the same for ever.
    """

    def __init__(self, path: Path, anchor: Path, *, site: str, delta: float) -> None:
        if not 0.0 < delta < 1.0:
            raise ConfigError(f"The privacy ledger cannot count at delta {delta:g}. It must be above 0 and below 1.")
        self.path = path
        self.anchor = anchor
        self.site = unicodedata.normalize("NFC", site)
        self.delta = float(delta)

    def reserve(
        self, run: str, round_number: int, spend: Spend, *, cap: float, run_cap: float | None = None, what: str = ""
    ) -> Reservation:
        """Enter a spend before anything is computed under it. The same round again is a new release and costs again.

        Args:
            run: name of the run.
            round_number: of the round.
            spend: what the whole round releases.
            cap: highest epsilon of all runs together.
            run_cap: highest epsilon of this run's own spends; None: no limit but ``cap``.
            what: the thing in words, for the error ("round 3 of the study").

        Raises:
            PrivacyError: a cap would be passed; nothing was entered.
        """
        what = what or f"round {round_number} of run {run}"
        if not 0 < len(run) <= _LONGEST_RUN or round_number < 0:
            raise PrivacyError(f"A run's name has 1 to {_LONGEST_RUN} letters and its rounds are counted from 0.")
        with self._writing() as entries:
            total = self._within(cap, spends_of(entries), spend, what, "all runs at this site together")
            if run_cap is not None:
                self._within(run_cap, spends_of(entries, run), spend, what, "this run")
            if not entries:
                self._append(entries, "open", ledger=secrets.token_hex(16), site=self.site, delta=self.delta)
            epsilon = max(total, epsilon_spent(entries))
            cost = {"sigma": float(spend.sigma), "rate": float(spend.rate), "steps": spend.steps, "epsilon": epsilon}
            self._append(entries, "reserve", run=run, round=round_number, **cost)
            return reservations(entries)[-1]

    def release(self, reservation: Reservation | tuple[str, int], digest: str) -> None:
        """Enter what leaves, before it leaves. The same bytes again are the same release and change nothing.

        Args:
            reservation: under which it was computed, or run and round: the newest one of that round.
            digest: SHA-256 of the bytes, in hexadecimal digits.

        Raises:
            PrivacyError: there is no such reservation, or something else was released under it.
        """
        if not DIGEST.fullmatch(digest):
            raise PrivacyError("What is released is named by its SHA-256: 64 hexadecimal digits in lower case.")
        with self._writing() as entries:
            found = _find(entries, reservation)
            if found is None:
                raise PrivacyError(
                    "A release is refused: nothing in the privacy ledger was reserved for it. Reserve it first."
                )
            if found.released not in {"", digest}:
                raise PrivacyError(
                    f"A release of round {found.round_number} of run {found.run} is refused: something else was "
                    "released under this reservation. What is computed anew is a new release; reserve it first."
                )
            if not found.released:
                named = {"run": found.run, "round": found.round_number, "reservation": found.number}
                self._append(entries, "release", sha256=digest, **named)

    def reserved(self, run: str, round_number: int) -> Reservation | None:
        """Find the newest reservation of a round."""
        return _find(self.entries(), (run, round_number))

    def spends(self, run: str | None = None) -> list[Spend]:
        """List what was spent, by one run or by all, oldest first."""
        return spends_of(self.entries(), run)

    def epsilon(self, run: str | None = None) -> float:
        """Give what was spent by all runs, as it was entered, or by one run alone."""
        entries = self.entries()
        return epsilon_spent(entries) if run is None else epsilon_of(spends_of(entries, run), self.delta)

    def entries(self) -> list[Entry]:
        """List all entries, oldest first."""
        with held(self.path, writing=False):
            entries = read_chain(self.path, self.anchor).entries
        self._check_owner(entries)
        return entries

    @property
    def name(self) -> str:
        """Random name of the ledger; empty while it has no entry."""
        entries = self.entries()
        return str(entries[0]["ledger"]) if entries else ""

    @property
    def head(self) -> str:
        """Name the last entry, for somebody elsewhere to remember: "number:hash"; empty while there is none."""
        return head_of(self.entries())

    def check_known(self, head: str) -> None:
        """Refuse a ledger that lacks what somebody elsewhere remembers of it.

        Args:
            head: what ``head`` once was; empty: nothing is remembered.

        Raises:
            PrivacyError: the ledger does not hold it.
        """
        entries, match = self.entries(), _HEAD.fullmatch(head)
        if not head:
            return
        if not match:
            raise PrivacyError("What the federation's server remembers of this site's privacy ledger cannot be read.")
        number = int(match[1])
        if number >= len(entries) or entries[number]["hash"] != match[2]:
            raise PrivacyError(
                f"The federation's server remembers an entry {number} of this site's privacy ledger that is not among "
                f"its {len(entries)} entries: an older copy was restored, or the server takes this site for another. "
                f"{REMEDY}"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[list[Entry]]:
        with held(self.path, writing=True):
            chain = read_chain(self.path, self.anchor)
            self._check_owner(chain.entries)
            settle(self.path, self.anchor, chain)
            yield chain.entries

    def _append(self, entries: list[Entry], kind: str, **fields: Any) -> None:  # noqa: ANN401 - see ledger_entries
        append(self.path, self.anchor, entries, {"kind": kind, "time": _now(), **fields})

    def _check_owner(self, entries: list[Entry]) -> None:
        if entries and entries[0]["site"] != self.site:
            raise PrivacyError(
                f"This privacy ledger belongs to site {entries[0]['site']}, not to {self.site}. Give each its own."
            )
        if entries and entries[0]["delta"] != self.delta:
            raise PrivacyError(
                f"The privacy ledger counts at delta {entries[0]['delta']:g} and was asked to count at {self.delta:g}. "
                "One account has one delta: a hospital keeps the privacy profile that it began with (and lowers its "
                f"epsilon-cap to be stricter); a simulation sets privacy.delta={entries[0]['delta']:g}."
            )

    def _within(self, cap: float, spent: list[Spend], spend: Spend, what: str, whose: str) -> float:
        total = epsilon_of([*spent, spend], self.delta)
        if total <= cap and math.isfinite(total):
            return total
        raise PrivacyError(
            f"Refused before anything was computed ({what}): {whose} may spend epsilon {cap:g} (delta {self.delta:g}). "
            f"Spent is {epsilon_of(spent, self.delta):.4f}, and this would make it {total:.4f}. Nothing was entered. "
            "Plan fewer rounds or more noise with `fedssl privacy plan`; only the hospital can raise its cap."
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _find(entries: list[Entry], wanted: Reservation | tuple[str, int]) -> Reservation | None:
    """Find this reservation, or the newest one of a run's round."""
    found = reversed(reservations(entries))
    if isinstance(wanted, Reservation):
        name = (wanted.number, wanted.run, wanted.round_number)
        return next((own for own in found if (own.number, own.run, own.round_number) == name), None)
    return next((own for own in found if (own.run, own.round_number) == wanted), None)


def folder_name(site: str) -> str:
    """Make a folder's name of a site's: letters that every file system takes, and a hash that keeps two sites apart."""
    site = unicodedata.normalize("NFC", site)
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', site)[:40]}-{hashlib.sha256(site.encode()).hexdigest()[:12]}"


def default_ledger(site: str) -> tuple[Path, Path]:
    """Give where a site's ledger and its anchor are unless the site says otherwise: state folder and cache folder."""
    name = folder_name(site)
    return state_folder() / "ledgers" / name / LEDGER, cache_folder() / "ledger-anchors" / name / ANCHOR
