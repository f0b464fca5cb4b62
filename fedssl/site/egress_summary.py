"""What left a hospital, in sums: by run, and in all."""

from collections.abc import Iterable
from typing import Any

from fedssl.site.ledger_entries import Entry

_BEFORE_A_ROUND = {"presence", "refusal"}


def summary(entries: Iterable[Entry]) -> dict[str, Any]:
    """Sum up a manifest, in one pass and without keeping it.

    Args:
        entries: oldest first.

    Returns:
        ``site``, ``head`` ("number:hash" of the last entry, for somebody elsewhere to remember; empty where there is
        none), ``runs`` and ``total``. These have messages, refusals, rounds (in which something but a refusal left),
        content_bytes (arrays), frame_bytes (whole messages), first and last (times) and epsilon (last told; None where
        none was).
    """
    runs, total, last = dict[str, _Sum](), _Sum(), None
    for entry in entries:
        for one in (runs.setdefault(entry["run"], _Sum()), total):
            one.add(entry)
        last = entry
    return {
        "site": last["site"] if last else "",
        "head": f"{last['number']}:{last['hash']}" if last else "",
        "runs": [{"run": name, **one.shown()} for name, one in runs.items()],
        "total": total.shown(),
    }


class _Sum:
    def __init__(self) -> None:
        self.counts = dict.fromkeys(("messages", "refusals", "content_bytes", "frame_bytes"), 0)
        self.rounds = set[tuple[str, int]]()
        self.times: tuple[str, str] | None = None
        self.epsilon: float | str | None = None

    def add(self, entry: Entry) -> None:
        self.counts["messages"] += 1
        self.counts["refusals"] += entry["kind"] == "refusal"
        for name in ("content_bytes", "frame_bytes"):
            self.counts[name] += entry[name]
        if entry["kind"] not in _BEFORE_A_ROUND:
            self.rounds.add((entry["run"], entry["round"]))
        self.times = (self.times[0] if self.times else entry["time"], entry["time"])
        if entry["epsilon"] is not None:
            self.epsilon = entry["epsilon"]

    def shown(self) -> dict[str, Any]:
        first, last = self.times or (None, None)
        return {"rounds": len(self.rounds), **self.counts, "first": first, "last": last, "epsilon": self.epsilon}
