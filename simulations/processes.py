"""Simulated sites in processes of their own on this machine; the messages are files in a spool folder.

``session``: name of the newest server; ``inbox/NODE/ID``: a message until it is answered; ``outbox/ID``: the answer
until it is taken; ``stop``: the sites shall go. A message leaves the inbox when its answer lies whole in the outbox: a
site that was killed does it again, with the same answer, when it is started again. A server that is started again is a
new session, with whose name its messages' ids begin: older ones are dropped. A dead site is late; a deadline names it.
"""

import contextlib
import itertools
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from fedssl import progress
from fedssl.storage import atomic_file
from simulations.grid import RUN_ID, SERVER_NODE, SimulatedGrid

_POLL_S = 0.01
_PATIENCE_S = 3.0  # for the sites to stop by themselves, and again after each signal


def process_context() -> ForkServerContext:
    """Give the way to start processes: forked from a server that has imported torch, Flower and both apps once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "client.app", "server.app", __name__])
    return context


class SpoolGrid(SimulatedGrid):
    """Carries messages to sites in other processes; each one made is a new session.

    Args:
        spool: the folder of the messages.
        nodes: ids of the simulated nodes.
        watch: called whenever the server looks for answers.
    """

    def __init__(self, spool: Path, nodes: Iterable[int], watch: Callable[[], None] = lambda: None) -> None:
        self._inboxes = {node: spool / "inbox" / str(node) for node in nodes}
        self._outbox = spool / "outbox"
        self._watch = watch
        self._session = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        with atomic_file(spool / "session", "the name of the session") as stream:
            stream.write(self._session.encode())
        for folder in [self._outbox, *self._inboxes.values()]:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("[!.]*"):  # a name with a dot may just be written
                old.unlink(missing_ok=True)

    def get_node_ids(self) -> Iterable[int]:
        """Give the ids of all simulated nodes: one whose process is dead may be started again."""
        return list(self._inboxes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages into the sites' inboxes; give their ids."""
        ids = []
        for message in messages:
            ids.append(f"{self._session}-{next(self._numbers):09d}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            _write(self._inboxes[message.metadata.dst_node_id] / ids[-1], message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the answers that are there."""
        self._watch()
        there = [path for path in (self._outbox / name for name in message_ids) if path.exists()]
        answers = [_read(path) for path in there]
        for path in there:
            path.unlink()
        return answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull until all have answered or ``timeout`` (an hour if None) is over."""
        deadline = time.monotonic() + (3600.0 if timeout is None else timeout)
        ids, answers = list(self.push_messages(messages)), list[Message]()
        while len(answers) < len(ids) and time.monotonic() < deadline:
            answers += self.pull_messages(ids)
            time.sleep(_POLL_S)
        return answers


def serve_site(spool: Path, node: int, node_config: Mapping[str, int | str], run_config: Mapping[str, str]) -> None:
    """Answer messages until the file ``stop`` appears or the process that started this one is gone.

    Args:
        spool: the folder of the messages.
        node: id of this node.
        node_config: of this node.
        run_config: of the run, the same for all.
    """
    from client.app import app as client_app

    threading.Thread(target=_go_with_the_parent, daemon=True).start()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, node
    context = Context(RUN_ID, node, dict(node_config), RecordDict(), dict(run_config))
    inbox = spool / "inbox" / str(node)
    inbox.mkdir(parents=True, exist_ok=True)
    while inbox.is_dir() and not (spool / "stop").exists():
        with contextlib.suppress(FileNotFoundError):  # a new session has begun, or the run is over: nobody waits
            path = _oldest_message(spool, inbox)
            if path is None:
                time.sleep(_POLL_S)
                continue
            answer = client_app(_read(path), context)
            if path.exists():
                _write(spool / "outbox" / path.name, answer)
            path.unlink()


def _oldest_message(spool: Path, inbox: Path) -> Path | None:
    """Find the oldest message of the newest session."""
    waiting = sorted(inbox.iterdir())
    session = (spool / "session").read_text() if waiting else ""
    return next((path for path in waiting if path.name.startswith(session)), None)


def _write(path: Path, message: Message) -> None:
    with atomic_file(path, "a message") as stream:
        stream.write(message_to_proto(message).SerializeToString())


def _read(path: Path) -> Message:
    return message_from_proto(ProtoMessage.FromString(path.read_bytes()))


def run_server(spool: Path, nodes: list[int], overrides: str) -> None:
    """Run the server until its run is done or the process that started this one is gone.

    Args:
        spool: the folder of the messages.
        nodes: ids of the simulated nodes.
        overrides: the run configuration's overrides.
    """
    threading.Thread(target=_go_with_the_parent, daemon=True).start()
    _lead(SpoolGrid(spool, nodes), overrides)


def _go_with_the_parent() -> None:
    """End this process, whatever it does, when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _lead(grid: SpoolGrid, overrides: str) -> None:
    from server.app import app as server_app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {"overrides": overrides}))


def run_in_processes(*, sites: int, overrides: str) -> None:
    """Run a whole federation: the server in this process, every simulated site in a process of its own.

    Every site takes ``training.threads`` cores. A script needs ``if __name__ == "__main__":`` around this call.

    Args:
        sites: number of simulated nodes; node i gets ``partition-id`` i.
        overrides: the run configuration's overrides.
    """
    with tempfile.TemporaryDirectory(prefix="fedssl-spool-", ignore_cleanup_errors=True) as folder:
        spool = Path(folder)
        with _running(spool, sites, overrides) as started:
            _lead(SpoolGrid(spool, list(started), watch=lambda: _name_the_dead(started)), overrides)


@contextlib.contextmanager
def _running(spool: Path, sites: int, overrides: str) -> Iterator[dict[int, BaseProcess]]:
    """Start a process a site, by node id; stop them in any case."""
    context, started = process_context(), dict[int, BaseProcess]()
    try:
        for number in range(sites):
            settings = ({"partition-id": number, "num-partitions": sites}, {"overrides": overrides})
            process = context.Process(target=_become_site, args=(dict(os.environ), spool, number + 2, *settings))
            process.start()
            started[number + 2] = process
        yield started
    finally:
        _stop(spool, list(started.values()))


def _become_site(environment: Mapping[str, str], *settings: Any) -> None:  # noqa: ANN401 - see serve_site
    """Serve with the caller's environment, not with that of the fork server, and leave Ctrl-C to the caller."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    serve_site(*settings)


def _stop(spool: Path, processes: list[BaseProcess]) -> None:
    """Ask the sites to go; then make them."""
    (spool / "stop").touch()
    for urge in (BaseProcess.is_alive, BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            urge(process)
        deadline = time.monotonic() + _PATIENCE_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        processes = [process for process in processes if process.is_alive()]
    for process in processes:
        text = f"Process {process.pid} of a simulated site still runs though it was killed. See what holds it (ps)."
        progress.publish(progress.Note(text, alarm=True))


def _name_the_dead(started: dict[int, BaseProcess]) -> None:
    """Say once for each site that its process has ended."""
    for node in [node for node, process in started.items() if not process.is_alive()]:
        text = f"The process of node {node} ended with exit code {started.pop(node).exitcode} (-9: want of memory?)."
        text += " Its answer is awaited until federation.deadline_s; or stop the run and resume it."
        progress.publish(progress.Note(text, alarm=True))
