"""The gate before the SuperLink: real TLS, an upstream that records all it gets, Flower's own client."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.superlink.routers.fleet.router import router
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from fedssl.deployment.gate import app as gate_app
from fedssl.deployment.gate import memory as gate_memory
from fedssl.deployment.gate.callers import Callers, Refused
from fedssl.deployment.gate.hello import hello
from fedssl.deployment.gate.seen import Seen
from fedssl.deployment.gate.serving import Admission, GateSettings, gate_in_thread, run_gate
from fedssl.deployment.identity.certificates import new_key, pem, private_pem, private_ssh
from fedssl.deployment.identity.issuing import authority_certificate, certificate_for, subject_of
from fedssl.errors import ConfigError, FederationError

PULL = "/v1/fleet/pull-messages"
NORTH, REVOKED, EXPIRED, STRANGER = (new_key() for _ in range(4))
ODD_PATHS = [
    "/v1/control/start-run", "/v1/runtime/acquire-task", "//v1/control/start-run", "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet%2f..%2fcontrol%2fstart-run",
    "/v1%2ffleet/pull-messages", "/v1/fleet/pull%2dmessages", "//v1/fleet/pull-messages", "/v1/fleet//pull-messages",
    "/v1/fleet/pull-messages/", "/v1/fleet/./pull-messages", "/V1/fleet/pull-messages", "/v1/fleet/pull-messages?a=b",
    "/v1/fleet/pull-messages;a=b", "/v1/fleet/pull-messages#x", "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages\\",
    "/v1/fleet/", "/v1/fleet", "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/", "/docs", "/openapi.json",
    "/health", "/v1/fleet\\..\\control\\start-run", "/v1/fleet/pull-messages/../../control/start-run", "*",
    "https://127.0.0.1/v1/control/start-run", "https://127.0.0.1/v1/fleet/pull-messages", "http://[::1]/v1/control/x",
    "v1/fleet/pull-messages", "/fedssl/hello/../../v1/control/start-run", "/v1/fleet/pull-messages%3fx",
    "/v1/responses",
]  # fmt: skip


class SuperLinkDouble:
    """Records what reaches it; answers what a test put into ``reply``."""

    def __init__(self):
        self.requests, self.reply, self.chunks = [], (200, {}, [b"answer"]), 0

    async def __call__(self, scope, receive, send):
        size, self.chunks, largest = 0, 0, 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # not whole: a SuperLink makes nothing of it
            size, self.chunks = size + len(message.get("body", b"")), self.chunks + 1
            largest = max(largest, len(message.get("body", b"")))
            if not message.get("more_body"):
                break
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        self.requests.append(
            SimpleNamespace(method=scope["method"], path=scope["raw_path"].decode(), query=scope["query_string"],
                            headers=headers, size=size, largest=largest)
        )  # fmt: skip
        status, extra, pieces = self.reply
        raw = [(name.encode(), value.encode()) for name, value in extra.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def served(app, folder, name="server"):
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
                            ssl_certfile=folder / f"{name}.crt", ssl_keyfile=folder / f"{name}.key")  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(20)


def write_server(folder, name, issuer, hosts, begin=None, end=None):
    now, key = datetime.now(UTC), new_key()
    begin = begin or now
    certificate = certificate_for(
        subject_of("server", "TEST"), key.public_key(), issuer, hosts, begin, end or now + timedelta(days=9)
    )
    (folder / f"{name}.crt").write_bytes(pem(certificate))
    (folder / f"{name}.key").write_bytes(private_pem(key))


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder, key, now = tmp_path_factory.mktemp("kit"), new_key(), datetime.now(UTC)
    ca = authority_certificate(key, "TEST", now)
    (folder / "ca.crt").write_bytes(pem(ca))
    write_server(folder, "server", (key, ca), ["127.0.0.1", "localhost"])
    write_server(folder, "elsewhere", (key, ca), ["gate.example", "10.0.0.7"])
    write_server(folder, "past", (key, ca), ["127.0.0.1"], now - timedelta(days=9), now - timedelta(days=1))
    write_server(folder, "future", (key, ca), ["127.0.0.1"], now + timedelta(days=1))
    other = authority_certificate(other_key := new_key(), "OTHER", now)
    write_server(folder, "foreign", (other_key, other), ["127.0.0.1"])
    for name, one in (("site", NORTH), ("revoked", REVOKED), ("expired", EXPIRED), ("stranger", STRANGER)):
        (folder / f"{name}.key").write_bytes(private_ssh(one))
    return folder


@pytest.fixture(scope="module")
def upstream(kit):
    double = SuperLinkDouble()
    with served(double, kit) as double.port:
        yield double


@pytest.fixture(autouse=True)
def _fresh(upstream, monkeypatch):
    upstream.requests.clear()
    upstream.reply = (200, {}, [b"answer"])
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def roll():
    end = datetime(2030, 1, 2, tzinfo=UTC)
    return {
        public_key_to_bytes(NORTH.public_key()): Admission("NORTH", until=end),
        public_key_to_bytes(REVOKED.public_key()): Admission("SOUTH", "revoked", "That was on 2026-01-02."),
        public_key_to_bytes(EXPIRED.public_key()): Admission("EAST", "expired", "It ended on 2026-01-03."),
    }


def described(kit, port, seen, **other):
    return GateSettings("TEST", "127.0.0.1", 0, port, kit / "ca.crt", kit / "server.crt", kit / "server.key", seen,
                        plan=("method=simclr",), **{"largest_mb": 3.0, **other})  # fmt: skip


@pytest.fixture
def gate(kit, upstream, tmp_path):
    with gate_in_thread(described(kit, upstream.port, tmp_path / "seen.json"), roll) as port:
        yield SimpleNamespace(port=port, seen=tmp_path / "seen.json", address=f"127.0.0.1:{port}", kit=kit)


@pytest.fixture(scope="module")
def lasting(kit, upstream, tmp_path_factory):
    """One gate for many questions, none of which is a failed authentication."""
    with gate_in_thread(described(kit, upstream.port, tmp_path_factory.mktemp("lasting") / "seen.json"), roll) as port:
        yield SimpleNamespace(port=port, address=f"127.0.0.1:{port}", kit=kit)


@contextlib.contextmanager
def client_of(gate):
    context = ssl.create_default_context(cafile=gate.kit / "ca.crt")
    with httpx.Client(base_url=f"https://{gate.address}", verify=context, trust_env=False, timeout=30) as client:
        yield client


def signed(key=NORTH, at=None, nonce=None):
    text = (at or datetime.now(UTC)).isoformat()
    message = text if nonce is None else f"{text} {nonce}"
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": text,
        "flwr-signature": b64encode(key.sign(message.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    } | ({} if nonce is None else {"fedssl-nonce": nonce})  # fmt: skip


def post(gate, headers, path=PULL, content=b"question", **other):
    with client_of(gate) as client:
        return client.post(path, headers=headers, content=content, **other)


def sentence(answer):
    return answer.json()["detail"]


def raw(gate, data):
    """Send bytes as they are; give all that comes back."""
    context = ssl.create_default_context(cafile=gate.kit / "ca.crt")
    with (
        socket.create_connection(("127.0.0.1", gate.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
    ):
        stream.sendall(data)
        found = b""
        while b"\r\n\r\n" not in found and (piece := stream.recv(65536)):
            found += piece
        return found


def raw_request(target, headers, method="POST", extra=""):
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\nHost: gate\r\nContent-Length: 0\r\n{lines}{extra}\r\n".encode("latin-1")


# ---------------------------------------------------------------- Flower's own client


def flower_client(gate, key=NORTH):
    return FleetHttpClient.from_server_address(
        gate.address, False, str(gate.kit / "ca.crt"),
        [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())],
    )  # fmt: skip


def test_flowers_own_client_passes_and_the_superlink_gets_its_headers(gate, upstream):
    upstream.reply = (
        200,
        {"content-type": "application/x-protobuf"},
        [ActivateNodeResponse(node_id=7).SerializeToString()],
    )
    with flower_client(gate) as client:
        for _ in range(5):  # each is signed anew
            assert client.ActivateNode(ActivateNodeRequest(public_key=b"key", heartbeat_interval=30)).node_id == 7
    assert len(upstream.requests) == 5
    first = upstream.requests[0]
    assert (first.method, first.path, first.query) == ("POST", "/v1/fleet/activate-node", b"")
    names = [name for name, _ in first.headers]
    assert {"flwr-public-key", "flwr-timestamp", "flwr-signature", "flwr-package-version"} <= set(names)
    assert dict(first.headers)["host"] == f"127.0.0.1:{upstream.port}"
    assert names.count("host") == 1


def test_flowers_retries_are_signed_anew_so_a_retry_after_an_outage_is_no_replay(gate, upstream):
    upstream.reply = (503, {}, [b""])
    invoker = make_simple_http_retry_invoker()
    threading.Timer(
        0.5, lambda: setattr(upstream, "reply", (200, {}, [ActivateNodeResponse(node_id=3).SerializeToString()]))
    ).start()
    with flower_client(gate) as client:
        assert invoker.invoke(client.ActivateNode, ActivateNodeRequest(public_key=b"key")).node_id == 3
    signatures = [dict(one.headers)["flwr-signature"] for one in upstream.requests]
    assert len(signatures) >= 2
    assert len(set(signatures)) == len(signatures)


def test_the_gate_serves_all_that_a_node_with_a_key_asks():
    """If Flower adds a call, this fails before a consortium does."""
    theirs = {route.path for route in router.routes}
    assert theirs == gate_app.FLEET | {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


def test_flower_reads_the_gates_sentence(gate):
    found = FlowerError.from_json(post(gate, {}).text)
    assert found is not None
    assert "does not say who sent it" in found.message


# ---------------------------------------------------------------- nothing else is reachable


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_no_other_path_reaches_the_superlink(lasting, upstream, path, method):
    answer = raw(lasting, raw_request(path, signed(), method))
    assert answer.split()[1] in {b"404", b"400"}
    assert upstream.requests == []


def test_odd_targets_of_all_kinds_reach_nothing_but_the_fleet_api(gate, upstream):
    piece = st.sampled_from(["v1", "fleet", "control", "..", ".", "%2e%2e", "%2f", "/", "//", "\\", "start-run",
                             "pull-messages", "%252e", "?", "#", ";", "@", ":", "127.0.0.1", "https:"])  # fmt: skip

    @settings(max_examples=60, deadline=None)
    @given(st.lists(piece, max_size=9).map("/".join))
    def check(tail):
        for target in (f"/{tail}", f"/v1/fleet/{tail}"):
            raw(gate, raw_request(target, signed()))

    check()
    assert {one.path for one in upstream.requests} <= gate_app.FLEET


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "TRACE", "PATCH", "post"])
def test_only_posts_pass(lasting, upstream, method):
    assert raw(lasting, raw_request(PULL, signed(), method)).split()[1] == b"404"
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("extra", "passes"),
    [
        ("Host: other\r\n", False),
        ("Content-Length: 5\r\n", False),
        ("Transfer-Encoding: chunked\r\n", False),
        ("Transfer-Encoding: gzip\r\n", False),
        ("flwr-timestamp: 2026-01-01T00:00:00+00:00\r\n", False),
        ("flwr-public-key: eA==\r\n", False),
        (" folded\r\n", False),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\n", True),
        ("X-Original-URL: /v1/control/start-run\r\nX-HTTP-Method-Override: GET\r\n", True),
    ],
)
def test_what_is_said_twice_is_refused_and_what_steers_proxies_is_dropped(gate, upstream, extra, passes):
    status = raw(gate, raw_request(PULL, signed(), extra=extra)).split()[1]
    assert (status == b"200", len(upstream.requests)) == (passes, int(passes))
    assert [one.path for one in upstream.requests] == [PULL] * passes


def test_a_second_request_on_the_same_connection_is_judged_for_itself(gate, upstream):
    smuggled = raw_request(PULL, signed()) + raw_request("/v1/control/start-run", signed())
    raw(gate, smuggled)
    assert [one.path for one in upstream.requests] == [PULL]


def test_only_listed_headers_pass_in_both_directions(gate, upstream):
    upstream.reply = (
        200,
        {"content-type": "a/b", "keep-alive": "timeout=5", "set-cookie": "a=b", "flwr-x": "y"},
        [b"ok"],
    )
    more = {
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "te": "trailers",
        "proxy-authorization": "a",
        "cookie": "b",
        "x-forwarded-for": "1.2.3.4",
        "authorization": "Bearer x",
        "content-type": "a/b",
    }
    answer = post(gate, signed() | more)
    names = {name for name, _ in upstream.requests[0].headers}
    assert names == {"host", "content-type", "content-length", "accept", "accept-encoding",
                     "flwr-public-key", "flwr-timestamp", "flwr-signature"}  # fmt: skip
    assert {"content-type", "flwr-x"} <= set(answer.headers)
    assert not {"keep-alive", "set-cookie", "server"} & set(answer.headers)


def test_the_superlink_cannot_send_a_node_elsewhere(gate, upstream):
    upstream.reply = (307, {"location": "https://127.0.0.1/v1/control/start-run"}, [])
    assert post(gate, signed()).status_code == 502


# ---------------------------------------------------------------- who may pass


def test_strangers_revoked_and_expired_sites_get_sentences(gate, upstream):
    found = {name: post(gate, signed(key)) for name, key in
             (("stranger", STRANGER), ("revoked", REVOKED), ("expired", EXPIRED))}  # fmt: skip
    assert {answer.status_code for answer in found.values()} == {403}
    assert sentence(found["stranger"]) == (
        "This key is not registered with the consortium TEST. Send the site's request (fedssl request) to the operator."
    )
    assert "SOUTH" in sentence(found["revoked"])
    assert "was revoked. That was on 2026-01-02." in sentence(found["revoked"])
    assert "has expired. It ended on 2026-01-03." in sentence(found["expired"])
    assert "--renew" in sentence(found["expired"])
    assert upstream.requests == []


def test_a_refused_heartbeat_ends_the_node_so_that_it_can_be_started_again(gate, upstream):
    """At 403 a node goes on without heartbeats, and is offline for good even when it is admitted again."""
    beat = "/v1/fleet/send-node-heartbeat"
    assert [post(gate, signed(key), beat).status_code for key in (REVOKED, STRANGER, NORTH)] == [401, 401, 200]
    assert "SOUTH is refused" in sentence(post(gate, signed(REVOKED), beat))
    assert [one.path for one in upstream.requests] == [beat]


def test_a_revoked_sites_state_is_told_to_nobody_without_its_key(gate):
    headers = signed(STRANGER) | {"flwr-public-key": signed(REVOKED)["flwr-public-key"]}
    answer = post(gate, headers)
    assert answer.status_code == 401
    assert "SOUTH" not in answer.text


@pytest.mark.parametrize("name", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
@pytest.mark.parametrize("value", [None, "", "%%%", "AAAA", "é".encode(), "x" * 5000])
def test_missing_or_damaged_identity_is_refused(gate, upstream, name, value):
    headers = {key: one for key, one in signed().items() if key != name} | ({} if value is None else {name: value})
    assert post(gate, headers).status_code in {401, 403}
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-299, None), (-302, "302 s behind"), (-90000, "90000 s behind"), (4, None), (7, "7 s ahead of"),
     (8000, "8000 s ahead of")],
)  # fmt: skip
def test_a_wrong_clock_is_told_by_how_much(gate, upstream, seconds, text):
    answer = post(gate, signed(at=datetime.now(UTC) + timedelta(seconds=seconds)))
    if text is None:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 401
        told = sentence(answer)
        near = [text.replace(str(abs(seconds)), str(abs(seconds) + one)) for one in (-1, 0, 1)]
        assert any(one in told for one in near), told
        assert "timedatectl" in told
        assert upstream.requests == []


def test_a_time_without_a_zone_is_refused(gate):
    text = datetime.now(UTC).replace(tzinfo=None).isoformat()
    headers = signed() | {"flwr-timestamp": text}
    headers["flwr-signature"] = b64encode(NORTH.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode()
    assert "no time with a zone" in sentence(post(gate, headers))


def test_a_replay_is_refused_also_with_the_other_half_of_the_signature_and_on_another_path(gate, upstream):
    headers = signed()
    assert post(gate, headers).status_code == 200
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    r, s = decode_dss_signature(b64decode(headers["flwr-signature"]))
    twin = encode_dss_signature(r, order - s)
    NORTH.public_key().verify(twin, headers["flwr-timestamp"].encode(), ec.ECDSA(hashes.SHA256()))  # it is valid
    for again, path in ((headers, PULL), (headers, "/v1/fleet/get-run"),
                        (headers | {"flwr-signature": b64encode(twin).decode()}, PULL)):  # fmt: skip
        answer = post(gate, again, path)
        assert answer.status_code == 401
        assert "replay" in sentence(answer)
    assert len(upstream.requests) == 1


def test_two_signatures_of_the_same_moment_both_pass(gate):
    """Flower pushes objects in several threads, which may read the same microsecond."""
    at = datetime.now(UTC)
    assert [post(gate, signed(at=at)).status_code for _ in range(3)] == [200, 200, 200]


def test_a_hellos_signature_is_none_for_the_fleet_api_and_the_other_way_round(gate, upstream):
    nonce = secrets.token_hex(16)
    assert post(gate, signed(nonce=nonce)).status_code == 401
    joined = signed(nonce=nonce)
    joined["flwr-timestamp"] += f" {nonce}"
    assert post(gate, joined).status_code == 401
    with client_of(gate) as client:
        assert client.get("/fedssl/hello", headers=signed() | {"fedssl-nonce": nonce}).status_code == 401
        assert client.get("/fedssl/hello", headers=signed(nonce="zz")).status_code == 401
        good = signed(nonce=nonce)
        assert client.get("/fedssl/hello", headers=good).status_code == 200
        assert client.get("/fedssl/hello", headers=good).status_code == 401
    assert upstream.requests == []


def test_after_20_failures_in_a_minute_a_caller_waits_but_another_key_at_its_address_passes(gate, upstream):
    found = [post(gate, signed(new_key())) for _ in range(22)]
    assert [answer.status_code for answer in found] == [403] * 20 + [429] * 2
    assert int(found[-1].headers["retry-after"]) <= 60
    assert "Too many refused requests came from 127.0.0.1" in sentence(found[-1])
    assert post(gate, signed()).status_code == 200


def test_failures_are_forgotten_after_a_minute_and_their_memory_is_bounded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gate_memory, "monotonic", lambda: now[0])
    failures = gate_memory.Failures()
    assert [failures.add("a") for _ in range(20)] == [True] + [False] * 19
    assert failures.wait_s("a") == 60
    now[0] = 61
    assert failures.wait_s("a") == 0
    for number in range(10_000):
        failures.add(str(number))
    assert len(failures._times) == 4096


def test_signatures_are_remembered_for_longer_than_they_are_valid_and_then_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gate_memory, "monotonic", lambda: now[0])
    signatures = gate_memory.Signatures(610)
    made = [NORTH.sign(b"text", ec.ECDSA(hashes.SHA256())) for _ in range(3)]
    assert [signatures.is_new(b"key", one) for one in (made[0], made[0], made[1])] == [True, False, True]
    assert signatures.is_new(b"another key", made[0])
    now[0] = 609
    assert not signatures.is_new(b"key", made[0])
    now[0] = 611
    assert signatures.is_new(b"key", made[2])
    assert len(signatures._used) == 1


def test_the_roll_is_read_once_a_second_and_a_change_counts(kit, upstream, tmp_path):
    known, reads = dict(roll()), []

    def changing():
        reads.append(1)
        return dict(known)

    with gate_in_thread(described(kit, upstream.port, tmp_path / "seen.json"), changing) as port:
        gate = SimpleNamespace(port=port, address=f"127.0.0.1:{port}", kit=kit)
        assert [post(gate, signed()).status_code for _ in range(5)] == [200] * 5
        assert len(reads) <= 3
        known.clear()
        time.sleep(1.1)
        assert post(gate, signed()).status_code == 403


def test_a_roll_that_cannot_be_read_lets_nobody_in(kit, upstream, tmp_path):
    def broken():
        raise ConfigError("revoked.crl is damaged.")

    with gate_in_thread(described(kit, upstream.port, tmp_path / "seen.json"), broken) as port:
        answer = post(SimpleNamespace(port=port, address=f"127.0.0.1:{port}", kit=kit), signed())
    assert (answer.status_code, upstream.requests) == (503, [])
    assert "cannot read its list of sites" in sentence(answer)


# ---------------------------------------------------------------- bodies


def test_large_bodies_pass_both_ways_in_pieces(kit, upstream, tmp_path):
    piece, count = bytes(100_000), 300
    upstream.reply = (200, {}, [piece] * count)
    limits = described(kit, upstream.port, tmp_path / "seen.json", largest_mb=40)
    with (
        gate_in_thread(limits, roll) as port,
        client_of(SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit)) as client,
        client.stream("POST", PULL, headers=signed(), content=(piece for _ in range(count))) as answer,
    ):
        got = [len(one) for one in answer.iter_raw()]
    assert upstream.requests[0].size == sum(got) == len(piece) * count
    assert upstream.chunks > 50
    assert upstream.requests[0].largest < 1_000_000
    assert max(got) < 1_000_000


def test_the_first_piece_is_passed_on_before_the_last_was_sent(kit, tmp_path):
    """The client sends its second piece only after the SuperLink has the first: a gate that gathers would hang."""
    arrived = threading.Event()

    async def waiting(scope, receive, send):
        while (message := await receive()).get("more_body"):
            if message["body"]:
                arrived.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def pieces():
        yield b"first"
        assert arrived.wait(20)
        yield b"second"

    with served(waiting, kit) as inner, gate_in_thread(described(kit, inner, tmp_path / "seen.json"), roll) as port:
        answer = post(SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit), signed(), content=pieces())
    assert answer.status_code == 200


def test_a_body_over_the_limit_is_refused_by_its_stated_length_and_by_its_real_one(gate, upstream):
    stated = post(gate, signed(), content=bytes(3_000_001))
    streamed = post(gate, signed(), content=(bytes(100_000) for _ in range(40)))
    for answer, found in ((stated, "3.0 MB"), (streamed, "more than 3 MB")):
        assert answer.status_code == 413
        assert f"site NORTH has {found}, where the server takes 3 MB" in sentence(answer)
    assert upstream.requests == []
    assert post(gate, signed(), content=bytes(3_000_000)).status_code == 200


def test_an_answer_that_breaks_off_does_not_look_whole(kit, tmp_path):
    async def breaking(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("killed")

    with (
        served(breaking, kit) as inner,
        gate_in_thread(described(kit, inner, tmp_path / "seen.json"), roll) as port,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        post(SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit), signed())


def test_without_a_superlink_the_node_is_told_to_try_again(kit, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with gate_in_thread(described(kit, port, tmp_path / "seen.json"), roll) as outer:
        gate = SimpleNamespace(address=f"127.0.0.1:{outer}", kit=kit)
        answer = post(gate, signed())
        assert hello(kit, gate.address, kit / "ca.crt", kit / "site.key").superlink == "down"
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "The SuperLink behind the gate does not answer" in sentence(answer)


def test_a_superlink_that_was_not_signed_by_the_authority_gets_nothing(kit, tmp_path):
    double = SuperLinkDouble()
    with (
        served(double, kit, "foreign") as inner,
        gate_in_thread(described(kit, inner, tmp_path / "seen.json"), roll) as port,
    ):
        assert post(SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit), signed()).status_code == 503
    assert double.requests == []


# ---------------------------------------------------------------- what was seen


def test_bytes_are_counted_and_the_count_outlives_the_gate(kit, upstream, tmp_path):
    seen = tmp_path / "seen.json"
    upstream.reply = (200, {}, [b"x" * 500, b"y" * 250])
    for _ in range(2):
        with gate_in_thread(described(kit, upstream.port, seen), roll) as port:
            gate = SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit)
            post(gate, signed(), content=b"z" * 1000)
            post(gate, signed(), content=(b"z" * 10 for _ in range(10)))
            post(gate, signed(REVOKED))
            post(gate, signed(STRANGER))
    found = json.loads(seen.read_text())
    assert set(found) == {"NORTH", "SOUTH"}
    assert {key: found["NORTH"][key] for key in ("state", "bytes_up", "bytes_down")} == {
        "state": "admitted", "bytes_up": 2200, "bytes_down": 3000,
    }  # fmt: skip
    assert found["SOUTH"]["state"] == "revoked"
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found["NORTH"]["time"])) < timedelta(minutes=1)


def test_the_list_is_written_while_the_gate_runs(gate):
    post(gate, signed())
    deadline = time.monotonic() + 20
    while not gate.seen.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(gate.seen.read_text())["NORTH"]["bytes_up"] == 8


def test_a_damaged_list_begins_anew_and_a_full_disk_stops_nothing(tmp_path):
    path = tmp_path / "folder" / "seen.json"
    path.parent.mkdir()
    path.write_text('{"NORTH": {"time": 3')
    seen = Seen(path)
    seen.note("NORTH", "admitted")
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder should be")
    asyncio.run(seen.write())
    path.parent.unlink()
    asyncio.run(seen.write())
    assert json.loads(path.read_text())["NORTH"]["bytes_up"] == 0


# ---------------------------------------------------------------- the process


def test_the_gate_speaks_tls_1_2_at_least(gate):
    context = ssl.create_default_context(cafile=gate.kit / "ca.crt")
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this end refuses
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", gate.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


PROGRAM = """
import sys
from pathlib import Path
from fedssl.deployment.gate.serving import Admission, GateSettings, run_gate
kit, port, inner = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
key = (kit / "north.pem").read_bytes()
run_gate(GateSettings("TEST", "127.0.0.1", port, inner, kit / "ca.crt", kit / "server.crt", kit / "server.key",
                      kit / "process.json"), lambda: {key: Admission("NORTH")})
print("flwr" in sys.modules, "ended")
"""


def test_a_terminated_gate_finishes_what_is_under_way_and_keeps_its_counts(kit):
    (kit / "north.pem").write_bytes(public_key_to_bytes(NORTH.public_key()))
    going_on, arrived = threading.Event(), threading.Event()

    async def slow(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        arrived.set()
        await asyncio.to_thread(going_on.wait, 20)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served(slow, kit) as inner:
        command = [sys.executable, "-c", PROGRAM, str(kit), str(port), str(inner)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
        )
        gate = SimpleNamespace(address=f"127.0.0.1:{port}", kit=kit)
        deadline, answers = time.monotonic() + 60, []
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        asking = threading.Thread(target=lambda: answers.append(post(gate, signed()).content))
        asking.start()
        assert arrived.wait(20)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        going_on.set()
        asking.join(20)
        output, _ = process.communicate(timeout=30)
    assert (answers, process.returncode, output.split()) == ([b"late"], 0, ["False", "ended"])
    assert json.loads((kit / "process.json").read_text())["NORTH"]["bytes_down"] == 4


def test_a_used_port_and_a_key_of_another_certificate_are_sentences(kit, gate, upstream, tmp_path):
    one = described(kit, upstream.port, tmp_path / "other.json")
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {gate.port}"):
        run_gate(GateSettings(**{**vars(one), "port": gate.port}), roll)
    with pytest.raises(ConfigError, match=r"server.crt and past.key cannot be used for TLS"):
        run_gate(GateSettings(**{**vars(one), "key": kit / "past.key"}), roll)


# ---------------------------------------------------------------- hello


def greet(gate, key="site", server=None, ca=None):
    return hello(gate.kit, server or gate.address, ca or gate.kit / "ca.crt", gate.kit / f"{key}.key")


def test_a_site_that_is_well_hears_all_it_needs(gate):
    found = greet(gate)
    assert (found.consortium, found.site, found.state, found.reason) == ("TEST", "NORTH", "admitted", "")
    assert (found.plan, found.fingerprint, found.superlink) == (("method=simclr",), None, "up")
    assert found.certificate_until == datetime(2030, 1, 2, tzinfo=UTC)
    assert abs(found.clock_difference_s) < 5
    assert found.tls.protocol in {"TLSv1.2", "TLSv1.3"}
    certificate = x509.load_pem_x509_certificate((gate.kit / "server.crt").read_bytes())
    assert found.tls.not_after == certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("stranger", "is not registered with the consortium TEST"),
        ("revoked", "was revoked"),
        ("expired", "has expired"),
    ],
)
def test_a_refused_site_hears_the_servers_sentence(gate, key, text):
    with pytest.raises(FederationError, match=text):
        greet(gate, key)


def test_a_wrong_clock_is_told(gate, monkeypatch):
    class Late(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr("fedssl.deployment.gate.hello.datetime", Late)
    with pytest.raises(FederationError, match=r"The clock of this machine is 360\d s behind the server's"):
        greet(gate)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("foreign", ["signed by another authority (OTHER authority)", "fingerprint of ca.crt with the operator"]),
        ("elsewhere", ["is for gate.example, 10.0.0.7", "site.yaml"]),
        ("past", ["expired on 20", "the operator must renew it"]),
        ("future", ["is valid only from 20", "Set the clock"]),
    ],
)
def test_a_certificate_that_is_wrong_is_explained(kit, name, texts):
    with served(SuperLinkDouble(), kit, name) as port, pytest.raises(FederationError) as caught:
        hello(kit, f"127.0.0.1:{port}", kit / "ca.crt", kit / "site.key")
    for text in texts:
        assert text in str(caught.value)


def test_a_server_that_is_not_there_is_explained(gate, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FederationError, match=f"Nothing listens at 127.0.0.1 port {port}"):
        greet(gate, server=f"127.0.0.1:{port}")
    with pytest.raises(FederationError, match=r"The name gate\.invalid is not known here"):
        greet(gate, server="gate.invalid:8443")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never speaks
        monkeypatch.setattr("fedssl.deployment.gate.hello._TIMEOUT_S", 0.5)
        with pytest.raises(FederationError, match=r"does not answer\. Usually a firewall"):
            greet(gate, server=f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_proxy_that_refuses_is_explained(gate, monkeypatch):
    with speaking(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(FederationError, match=r"The proxy of this machine .* does not let 127\.0\.0\.1 port"):
            greet(gate)


def speaking(answer):
    """A server on a bare socket, without TLS."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return listening


def test_a_server_without_tls_is_explained(gate):
    with (
        speaking(b"HTTP/1.1 400 Bad Request\r\n\r\n") as listening,
        pytest.raises(FederationError, match="does not speak TLS as a fedssl server does"),
    ):
        greet(gate, server=f"127.0.0.1:{listening.getsockname()[1]}")


GOOD = {"consortium": "TEST", "site": "NORTH", "state": "admitted", "reason": "", "time": "2026-01-01T00:00:00+00:00",
        "version": "0.1.0", "plan": [], "fingerprint": None, "superlink": "up", "certificate_until": None}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (404, b"not here", "is no fedssl server: it answers with HTTP status 404"),
        (302, b"", "is no fedssl server: it answers with HTTP status 302"),
        (200, b"<html>", "is no fedssl server: its answer has another form"),
        (200, b"[" * 50_000, "is no fedssl server: its answer has another form"),
        (200, b"x" * 200_000, "is no fedssl server: its answer does not end"),
        (200, json.dumps(GOOD | {"plan": 3}).encode(), "its answer has another form"),
        (200, json.dumps(GOOD | {"time": "soon"}).encode(), "its answer has another form"),
        (
            200,
            json.dumps(GOOD | {"version": "9.9\x1b[2J"}).encode(),
            r"The server runs fedssl 9\.9 \[2J, this site 0\.1\.0",
        ),
        (403, json.dumps({"detail": "No\x1b]0;x\x07 entry\u202e" + "!" * 900}).encode(), r"^No \]0;x  entry !{400,}$"),
    ],
)
def test_another_server_and_another_version_are_explained_without_control_characters(kit, upstream, status, body, text):
    upstream.reply = (status, {"location": "https://127.0.0.1/"} if status == 302 else {}, [body])
    with pytest.raises(FederationError, match=text) as caught:
        hello(kit, f"127.0.0.1:{upstream.port}", kit / "ca.crt", kit / "site.key")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 500


def test_a_missing_damaged_or_foreign_key_or_address_is_a_config_error(gate, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.key cannot be read .*fedssl request"):
        greet(gate, "nothing")
    for name, data in (("damaged", b"-----BEGIN OPENSSH PRIVATE KEY-----\nx"), ("empty", b"")):
        (gate.kit / f"{name}.key").write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name}.key is no private key without a password"):
            greet(gate, name)
    (gate.kit / "small.key").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ConfigError, match=r"small.key is no key on the curve P-384"):
        greet(gate, "small")
    for server in (
        "gate.example",
        "gate.example:http",
        "gate example:8443",
        "b\u00fccher:1",
        f"{'a' * 64}:1",
        "[::1:8443",
        "user@gate:1",
        ":8443",
        "https://gate:8443",
        "gate:0",
        "gate:99999",
    ):
        with pytest.raises(ConfigError, match="where HOST:PORT is expected"):
            greet(gate, server=server)
    with pytest.raises(ConfigError, match=r"ca.crt"):
        greet(gate, ca=tmp_path / "ca.crt")


def test_the_addresses_of_one_ipv6_network_are_one_caller():
    async def refused(address):
        callers = Callers("TEST", dict)
        scope = {"type": "http", "headers": [], "client": (address, 1)}
        for number in range(21):
            host = address + f"{number:x}" if ":" in address else address
            with pytest.raises(Refused) as caught:
                await callers.identify(Request({**scope, "client": (host, 1)}))
        return caught.value.status

    assert asyncio.run(refused("2001:db8::")) == 429
