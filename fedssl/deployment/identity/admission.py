"""Whom the server lets in: sites with a certificate of the authority that is neither expired nor revoked."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedssl.deployment.identity.certificates import (
    SITE_ROLE,
    misfit,
    p384,
    public_key_bytes,
    public_key_ssh,
    read_certificate,
    read_revocations,
)
from fedssl.errors import ConfigError


@dataclass(frozen=True)
class Registered:
    """A site that the server lets in.

    Attributes:
        name: of the site.
        public_key_ssh: its public key, as ``flwr supernode register`` reads it.
        not_after: end of its certificate.
    """

    name: str
    public_key_ssh: str
    not_after: datetime

    @property
    def public_key_bytes(self) -> bytes:
        """The public key as Flower's node puts it into the header of its requests."""
        return public_key_bytes(p384(load_ssh_public_key(self.public_key_ssh.encode()), self.name))


def admitted(folder: Path, ca_crt: Path, crl: Path, now: datetime) -> tuple[list[Registered], dict[str, str]]:
    """Tell which sites the server lets in, and why it refuses the others.

    Args:
        folder: of the sites' certificates, ``NAME.crt`` each.
        ca_crt: certificate of the authority.
        crl: list of the revoked; if it is missing, damaged or outdated, every site is refused.
        now: the time, with its zone.
    """
    paths = {path.name.removesuffix(".crt"): path for path in sorted(folder.glob("*.crt")) if path.name[0] != "."}
    found, refused = dict[str, Registered](), dict[str, str]()
    try:
        ca = read_certificate(ca_crt, "Take the one from the authority's folder.")
        revoked = read_revocations(crl, ca, now)
    except ConfigError as error:
        return [], dict.fromkeys(paths, str(error))
    for name, path in paths.items():
        try:
            one = _admit(name, path, ca, revoked, now)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        if one.public_key_ssh in found:
            refused[name] = f"It has the same key as {found[one.public_key_ssh].name}. Each needs a key of its own."
        else:
            found[one.public_key_ssh] = one
    return list(found.values()), refused


def _admit(
    name: str, path: Path, ca: x509.Certificate, revoked: x509.CertificateRevocationList, now: datetime
) -> Registered:
    certificate = read_certificate(path, f"Sign the request of {name} again.")
    if reason := misfit(certificate, ca, SITE_ROLE, name, now):
        raise ConfigError(f"{reason[0].upper()}{reason[1:]}.")
    entry = revoked.get_revoked_certificate_by_serial_number(certificate.serial_number)
    if entry is not None:
        when = entry.revocation_date_utc
        raise ConfigError(
            f"Its certificate was revoked on {when:%Y-%m-%d %H:%M} UTC. It needs a new key and a new one."
        )
    key = p384(certificate.public_key(), f"The key of {name}")
    return Registered(name, public_key_ssh(key), certificate.not_valid_after_utc)
