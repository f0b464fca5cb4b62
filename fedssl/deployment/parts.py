"""Processes that are kept alive: started, watched, started again with a growing pause, and stopped together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl import progress
from fedssl.deployment.users import started_as
from fedssl.errors import StorageError

_LONGEST_PAUSE_S, _STEADY_S, _STOP_S = 30.0, 60.0, 20.0
_LARGEST_LOG = 20_000_000
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_OFTEN = 4
FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: for people.
        command: with arguments.
        log: file of all that it prints.
        environment: added to this process's own.
        user: who runs it; None: who runs this process.
        inherits: it gets this process's environment too; the relay must not, there may be passwords.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    inherits: bool = True


@dataclass
class _Life:
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    at: str = ""
    restarts: int = 0
    failures: int = 0
    due: float = 0.0


class Parts:
    """Keeps parts alive.

    Args:
        parts: in the order in which they start.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = {part.name: part for part in parts}
        self.lives = {part.name: _Life() for part in parts}

    def check(self) -> None:
        """Start what does not run and is due."""
        for name, life in self.lives.items():
            if life.process is not None and life.process.poll() is not None:
                self._bury(name, life, life.process.returncode)
            if life.process is None and time.monotonic() >= life.due:
                life.process = _start(self.parts[name])
                life.since, life.at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")

    def _bury(self, name: str, life: _Life, code: int) -> None:
        steady = time.monotonic() - life.since > _STEADY_S
        life.failures = 0 if steady else life.failures + 1
        pause = 0.0 if life.failures == 0 else min(_LONGEST_PAUSE_S, 2.0 ** (life.failures - 1))
        life.process, life.restarts, life.due = None, life.restarts + 1, time.monotonic() + pause
        how = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        text = f"The {name} {how} and is started again" + (f" in {pause:.0f} s" if pause else "") + "."
        often = life.failures >= _OFTEN
        if often:
            text += (
                f" That was {life.failures} times in a row: read {self.parts[name].log.name} in the kit's state folder."
            )
        progress.publish(progress.Note(text, alarm=often))

    def states(self) -> dict[str, dict[str, Any]]:
        """What each part does: ``state`` (up, down), ``restarts``, ``since``, ``pid``."""
        return {
            name: {
                "state": "up" if life.process is not None and life.process.poll() is None else "down",
                "restarts": life.restarts,
                "since": life.at,
                "pid": life.process.pid if life.process is not None else None,
            }
            for name, life in self.lives.items()
        }

    def stop(self) -> None:
        """Stop all, the last first; what does not listen is killed."""
        running = [life.process for life in reversed(self.lives.values()) if life.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(part: Part) -> subprocess.Popen[bytes]:
    try:
        with contextlib.suppress(FileNotFoundError):
            if part.log.stat().st_size > _LARGEST_LOG:
                part.log.replace(part.log.with_suffix(".1.log"))
        log = os.open(part.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(
            f"The log of the {part.name} cannot be opened ({error.strerror}). Check the rights."
        ) from error
    try:
        return subprocess.Popen(  # noqa: S603 - our own commands
            list(part.command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/",
            env={**(os.environ if part.inherits else {}), **part.environment}, preexec_fn=_die_with_us,
            start_new_session=True, **started_as(part.user),
        )  # fmt: skip
    finally:
        os.close(log)


def _die_with_us() -> None:
    """Let a part not outlive the process that keeps it: it would hold ports and sockets."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


@contextlib.contextmanager
def stopped_by_signals() -> Any:  # noqa: ANN401 - a context manager of nothing
    """Turn SIGTERM (systemd, docker) into the KeyboardInterrupt that a terminal's ctrl-c is."""

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - what a signal handler is given
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
