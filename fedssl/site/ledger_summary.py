"""What a hospital wants to know of its privacy ledgers: where they are, what was spent by which run, what is odd."""

import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError
from fedssl.privacy.accounting import epsilon_of
from fedssl.site.ledger import default_ledger
from fedssl.site.ledger_entries import Entry, Reservation, epsilon_spent, head_of, reservations
from fedssl.site.ledger_file import ANCHOR, LEDGER, Chain, held, place_of, read_chain
from fedssl.storage import cache_folder, state_folder

_NUMERICAL = 0.02  # by which two versions of the accountant may differ


def find_ledgers(where: str = "") -> list[tuple[Path, Path]]:
    """Find ledgers and their anchors, also one of which only the anchor is left.

    Args:
        where: a ledger's file; a folder with one, or with one a site, such as a run's; or the name of a site of this
            machine. Empty: all of this machine.

    Raises:
        ConfigError: there is none.
    """
    if not where:
        return _on_this_machine()
    path = Path(where).expanduser()
    if path.is_file():
        return [(path, _anchor_of(path))]
    files = [file for pattern in ("", "*/", "ledgers/*/") for file in sorted(path.glob(f"{pattern}{LEDGER}"))]
    if files:
        return [(file, _anchor_of(file)) for file in files]
    own = [pair for pair in _on_this_machine() if pair[1] == default_ledger(where)[1]]
    if own:
        return own
    raise ConfigError(
        "No privacy ledger was found there. Name a site of this machine, a ledger's file, or a folder of ledgers; "
        f"without an argument all {len(_on_this_machine())} ledgers of this machine are shown."
    )


def _on_this_machine() -> list[tuple[Path, Path]]:
    """Find those in the state folder, and those that an anchor knows of: a site may keep its ledger elsewhere."""
    ledgers, anchors = state_folder() / "ledgers", cache_folder() / "ledger-anchors"
    found = {path.resolve(): anchors / path.parent.name / ANCHOR for path in sorted(ledgers.glob(f"*/{LEDGER}"))}
    for anchor in sorted(anchors.glob(f"*/{ANCHOR}")):
        path = place_of(anchor) or ledgers / anchor.parent.name / LEDGER
        found[path.resolve()] = anchor
    return list(found.items())


def _anchor_of(path: Path) -> Path:
    """Give where the anchor of a ledger is: in the cache for one of this machine, beside it for any other."""
    return dict(_on_this_machine()).get(path.resolve(), path.with_name(ANCHOR))


def summary(path: Path, anchor: Path) -> dict[str, Any] | None:
    """Verify a ledger and say what is in it, or None where nothing was entered yet; nothing is written.

    Args:
        path: the ledger's file.
        anchor: its anchor; need not exist.

    Raises:
        PrivacyError: it does not verify.
        StorageError: it cannot be read.
    """
    with held(path, writing=False):
        chain = read_chain(path, anchor)
    if not chain.entries:
        return None
    first, own = chain.entries[0], reservations(chain.entries)
    runs = {run: [one for one in own if one.run == run] for run in dict.fromkeys(one.run for one in own)}
    replayed = epsilon_of((one.spend for one in own), first["delta"])
    return {
        "site": first["site"],
        "ledger": first["ledger"],
        "delta": first["delta"],
        "epsilon": epsilon_spent(chain.entries),
        "epsilon_replayed": replayed,
        "entries": len(chain.entries),
        "head": head_of(chain.entries),
        "runs": [_run(name, found, first["delta"]) for name, found in runs.items()],
        "notes": _notes(chain, own, replayed),
    }


def _run(name: str, own: list[Reservation], delta: float) -> dict[str, Any]:
    return {
        "run": name,
        "rounds": len({one.round_number for one in own}),
        "reserved": len(own),
        "released": sum(1 for one in own if one.released),
        "steps": sum(one.spend.steps for one in own),
        "sigma": sorted({one.spend.sigma for one in own}),
        "rate": sorted({one.spend.rate for one in own}),
        "epsilon": epsilon_of((one.spend for one in own), delta),
    }


def _notes(chain: Chain, own: list[Reservation], replayed: float) -> list[str]:
    notes = []
    unused = sum(1 for one in own if not one.released)
    if unused:
        notes.append(
            f"Reservations without a release: {unused}. A round was cut off or is under way; it counts as spent."
        )
    backwards = _backwards(chain.entries)
    if backwards:
        notes.append(f"The clock went backwards before entries {', '.join(map(str, backwards))}. It decides nothing.")
    if chain.torn:
        notes.append("The last entry is unfinished: its process was killed. It counts as not made.")
    if chain.anchored is None:
        notes.append("No anchor: whether this is the newest copy cannot be told here.")
    elif chain.anchored < len(chain.entries) - 1:
        notes.append(f"The anchor knows entries up to {chain.anchored} only; the next round lets it know the rest.")
    if abs(replayed - epsilon_spent(chain.entries)) > _NUMERICAL:
        notes.append(
            f"The accountant of this version makes it epsilon {replayed:.4f}: the entries were made with another "
            "version, or not by fedssl."
        )
    return notes


def _backwards(entries: list[Entry]) -> list[int]:
    pairs = itertools.pairwise((datetime.fromisoformat(entry["time"]), entry["number"]) for entry in entries)
    return [number for (earlier, _), (later, number) in pairs if later < earlier]
