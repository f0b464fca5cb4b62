"""``fedssl server``: SuperLink, gate and rounds of a consortium, kept alive until the last round is done."""

import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl import progress
from fedssl.deployment.parts import Part, Parts, stopped_by_signals
from fedssl.deployment.registrar import Registrar
from fedssl.deployment.runner import Runner
from fedssl.deployment.settings import CA_FILE, ServerKit
from fedssl.deployment.status.page import write_status_page
from fedssl.deployment.status.standing import read_status
from fedssl.deployment.superlink import SuperLink
from fedssl.errors import ConfigError, FederationError, FedsslError
from fedssl.storage import write_json

_LOOK_S, _WRITE_S, _REGISTER_S, _PORT_S = 0.5, 5.0, 5.0, 15.0


def run_server(folder: Path) -> None:
    """Run the consortium's server until the run is done, or it is stopped.

    Args:
        folder: of the server's kit.

    Raises:
        ConfigError: the kit or the plan is not as it must be.
        FederationError: no round was finished for so long that the server gives up.
    """
    kit = ServerKit.read(folder)
    _check(kit)
    link = SuperLink(kit)
    runner = Runner(kit, link)
    with stopped_by_signals():
        link.prepare()
        gate = [
            sys.executable,
            "-m",
            "fedssl.deployment.gate.doorkeeper",
            str(kit.folder),
            "--fingerprint",
            runner.fingerprint,
        ]
        parts = Parts([*link.parts(), Part("gate", gate, kit.state / "gate.log")])
        try:
            _Server(kit, link, runner, parts).run()
        except KeyboardInterrupt:
            progress.publish(progress.Note("Stopped; the next start goes on from the last finished round."))
        finally:
            parts.stop()


def _check(kit: ServerKit) -> None:
    missing = [name for name in (CA_FILE, "server.crt", "server.key") if not (kit.folder / name).exists()]
    if missing:
        raise ConfigError(
            f"The kit lacks {', '.join(missing)}. Make key and request with `fedssl request KIT`, have it signed "
            "(`fedssl sign AUTHORITY KIT/server.csr`), and put the certificate in with `fedssl install KIT server.crt`."
        )
    _wait_for_port(kit.listen, kit.port, "port")
    _wait_for_port("127.0.0.1", kit.inner_port, "inner_port")


def _wait_for_port(address: str, port: int, whose: str) -> None:
    """See that a port is free; parts of a server that was just killed may need some seconds to end.

    Raises:
        ConfigError: it is not.
    """
    deadline = time.monotonic() + _PORT_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"Port {port} ({whose} in server.yaml) cannot be used ({error.strerror}). Stop what uses it, "
                        "or choose another."
                    ) from error
            else:
                return
        time.sleep(_LOOK_S)


@dataclass
class _Server:
    kit: ServerKit
    link: SuperLink
    runner: Runner
    parts: Parts

    def run(self) -> None:
        registrar = Registrar(self.kit, self.link)
        written = registered = 0.0
        state, reason, settled = "starting", "", False
        while state != "done":
            self.parts.check()
            now = time.monotonic()
            try:
                if self._answers():
                    if now - registered > _REGISTER_S:
                        registrar.renew()
                        registered, settled = now, True
                    state, reason = self.runner.step() if settled else (state, reason)
            except FederationError as error:  # of one of Flower's commands: it is tried again
                if str(error) != reason:
                    progress.publish(progress.Note(str(error), alarm=True))
                reason = str(error)
            if now - written > _WRITE_S or state in {"done", "gave up"}:
                self._tell(state, reason)
                written = now
            if state == "gave up":
                raise FederationError(reason)
            time.sleep(_LOOK_S)
        progress.publish(progress.Note(f"Done: {reason}"))

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.kit.inner_port), timeout=2.0):
            return True
        return False

    def _tell(self, state: str, reason: str) -> None:
        content: dict[str, Any] = {
            "state": state, "reason": reason,
            "parts": self.parts.states(),
        }  # fmt: skip
        write_json(self.kit.state / "server.json", content, "the server's state")
        try:
            write_status_page(self.kit.state / "status.html", read_status(self.kit, datetime.now(UTC)))
        except FedsslError as error:
            progress.publish(progress.Note(f"The status page was not written: {error}", alarm=True))
