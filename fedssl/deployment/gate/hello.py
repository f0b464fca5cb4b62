"""A site greets the server: whether all is well between them, and if not, one sentence that says what to do."""

import json
import re
import secrets
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

import fedssl
from fedssl.deployment.gate.hello_failures import explained
from fedssl.deployment.identity.certificates import p384, public_key_bytes, read_bytes, read_certificate
from fedssl.errors import ConfigError, FederationError

_PATH = "/fedssl/hello"
_TIMEOUT_S, _DEADLINE_S, _LARGEST, _SHOWN, _LARGEST_PORT = 10.0, 30.0, 100_000, 500, 65535
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_PORT = re.compile(r"[0-9]{1,5}")
_TLS_TIME = "%b %d %H:%M:%S %Y %Z"


@dataclass(frozen=True)
class Tls:
    """The connection.

    Attributes:
        protocol: such as TLSv1.3.
        cipher: its name.
        not_after: end of the server's certificate.
    """

    protocol: str
    cipher: str
    not_after: datetime


@dataclass(frozen=True)
class Hello:
    """What the server answered.

    Attributes:
        consortium: its name.
        site: whose key was shown, in the server's words.
        state: ``admitted``.
        reason: empty.
        time: of the server.
        version: of the server's fedssl, the same as here.
        plan: overrides of the run.
        fingerprint: of the run's configuration, if the server told it.
        superlink: ``up`` or ``down``.
        certificate_until: end of this site's certificate, if the server told it.
        clock_difference_s: the server's clock less this machine's.
        tls: the connection.
    """

    consortium: str
    site: str
    state: str
    reason: str
    time: datetime
    version: str
    plan: tuple[str, ...]
    fingerprint: str | None
    superlink: str
    certificate_until: datetime | None
    clock_difference_s: float
    tls: Tls


def hello(kit_folder: Path, server: str, ca: Path, key: Path) -> Hello:
    """Greet the server as a site.

    Args:
        kit_folder: the site's kit, for the sentences.
        server: ``HOST:PORT`` of the gate.
        ca: certificate of the consortium's authority.
        key: private key of the site.

    Raises:
        ConfigError: key, certificate or address cannot be used.
        FederationError: the server cannot be reached, is another, or refuses this site.
    """
    host, port = _address(server)
    private = _read_key(key, kit_folder)
    read_certificate(ca, "Ask the operator for the kit as it was provisioned.")
    context = ssl.create_default_context(cafile=ca)
    try:
        return _greet(f"https://{server}{_PATH}", context, private, server)
    except httpx.HTTPError as error:
        raise explained(error, host, port) from error


def _greet(url: str, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, server: str) -> Hello:
    begun, started = datetime.now(UTC), time.monotonic()
    with (
        httpx.Client(verify=context, timeout=_TIMEOUT_S) as client,
        client.stream("GET", url, headers=_signed(key, begun)) as response,
    ):
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _LARGEST or time.monotonic() - started > _DEADLINE_S:
                raise _another(server, "its answer does not end")
        if response.status_code != httpx.codes.OK:
            raise _refusal(server, response.status_code, body)
        middle = begun.timestamp() + (time.monotonic() - started) / 2
        return _read(server, body, middle, _tls(server, response))


def _address(server: str) -> tuple[str, int]:
    host, colon, port = server.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not _PORT.fullmatch(port) or not 0 < int(port) <= _LARGEST_PORT:
        raise ConfigError(
            f"server in site.yaml is {server!r} where HOST:PORT is expected, such as fedssl.example:8443."
        )
    return host.strip("[]"), int(port)


def _read_key(path: Path, kit: Path) -> ec.EllipticCurvePrivateKey:
    data = read_bytes(path, f"Make it with `fedssl request {kit}`, as the user who may read it.")
    load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
    try:
        found = load(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path.name} is no private key without a password. Restore it, or make a new one with "
            f"`fedssl request {kit}` and tell the operator that the key is lost."
        ) from error
    p384(found.public_key(), path.name)
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    return found


def _signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> dict[str, str]:
    """Sign time and nonce; the text differs from what Flower signs, so neither can stand for the other."""
    text, nonce = now.isoformat(), secrets.token_hex(16)
    signature = key.sign(f"{text} {nonce}".encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public_key_bytes(key.public_key())).decode(),
        "flwr-timestamp": text,
        "flwr-signature": b64encode(signature).decode(),
        "fedssl-nonce": nonce,
    }


def _tls(server: str, response: httpx.Response) -> Tls:
    connection = response.extensions["network_stream"].get_extra_info("ssl_object")
    if connection is None:
        raise _another(server, "the connection is not encrypted")
    end = datetime.strptime(connection.getpeercert()["notAfter"], _TLS_TIME).replace(tzinfo=UTC)
    return Tls(connection.version() or "", connection.cipher()[0], end)


def _read(server: str, body: bytes, middle: float, tls: Tls) -> Hello:
    found = _object(body)
    version = found.get("version")
    if isinstance(version, str) and version != fedssl.__version__:
        raise FederationError(
            f"The server runs fedssl {_clean(version)}, this site {fedssl.__version__}. Install the server's version "
            "here, or ask the operator which one the consortium uses."
        )
    try:
        at, until = datetime.fromisoformat(found["time"]), found["certificate_until"]
        return Hello(
            _text(found["consortium"]), _text(found["site"]), _text(found["state"]), _text(found["reason"]), at,
            _text(version), tuple(_text(word) for word in found["plan"]),
            None if found["fingerprint"] is None else _text(found["fingerprint"]), _text(found["superlink"]),
            None if until is None else datetime.fromisoformat(until), at.timestamp() - middle, tls,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _another(server, "its answer has another form") from error


def _refusal(server: str, status: int, body: bytes) -> FederationError:
    detail = _object(body).get("detail")
    if not isinstance(detail, str) or not detail.strip():
        return _another(server, f"it answers with HTTP status {status}")
    return FederationError(_clean(detail))


def _another(server: str, found: str) -> FederationError:
    return FederationError(
        f"{_clean(server)} is no fedssl server: {found}. See whether host and port in site.yaml are those that the "
        "operator gave you, and whether a proxy stands between."
    )


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return _clean(value)


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_SHOWN]
