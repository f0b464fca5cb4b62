"""Who asks at the gate: a key of the roll, a fresh signature that was never used before, and not too many failures."""

import asyncio
import hashlib
import ipaddress
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from time import monotonic

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from fedssl import progress
from fedssl.deployment.gate.memory import Failures, Signatures
from fedssl.errors import FederationError, FedsslError

ADMITTED, REVOKED, EXPIRED = "admitted", "revoked", "expired"
KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
NONCE_HEADER = "fedssl-nonce"
OLDEST_S, NEWEST_S = 300.0, 5.0
_ROLL_S, _LONGEST, _NONCE = 1.0, 4096, 32
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Admission:
    """What the operator's files say of a key.

    Attributes:
        site: whose key it is.
        state: ``admitted``, ``revoked``, ``expired`` or another word for refused.
        reason: a sentence, if it is refused.
        until: end of its certificate.
    """

    site: str
    state: str = ADMITTED
    reason: str = ""
    until: datetime | None = None


Roll = Callable[[], Mapping[bytes, Admission]]


class Refused(FederationError):  # noqa: N818 - a request is refused; the gate goes on
    """A request gets a sentence instead of what it asked for.

    Args:
        status: of HTTP.
        sentence: what is wrong, what was found, what to do.
        wait_s: after which asking again makes sense.
    """

    def __init__(self, status: int, sentence: str, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.wait_s = wait_s


class Callers:
    """Tells who sent a request.

    Flower signs each request's time anew, also when it tries again, and its HTTP client never sends one twice by
    itself (a dead connection is noticed before anything is sent). So a signature that comes again is a replay.

    Args:
        consortium: its name, for the sentences.
        roll: gives all known keys, as Flower's nodes send them; it is asked once a second at most.
        now: the clock.
    """

    def __init__(self, consortium: str, roll: Roll, now: Clock = lambda: datetime.now(UTC)) -> None:
        self._consortium, self._roll, self._now = consortium, roll, now
        self._known: Mapping[bytes, Admission] = {}
        self._read_at = -_ROLL_S
        self._reading = asyncio.Lock()
        self._failures, self._signatures = Failures(), Signatures(2 * (OLDEST_S + NEWEST_S))

    async def identify(self, request: Request, *, with_nonce: bool = False) -> Admission:
        """Give the admission of the site that signed a request, also if it says that the site is refused.

        Args:
            request: its headers are read only.
            with_nonce: the signature covers time and nonce; Flower's covers the time.

        Raises:
            Refused: nobody known signed it, or not now, or it was used before, or the caller failed too often.
        """
        known = await self._everyone()
        key = _decoded(request, KEY_HEADER)
        address = _network(request.client.host if request.client else "")
        who = f"{address} {hashlib.sha256(key).hexdigest() if key in known else ''}"
        if wait_s := self._failures.wait_s(who):
            raise Refused(429, f"Too many refused requests came from {address}. Try again in {wait_s:.0f} s.", wait_s)
        try:
            return self._identify(request, key, known, with_nonce=with_nonce)
        except Refused as refused:
            if self._failures.add(who):
                progress.publish(progress.Note(f"A request from {address} was refused: {refused}", alarm=True))
            raise

    async def _everyone(self) -> Mapping[bytes, Admission]:
        async with self._reading:
            if monotonic() - self._read_at >= _ROLL_S:
                try:
                    self._known = await run_in_threadpool(self._roll)
                except (FedsslError, OSError) as error:
                    progress.publish(progress.Note(f"The list of sites could not be read: {error}", alarm=True))
                    raise Refused(503, "The server cannot read its list of sites. Tell the operator.", 30.0) from error
                self._read_at = monotonic()
            return self._known

    def _identify(
        self, request: Request, key: bytes, known: Mapping[bytes, Admission], *, with_nonce: bool
    ) -> Admission:
        signature, signed_at = _decoded(request, SIGNATURE_HEADER), _single(request, TIME_HEADER)
        if not key or not signature or not signed_at:
            raise Refused(
                401, f"The request does not say who sent it. Only sites of the consortium {self._consortium} are "
                "served here: start the site with `fedssl site KIT`.",
            )  # fmt: skip
        if key not in known:
            raise Refused(
                403, f"This key is not registered with the consortium {self._consortium}. Send the site's request "
                "(fedssl request) to the operator.",
            )  # fmt: skip
        self._check_time(signed_at)
        message = signed_at
        if with_nonce:
            nonce = _single(request, NONCE_HEADER)
            if len(nonce) != _NONCE or set(nonce) - set("0123456789abcdef"):
                raise Refused(401, f"The header {NONCE_HEADER} must hold {_NONCE} hexadecimal digits.")
            message = f"{signed_at} {nonce}"
        if not _is_signed(key, message, signature):
            raise Refused(
                401, "The signature does not belong to the key that was shown. See that the kit holds the key that the "
                "site's request was made with.",
            )  # fmt: skip
        if not self._signatures.is_new(key, signature):
            raise Refused(
                401, "This very request came before and is refused as a replay. If a proxy between site and server "
                "sends requests twice, switch that off.",
            )  # fmt: skip
        return known[key]

    def _check_time(self, text: str) -> None:
        try:
            age = (self._now() - datetime.fromisoformat(text)).total_seconds()
        except (ValueError, TypeError, OverflowError) as error:
            raise Refused(401, "The time of the request is no time with a zone. Update fedssl and Flower.") from error
        if -NEWEST_S <= age <= OLDEST_S:
            return
        found, allowed = (f"{age:.0f} s behind", OLDEST_S) if age > 0 else (f"{-age:.0f} s ahead of", NEWEST_S)
        raise Refused(
            401, f"The clock of this machine is {found} the server's, where {allowed:.0f} s are allowed. Let it be set "
            "by the network (timedatectl set-ntp true) and try again.",
        )  # fmt: skip


def check_admitted(admission: Admission, consortium: str) -> None:
    """Refuse a site that is known but not admitted.

    Raises:
        Refused: says why.
    """
    if admission.state == ADMITTED:
        return
    what, remedy = {
        REVOKED: ("its certificate was revoked", "If that is a mistake, telephone the operator."),
        EXPIRED: ("its certificate has expired", "Send a new request (fedssl request KIT --renew) to the operator."),
    }.get(admission.state, ("it is not admitted", "Ask the operator."))
    reason = f" {admission.reason.strip()}" if admission.reason else ""
    raise Refused(403, f"Site {admission.site} is refused by the consortium {consortium}: {what}.{reason} {remedy}")


def _single(request: Request, name: str) -> str:
    found = request.headers.getlist(name)
    return found[0] if len(found) == 1 and len(found[0]) <= _LONGEST and found[0].isascii() else ""


def _decoded(request: Request, name: str) -> bytes:
    try:
        return b64decode(_single(request, name), validate=True)
    except ValueError:
        return b""


@lru_cache(maxsize=1024)
def _loaded(key: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        found = load_pem_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return found if isinstance(found, ec.EllipticCurvePublicKey) else None


def _is_signed(key: bytes, message: str, signature: bytes) -> bool:
    """Verify as Flower's ``verify_signature`` does."""
    if (public := _loaded(key)) is None:
        return False
    try:
        public.verify(signature, message.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _network(address: str) -> str:
    """Give an IPv4 address, or the network of an IPv6 address: its holder has all of that."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "an unknown address"
    return address if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))
