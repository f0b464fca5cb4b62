"""What the authority signs: its own certificate, those of server and sites, the list of the revoked (RFC 5280)."""

import ipaddress
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS, _LIST_DAYS = 3650, 365
_CLOCKS_DIFFER = timedelta(minutes=10)
_LOCAL = ("localhost", "127.0.0.1")
_KEY_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def subject_of(name: str, consortium: str) -> x509.Name:
    """Name a holder: CN and O."""
    return x509.Name([
        x509.NameAttribute(NameOID.COMMON_NAME, name),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium),
    ])  # fmt: skip


def authority_certificate(key: ec.EllipticCurvePrivateKey, consortium: str, now: datetime) -> x509.Certificate:
    """Sign the authority's own certificate: it may sign certificates and lists, but no further authority."""
    name = subject_of(f"{consortium} authority", consortium)
    begun = _begun(name, key.public_key(), name, now).not_valid_after(now + timedelta(days=_CA_DAYS))
    return (
        begun.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_uses("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def certificate_for(
    subject: x509.Name,
    holder: ec.EllipticCurvePublicKey,
    issuer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    hosts: Iterable[str],
    now: datetime,
    end: datetime,
) -> x509.Certificate:
    """Sign the certificate of a server or a site.

    Args:
        subject: name of the holder.
        holder: its public key.
        issuer: private key and certificate of the authority.
        hosts: names and addresses of the server; none: it is a site's.
        now: begin of its validity.
        end: of its validity.
    """
    key, ca = issuer
    names = [_host(name) for name in dict.fromkeys(host.lower() for host in hosts)]
    usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
    begun = (
        _begun(subject, holder, ca.subject, now)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_uses("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if names:
        begun = begun.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return begun.sign(key, hashes.SHA384())


def revocation_list(
    revoked: Iterable[tuple[int, datetime]],
    issuer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    number: int,
    now: datetime,
) -> x509.CertificateRevocationList:
    """Sign the list of revoked certificates; it is good for a year.

    Args:
        revoked: serial number and time of each.
        issuer: private key and certificate of the authority.
        number: of the list; grows.
        now: the time.
    """
    key, ca = issuer
    begun = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(now + timedelta(days=_LIST_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial, when in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when)
        begun = begun.add_revoked_certificate(entry.build())
    return begun.sign(key, hashes.SHA384())


def server_names(host: str, also: Iterable[str]) -> list[str]:
    """List all names and addresses by which the server may be reached."""
    return [host, *also, *_LOCAL]


def _begun(
    subject: x509.Name, holder: ec.EllipticCurvePublicKey, issuer: x509.Name, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(holder)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(holder), critical=False)
    )


def _uses(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in allowed for use in _KEY_USES})


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
