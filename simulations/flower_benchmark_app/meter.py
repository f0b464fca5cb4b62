"""Memory and time of a ServerApp, measured inside its own process."""

import json
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid
from safetensors.torch import save_file
from torch import Tensor

DEADLINE_S = 900.0


def setting(context: Context, name: str) -> str:
    """Read one value of the run's configuration."""
    return str(context.run_config[name])


def memory_mb(field: str) -> float:
    """Read ``VmRSS`` (now) or ``VmHWM`` (the peak) of this process, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


class Meter:
    """Takes the times of the rounds; the first begins when the first training messages are pushed.

    Args:
        grid: its ``push_messages`` is timed.
    """

    def __init__(self, grid: Grid) -> None:
        self._push = grid.push_messages
        self._began: float | None = None
        self._before = memory_mb("VmRSS")
        self._rounds: list[dict[str, float]] = []
        self._pushed = 0.0
        setattr(grid, "push_messages", self._timed_push)  # noqa: B010 - mypy forbids to assign a method

    def _timed_push(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        begin = time.monotonic()
        if self._began is None and messages and messages[0].metadata.message_type.startswith("train"):
            self._began = begin
        ids = list(self._push(messages))
        if messages:
            self._pushed = time.monotonic() - begin
        return ids

    def round_done(self, bytes_up: int, bytes_down: int) -> None:
        """Note the end of a round."""
        now = time.monotonic()
        assert self._began is not None
        self._rounds.append(
            {
                "seconds": now - self._began,
                "push_seconds": self._pushed,
                "bytes_up": bytes_up,
                "bytes_down": bytes_down,
                "peak_mb": memory_mb("VmHWM"),
            }
        )
        self._began = now

    def write(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write the figures, and the final state beside them; the figures appear last, and in one go."""
        figures = {
            "before_mb": self._before,
            "peak_mb": memory_mb("VmHWM"),
            "ru_maxrss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
            "rounds": self._rounds,
        }
        save_file(dict(state), path.with_suffix(".safetensors"))
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(figures))
        draft.rename(path)
