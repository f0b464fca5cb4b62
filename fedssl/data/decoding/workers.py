"""Decoding on all cores: processes that may die, a deadline for every file, answers in the order of the questions."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from operator import itemgetter
from typing import Any

from fedssl.errors import DataError

_DEPTH = 4  # requests a worker holds, so that it never waits for the next one
_AHEAD = 64  # answers that may wait, for each worker, behind a slow file
_MOST_HELD = 2**28  # bytes of such answers
_START_S = 120.0  # for the imports of a process, from a cold network drive too
_LAST_BREATH_S = 1.0
_MOST_BYTES = 2**32  # of one message
_KINDS = ("image", "foreign", "unreadable")


@dataclass(frozen=True)
class Question:
    """A file to decode. ``tag`` is handed back with the answer."""

    request: dict[str, Any]
    tag: Any


@dataclass(frozen=True)
class Answer:
    """What became of a file: the worker's JSON object and the pixels of its records."""

    tag: Any
    found: dict[str, Any]
    pixels: bytes


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    link: Connection
    asked: deque[tuple[int, Question]] = field(default_factory=deque)
    since: float = 0.0
    ready: bool = False

    def deadline(self, timeout_s: float) -> float:
        """When it is given up; its start is not held against a file."""
        return self.since + (timeout_s if self.ready else max(timeout_s, _START_S))


def decode_all(
    questions: Iterator[Question], *, count: int, edge: int, burned_in: str, memory_gb: float, timeout_s: float
) -> Iterator[Answer]:
    """Decode files on ``count`` processes; answers come in the order of the questions.

    A process that crashes, uses more than ``memory_gb`` or works on one file for more than ``timeout_s`` seconds is
    replaced; its file is answered as unreadable with the reason, and the others go on.
    """
    settings = json.dumps({"edge": edge, "burned_in": burned_in, "memory_gb": memory_gb})
    pool = _Pool(settings, timeout_s)
    done: dict[int, Answer] = {}
    numbered = enumerate(questions)
    waiting: deque[tuple[int, Question]] = deque()
    following = 0
    try:
        while True:
            waiting.extend(itertools.islice(numbered, max(0, count * _DEPTH - len(waiting))))
            held = sum(len(answer.pixels) for answer in done.values())
            room = 0 if held > _MOST_HELD else count * _AHEAD - pool.load() - len(done)
            pool.feed(waiting, count, head=following, room=room)
            if not pool.load():
                return
            done.update(pool.collect(waiting))
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        pool.stop()


class _Pool:
    """The processes and what each was asked."""

    def __init__(self, settings: str, timeout_s: float) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        self.workers: list[_Worker] = []

    def load(self) -> int:
        """Count the questions that are out."""
        return sum(len(worker.asked) for worker in self.workers)

    def feed(self, waiting: deque[tuple[int, Question]], count: int, *, head: int, room: int) -> None:
        """Hand out questions, least busy worker first; start workers when there is work for them.

        Args:
            waiting: questions that are not out yet.
            count: most workers.
            head: number of the question whose answer is due next; it is handed out in any case.
            room: how many more may be out.
        """
        while waiting and (room > 0 or waiting[0][0] == head):
            if len(self.workers) < count and all(worker.asked for worker in self.workers):
                self.workers.append(self._start())
            worker = min(self.workers, key=lambda worker: len(worker.asked))
            if len(worker.asked) >= _DEPTH:
                return
            if not worker.asked:
                worker.since = time.monotonic()
            worker.asked.append(waiting.popleft())
            room -= 1
            with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is read
                worker.link.send_bytes(json.dumps(worker.asked[-1][1].request).encode())

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "fedssl.data.decoding.worker", str(theirs.fileno()), self.settings]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDSSL_DICOMWEB")}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        return _Worker(process, Connection(ours.detach()))

    def collect(self, waiting: deque[tuple[int, Question]]) -> dict[int, Answer]:
        """Wait for answers, deaths and deadlines; questions of a lost worker go back to the front of ``waiting``."""
        busy = [worker for worker in self.workers if worker.asked]
        if not busy:
            return {}
        soonest = min(worker.deadline(self.timeout_s) for worker in busy)
        ready = set(wait([worker.link for worker in busy], max(0.0, soonest - time.monotonic())))
        answers = {}
        for worker in busy:
            if worker.link in ready:
                found, lost = self._receive(worker)
            elif time.monotonic() > worker.deadline(self.timeout_s):
                found, lost = _unreadable(f"took longer than {self.timeout_s:g} s to decode"), True
            else:
                continue
            if found is not None:
                number, question = worker.asked.popleft()
                answers[number] = Answer(question.tag, *found)
            worker.since = time.monotonic()
            if lost:
                self._replace(worker, waiting)
        return answers

    def _receive(self, worker: _Worker) -> tuple[tuple[dict[str, Any], bytes] | None, bool]:
        """Read one answer (None: the worker has only said that it is ready) and tell whether the worker is lost."""
        try:
            header = json.loads(worker.link.recv_bytes(_MOST_BYTES))
            if not worker.ready:
                worker.ready = True
                return None, False
            if header["kind"] not in _KINDS:
                raise ValueError(header["kind"])
            return (header, worker.link.recv_bytes(_MOST_BYTES)), False
        except (EOFError, OSError, ValueError, LookupError, TypeError, MemoryError):
            code = _last_code(worker.process)
            if not worker.ready:
                raise DataError(
                    f"A decoding process could not start (exit code {code}). Run fedssl doctor, and check memory and "
                    "data.worker_memory_gb."
                ) from None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return _unreadable(f"crashed its decoder ({name})"), True

    def _replace(self, worker: _Worker, waiting: deque[tuple[int, Question]]) -> None:
        worker.process.kill()
        worker.process.wait()
        again = sorted([*worker.asked, *waiting], key=itemgetter(0))  # the one due next must stay in front
        waiting.clear()
        waiting.extend(again)
        self.workers.remove(worker)
        with contextlib.suppress(OSError):
            worker.link.close()

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
            with contextlib.suppress(OSError):
                worker.link.close()


def _last_code(process: subprocess.Popen[bytes]) -> int:
    """Give a process that has hung up the time to say why."""
    try:
        return process.wait(_LAST_BREATH_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _unreadable(reason: str) -> tuple[dict[str, Any], bytes]:
    return {"kind": "unreadable", "reason": reason, "records": [], "limited": True}, b""
