"""Why a server could not be reached, in one sentence that says what to do."""

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

import httpx
from cryptography import x509
from cryptography.x509.oid import NameOID

from fedssl.errors import FederationError

_LOOK_S, _SHOWN = 5.0, 300
_EXPIRED, _NOT_YET, _NAME, _ADDRESS = 10, 9, 62, 64  # X509_V_ERR_... of OpenSSL
_FAR = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


def explained(error: httpx.HTTPError, host: str, port: int) -> FederationError:
    """Say what happened on the way to ``host``.

    Args:
        error: what the HTTP client raised.
        host: of the server.
        port: of the server.
    """
    where = f"{host} port {port}"
    if isinstance(error, httpx.ProxyError):
        return FederationError(
            f"The proxy of this machine (HTTPS_PROXY) does not let {where} through ({_clean(str(error))}). Let it pass "
            "the connection on, or name the server in NO_PROXY."
        )
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FederationError(_of_certificate(cause, where, _shown_by(host, port)))
        if (text := _of_network(cause, host, where)) is not None:
            return FederationError(text)
    if isinstance(error, httpx.TimeoutException):
        return FederationError(
            f"{where} does not answer. Usually a firewall drops the connection: let it pass TCP to this address "
            "outwards, or ask the operator whether the server runs."
        )
    return FederationError(
        f"The connection to {where} broke ({_clean(str(error)) or type(error).__name__}). Try again; if it lasts, see "
        "whether a proxy stands between, and whether this is the address of the fedssl server."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _of_network(cause: BaseException, host: str, where: str) -> str | None:
    if isinstance(cause, socket.gaierror):
        return f"The name {host} is not known here. See server in site.yaml, and this machine's name servers (DNS)."
    if isinstance(cause, ConnectionRefusedError):
        return f"Nothing listens at {where}. Ask the operator whether the server runs, and at which port."
    if isinstance(cause, ssl.SSLError):
        return (
            f"{where} does not speak TLS as a fedssl server does ({cause.reason or 'no reason'}). See whether host and "
            "port in site.yaml are those that the operator gave you, and whether a proxy stands between."
        )
    if isinstance(cause, OSError) and cause.errno in _FAR:
        return f"There is no way to {where} ({cause.strerror}). See this machine's network, routes and firewall."
    return None


def _of_certificate(cause: ssl.SSLCertVerificationError, where: str, shown: x509.Certificate | None) -> str:
    now = f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if cause.verify_code == _EXPIRED:
        end = f" on {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        return f"The certificate of {where} expired{end}; {now}. If the clock is right, the operator must renew it."
    if cause.verify_code == _NOT_YET:
        begin = f" from {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on" if shown else " later"
        return f"The certificate of {where} is valid only{begin}; {now}. Set the clock (timedatectl set-ntp true)."
    if cause.verify_code in {_NAME, _ADDRESS}:
        return (
            f"The certificate of {where} is for {_names(shown)}. Put one of these names into site.yaml (server), or "
            "let the operator add the name in consortium.yaml (also) and renew the server's certificate."
        )
    issuer = shown.issuer.get_attributes_for_oid(NameOID.COMMON_NAME) if shown else []
    whom = f" ({_clean(str(issuer[0].value))})" if issuer else ""
    return (
        f"The certificate of {where} was signed by another authority{whom} than this consortium's. Compare the "
        "fingerprint of ca.crt with the operator by telephone. A firewall that opens TLS connections looks like this "
        "too: it must let this address alone."
    )


def _names(shown: x509.Certificate | None) -> str:
    if shown is not None:
        with suppress(x509.ExtensionNotFound, ValueError):
            names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if texts := [_clean(str(name.value)) for name in names]:
                return ", ".join(texts)[:_SHOWN]
    return "other names"


def _shown_by(host: str, port: int) -> x509.Certificate | None:
    """Fetch the certificate that was refused, only to describe it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError, ValueError), socket.create_connection((host, port), timeout=_LOOK_S) as plain:  # noqa: SIM117
        with context.wrap_socket(plain, server_hostname=host) as stream:
            return x509.load_der_x509_certificate(stream.getpeercert(binary_form=True) or b"")
    return None


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_SHOWN]
