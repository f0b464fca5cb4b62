"""The gate's application: all of the server that hospitals, or anybody, can reach.

It passes on what Flower's nodes of admitted sites ask of the SuperLink's Fleet API, byte for byte and piece by piece,
and answers ``GET /fedssl/hello``. Path, query and headers are taken from lists of what is allowed, so nothing that a
caller writes reaches the SuperLink's other interfaces, whose user could start code at every hospital.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

import fedssl
from fedssl.deployment.gate.callers import Admission, Callers, Refused, check_admitted
from fedssl.deployment.gate.seen import Seen
from fedssl.deployment.settings import CA_FILE, ServerKit

HELLO = "/fedssl/hello"
FLEET = {  # all that a node with a key asks; register-node and unregister-node are for nodes without one
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
}  # fmt: skip
_HEARTBEAT = "/v1/fleet/send-node-heartbeat"
_HEADERS = {"accept", "accept-encoding", "content-encoding", "content-length", "content-type", "retry-after"}
_READ_S, _LINGER_S, _RETRY_S, _PROBE_S = 120.0, 5.0, 5.0, 2.0
_MB, _SERVER_ERROR = 1e6, 500


@dataclass(frozen=True)
class GateSettings:
    """What a gate needs to know.

    Attributes:
        consortium: its name.
        listen: address to bind.
        port: to bind; 0: any that is free.
        superlink: port of the SuperLink on 127.0.0.1.
        ca: certificate of the authority, which signed the SuperLink's too.
        certificate: of the server.
        key: of the server.
        seen: file of what was seen.
        plan: overrides of the run, told to sites.
        largest_mb: of one body, in 10^6 bytes.
        fingerprint: of the run's configuration, told to sites.
    """

    consortium: str
    listen: str
    port: int
    superlink: int
    ca: Path
    certificate: Path
    key: Path
    seen: Path
    plan: tuple[str, ...] = ()
    largest_mb: float = 1000.0
    fingerprint: str | None = None

    @classmethod
    def of(cls, kit: ServerKit, fingerprint: str | None = None) -> "GateSettings":
        """Take them from the server's kit."""
        return cls(
            kit.name, kit.listen, kit.port, kit.inner_port, kit.folder / CA_FILE, kit.folder / "server.crt",
            kit.folder / "server.key", kit.state / "seen.json", kit.plan, kit.largest_mb, fingerprint,
        )  # fmt: skip


class Gate:
    """The ASGI application.

    Args:
        settings: of the gate.
        callers: tell who asks.
        seen: keeps what was seen.
        inner: HTTP client that reaches the SuperLink.
    """

    def __init__(self, settings: GateSettings, callers: Callers, seen: Seen, inner: httpx.AsyncClient) -> None:
        self._settings, self._callers, self._seen, self._inner = settings, callers, seen, inner
        self._largest = int(settings.largest_mb * _MB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        inbox = _Inbox(receive)
        try:
            async with contextlib.AsyncExitStack() as stack:
                response = await self._answer(Request(scope, inbox), stack)
                await response(scope, inbox, send)
        except Refused as refused:
            if scope["path"] == _HEARTBEAT and refused.status < _SERVER_ERROR:
                refused.status = 401  # at any other, a node's heart stops and the node stays; at this it ends itself
            await _refuse(refused, inbox, send)
        except ClientDisconnect:
            return

    async def _answer(self, request: Request, stack: contextlib.AsyncExitStack) -> Response:
        asked = (request.method, request.scope["raw_path"].decode("latin-1"), request.scope["query_string"])
        if asked == ("GET", HELLO, b""):
            return await self._hello(await self._admitted(request, with_nonce=True))
        if asked[0] == "POST" and asked[1] in FLEET and not asked[2]:
            return await self._forward(asked[1], request, await self._admitted(request, with_nonce=False), stack)
        raise Refused(
            404, f"This is the server of the consortium {self._settings.consortium}; it serves nothing at this "
            "address. Sites reach it with `fedssl site KIT`.",
        )  # fmt: skip

    async def _admitted(self, request: Request, *, with_nonce: bool) -> Admission:
        admission = await self._callers.identify(request, with_nonce=with_nonce)
        self._seen.note(admission.site, admission.state)
        check_admitted(admission, self._settings.consortium)
        return admission

    async def _forward(
        self, path: str, request: Request, admission: Admission, stack: contextlib.AsyncExitStack
    ) -> Response:
        """Pass a request on to the SuperLink; neither its body nor that of the answer is ever whole in memory."""
        length, site = request.headers.get("content-length", "0"), admission.site
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            raise Refused(400, "The request states its length in two ways. See what changed it on its way.")
        if int(length) > self._largest:
            raise self._too_large(site, f"{int(length) / _MB:.1f} MB")
        url = f"https://127.0.0.1:{self._settings.superlink}{path}"
        asked = httpx.Request("POST", url, headers=_kept(request.headers.items()), content=self._up(request, site))
        try:
            answer = await self._inner.send(asked, stream=True)
        except httpx.TransportError as error:
            raise Refused(
                503, f"The SuperLink behind the gate does not answer ({type(error).__name__}). The node tries again by "
                "itself; if it lasts, tell the operator.", _RETRY_S,
            ) from error  # fmt: skip
        stack.push_async_callback(answer.aclose)
        if answer.is_redirect:  # a node would follow it and send its signature along
            raise Refused(502, "The SuperLink sent the request elsewhere, which must not be. Tell the operator.")
        headers = dict(_kept(answer.headers.items()))
        return StreamingResponse(self._down(answer, site), answer.status_code, headers)

    async def _up(self, request: Request, site: str) -> AsyncIterator[bytes]:
        stream, total = aiter(request.stream()), 0
        while True:
            try:
                async with asyncio.timeout(_READ_S):
                    chunk = await anext(stream, None)
            except TimeoutError as error:
                raise Refused(408, f"Nothing more came from site {site} for {_READ_S:.0f} s. Try again.") from error
            if chunk is None:
                return
            total += len(chunk)
            self._seen.add(site, up=len(chunk))
            if total > self._largest:
                raise self._too_large(site, f"more than {self._settings.largest_mb:g} MB")
            if chunk:
                yield chunk

    async def _down(self, answer: httpx.Response, site: str) -> AsyncIterator[bytes]:
        async for chunk in answer.aiter_raw():
            self._seen.add(site, down=len(chunk))
            yield chunk

    def _too_large(self, site: str, found: str) -> Refused:
        return Refused(
            413, f"The message of site {site} has {found}, where the server takes {self._settings.largest_mb:g} MB. "
            "Let the operator raise largest_mb in server.yaml, or choose a smaller encoder.",
        )  # fmt: skip

    async def _hello(self, admission: Admission) -> Response:
        return JSONResponse({
            "consortium": self._settings.consortium,
            "site": admission.site,
            "state": admission.state,
            "reason": admission.reason,
            "time": datetime.now(UTC).isoformat(),
            "version": fedssl.__version__,
            "plan": list(self._settings.plan),
            "fingerprint": self._settings.fingerprint,
            "superlink": "up" if await self._superlink_listens() else "down",
            "certificate_until": admission.until.isoformat() if admission.until else None,
        })  # fmt: skip

    async def _superlink_listens(self) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_PROBE_S):
                _, writer = await asyncio.open_connection("127.0.0.1", self._settings.superlink)
            writer.close()
            return True
        return False


class _Inbox:
    """The messages of one request's body; remembers whether they have ended."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self.ended = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message


async def _refuse(refused: Refused, inbox: _Inbox, send: Send) -> None:
    """Answer with a sentence, in the form that Flower's nodes print too; then close, but not before it can be read."""
    body = json.dumps({"code": refused.status, "detail": str(refused)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if refused.wait_s is not None:
        headers["retry-after"] = f"{refused.wait_s:.0f}"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):  # closed at once, what is still coming would destroy the answer
            while not inbox.ended:
                await inbox()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _kept(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name in _HEADERS or name.startswith("flwr-")]
