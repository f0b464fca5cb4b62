"""Keys, certificates, requests and revocation lists (RFC 5280): read, written, and judged in sentences."""

import hashlib
import os
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedssl.errors import ConfigError, StorageError
from fedssl.storage import atomic_file, new_file

SERVER_NAME = "server"
SERVER_ROLE, SITE_ROLE = "server", "site"
_ROLES = {ExtendedKeyUsageOID.SERVER_AUTH: SERVER_ROLE, ExtendedKeyUsageOID.CLIENT_AUTH: SITE_ROLE}
_PUBLIC_MODE, _MOST_BYTES = 0o644, 100_000
_SHOWN = 64


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a private key on P-384, which Flower's authentication of nodes needs."""
    return ec.generate_private_key(ec.SECP384R1())


def p384(key: object, whose: str) -> ec.EllipticCurvePublicKey:
    """Give back a public key that is on P-384.

    Args:
        key: any public key.
        whose: begins the error.

    Raises:
        ConfigError: it is of another kind.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    found = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__.removesuffix("Key")
    raise ConfigError(f"{whose} is no key on the curve P-384 but {found}. Make it with `fedssl request KIT`.")


def public_key_ssh(key: ec.EllipticCurvePublicKey) -> str:
    """Write a public key as ``ecdsa-sha2-nistp384 ...``, the line that ``flwr supernode register`` reads."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode() + "\n"


def public_key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Write a public key as Flower's nodes put it into the header of their requests."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key as PKCS #8 without a password, as TLS servers read it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def private_ssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key as OpenSSH does, without a password, as ``flower-supernode`` reads it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key (DER), in groups of four digits that people can read out on the telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digits = hashlib.sha256(der).hexdigest()
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def pem(thing: x509.Certificate | x509.CertificateSigningRequest | x509.CertificateRevocationList) -> bytes:
    """Write as PEM."""
    return thing.public_bytes(serialization.Encoding.PEM)


def write_public(path: Path, data: bytes, what: str, mode: int = _PUBLIC_MODE) -> None:
    """Write a file that anyone may read, atomically.

    Raises:
        StorageError: it cannot be written.
    """
    with atomic_file(path, what) as stream:
        stream.write(data)
        stream.flush()
        os.fchmod(stream.fileno(), mode)


def write_private(path: Path, data: bytes) -> None:
    """Write a private key that only its owner can read from its first moment; never over another file.

    Raises:
        ConfigError: the file exists.
        StorageError: it cannot be written.
    """
    try:
        new_file(path, data, 0o600)
    except FileExistsError as error:
        raise ConfigError(f"{path.name} is there already and is never written over.") from error
    except OSError as error:
        raise StorageError(
            f"{path.name} could not be written ({error.strerror}). Check the folder's rights and free space."
        ) from error


def read_bytes(path: Path, remedy: str) -> bytes:
    """Read a small file.

    Raises:
        ConfigError: it cannot be read, or is no small file.
    """
    try:
        with path.open("rb") as stream:
            found = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read ({error.strerror}). {remedy}") from error
    if len(found) > _MOST_BYTES:
        raise ConfigError(f"{path.name} is far too long for what it should hold. {remedy}")
    return found


def read_certificate(path: Path, remedy: str) -> x509.Certificate:
    """Read a certificate in PEM.

    Args:
        path: the file.
        remedy: what to do if it is none.

    Raises:
        ConfigError: it is none.
    """
    data = read_bytes(path, remedy)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        is_request = b"CERTIFICATE REQUEST" in data
        found = "a request that nobody has signed" if is_request else "damaged, or not in PEM"
        raise ConfigError(f"{path.name} holds no certificate: it is {found}. {remedy}") from error


def read_request(path: Path) -> x509.CertificateSigningRequest:
    """Read a request in PEM.

    Raises:
        ConfigError: it is none.
    """
    remedy = "Ask for the file that `fedssl request KIT` writes (site.csr or server.csr)."
    try:
        return x509.load_pem_x509_csr(read_bytes(path, remedy))
    except ValueError as error:
        raise ConfigError(f"{path.name} holds no request: it is damaged, or another file. {remedy}") from error


def read_revocations(path: Path, ca: x509.Certificate, now: datetime) -> x509.CertificateRevocationList:
    """Read the list of revoked certificates, which must be there, whole, signed by the authority and not outdated.

    Raises:
        ConfigError: it is not; then nobody can be told from a revoked site.
    """
    remedy = "Write it anew with `fedssl revoke AUTHORITY` and put it into the server's kit. Until then no site enters."
    try:
        found = x509.load_pem_x509_crl(read_bytes(path, remedy))
        right = found.issuer == ca.subject and found.is_signature_valid(p384(ca.public_key(), "ca.crt"))
        until = found.next_update_utc
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path.name} is damaged: it is no list of revoked certificates. {remedy}") from error
    if not right:
        raise ConfigError(f"{path.name} was not signed by the authority of ca.crt, or was changed. {remedy}")
    if until is None or until <= now:
        when = f"was valid until {until:%Y-%m-%d %H:%M} UTC" if until else "says nothing about its validity"
        raise ConfigError(f"{path.name} is outdated: it {when}, and now is {now:%Y-%m-%d %H:%M} UTC. {remedy}")
    return found


def common_name(subject: x509.Name) -> str:
    """Give the one common name, in printable letters: it may come from anyone."""
    names = [str(one.value) for one in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1:
        return ""
    return "".join(letter if letter.isprintable() else "?" for letter in names[0])[:_SHOWN]


def role_of(certificate: x509.Certificate) -> str:
    """Tell what a certificate is good for: ``server``, ``site``, or empty for neither and for both."""
    try:
        usages = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return ""
    return _ROLES.get(usages[0], "") if len(usages) == 1 else ""


def misfit(certificate: x509.Certificate, ca: x509.Certificate, role: str, name: str, now: datetime) -> str:
    """Say what is wrong with a certificate; empty if nothing is.

    Args:
        certificate: of a site or the server.
        ca: of the authority.
        role: ``server`` or ``site``.
        name: whose it must be.
        now: the time, with its zone.
    """
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return "its certificate was not signed by the authority of this consortium (ca.crt). Take the one it signed"
    if (found := role_of(certificate)) != role:
        return f"its certificate is for a {found or 'purpose that is unknown here'}, not for a {role}"
    if (holder := common_name(certificate.subject)) != name:
        return f"its certificate belongs to {holder}, not to {name}. Take the one of {name}"
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return f"its certificate is valid only from {begin:%Y-%m-%d %H:%M} UTC on. Check this machine's clock"
    if now >= end:
        return (
            f"its certificate expired on {end:%Y-%m-%d %H:%M} UTC. Renew it: `fedssl request KIT --renew`, "
            "`fedssl sign AUTHORITY REQUEST`, `fedssl install KIT CERTIFICATE`"
        )
    return ""
