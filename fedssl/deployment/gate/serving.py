"""Runs the gate: TLS, signals, and the client that reaches the SuperLink on this machine.

The gate holds no secret but the server's TLS key. It is one process; the signatures that it remembers against replays
are those since its start.
"""

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from time import monotonic, sleep

import httpx
import uvicorn

from fedssl.deployment.gate.app import Gate
from fedssl.deployment.gate.app import GateSettings as GateSettings
from fedssl.deployment.gate.callers import Admission as Admission
from fedssl.deployment.gate.callers import Callers, Roll
from fedssl.deployment.gate.seen import Seen
from fedssl.errors import ConfigError

_CONNECT_S, _READ_S, _POOL_S, _STOP_S, _START_S = 5.0, 120.0, 5.0, 10, 30.0
_CONNECTIONS, _PAUSE_S = 200, 0.02
_IDLE_S = 30  # nodes close after 5 s without a request: who waits longer never closes into a request under way
_INNER_IDLE_S = 2.0  # shorter than the SuperLink's 5 s, for the same reason


def run_gate(settings: GateSettings, roll: Roll) -> None:
    """Serve until SIGTERM or SIGINT; then requests under way get ten seconds to end.

    Args:
        settings: of the gate.
        roll: gives all known keys and what is known of them; it runs in a thread, once a second at most.

    Raises:
        ConfigError: port, certificate or key cannot be used.
    """
    served = _Served(settings, roll)
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}  # uvicorn re-raises
    try:
        asyncio.run(served.serve())
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextlib.contextmanager
def gate_in_thread(settings: GateSettings, roll: Roll) -> Iterator[int]:
    """Serve in a thread until the block ends; gives the port.

    Args:
        settings: of the gate.
        roll: gives all known keys and what is known of them.
    """
    served = _Served(settings, roll)
    thread = threading.Thread(target=lambda: asyncio.run(served.serve()), name="gate", daemon=True)
    thread.start()
    deadline = monotonic() + _START_S
    while not served.server.started and thread.is_alive() and monotonic() < deadline:
        sleep(_PAUSE_S)
    try:
        assert served.server.started
        yield served.port
    finally:
        served.server.should_exit = True
        thread.join(_START_S)


class _Served:
    def __init__(self, settings: GateSettings, roll: Roll) -> None:
        self._seen = Seen(settings.seen)
        self._inner = httpx.AsyncClient(
            verify=_trusting(settings),
            trust_env=False,  # a proxy of this machine must not see this
            timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S, pool=_POOL_S),
            limits=httpx.Limits(
                max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=_INNER_IDLE_S
            ),
        )
        gate = Gate(settings, Callers(settings.consortium, roll), self._seen, self._inner)
        config = uvicorn.Config(
            gate, http="h11", ws="none", lifespan="off", interface="asgi3", proxy_headers=False, server_header=False,
            access_log=False, log_config=None, timeout_keep_alive=_IDLE_S, timeout_graceful_shutdown=_STOP_S,
            callback_notify=self._seen.write, timeout_notify=1, ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )  # fmt: skip
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"{settings.certificate.name} and {settings.key.name} cannot be used for TLS ({error}). Install the "
                "certificate that belongs to the key: fedssl install KIT server.crt."
            ) from error
        assert config.ssl is not None
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
        self.server = uvicorn.Server(config)
        self._socket = _listening(settings)
        self.port: int = self._socket.getsockname()[1]

    async def serve(self) -> None:
        async with self._inner:
            await self.server.serve(sockets=[self._socket])
        await self._seen.write()


def _trusting(settings: GateSettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca)
    except OSError as error:
        raise ConfigError(f"{settings.ca.name} is no certificate ({error}). Take the authority's ca.crt.") from error


def _listening(settings: GateSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    try:
        return socket.create_server((settings.listen, settings.port), family=family, backlog=_CONNECTIONS)
    except OSError as error:
        raise ConfigError(
            f"The gate cannot listen at {settings.listen} port {settings.port} ({error.strerror}). Stop what uses the "
            "port, or choose another in server.yaml."
        ) from error
