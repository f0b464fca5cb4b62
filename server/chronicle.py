"""What a run said, and how it ended, in its folder: whoever runs the server has no terminal of the ServerApp."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl import progress
from fedssl.errors import FedsslError
from fedssl.storage import append_jsonl, write_json

EVENTS, OUTCOME = "events.jsonl", "outcome.json"


@contextlib.contextmanager
def chronicled(run: Path) -> Iterator[None]:
    """Write notes and alarms to ``events.jsonl`` while the block runs, and its end to ``outcome.json``.

    Args:
        run: folder of the run; nothing is written before it is there.
    """
    (run / OUTCOME).unlink(missing_ok=True)

    def note(event: progress.Event) -> None:
        if isinstance(event, progress.Note) and run.exists():
            append_jsonl(run / EVENTS, {"time": _now(), "text": event.text, "alarm": event.alarm})

    stop = progress.listen(note)
    try:
        yield
        _end(run, {"state": "done", "reason": "", "exit_code": 0})
    except FedsslError as error:
        _end(run, {"state": "failed", "reason": str(error), "exit_code": error.exit_code})
        raise
    except Exception as error:
        reason = f"unforeseen {type(error).__name__}; the log of the ServerApp says more"
        _end(run, {"state": "failed", "reason": reason, "exit_code": 1})
        raise
    finally:
        stop()


def _end(run: Path, outcome: dict[str, Any]) -> None:
    if run.exists():
        write_json(run / OUTCOME, outcome | {"time": _now()}, "the run's outcome")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
