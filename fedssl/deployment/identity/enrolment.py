"""A kit's own identity: the private key is made in the kit and never leaves it."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from fedssl.deployment.identity.certificates import (
    SERVER_NAME,
    SERVER_ROLE,
    SITE_ROLE,
    fingerprint,
    misfit,
    new_key,
    p384,
    pem,
    private_pem,
    private_ssh,
    read_bytes,
    read_certificate,
    write_private,
    write_public,
)
from fedssl.deployment.identity.issuing import subject_of
from fedssl.deployment.settings import CA_FILE, SERVER_FILE, SITE_FILE, ServerKit, SiteKit
from fedssl.errors import ConfigError

_LONGEST_NAME = 64


@dataclass(frozen=True)
class Identity:
    """Whom a kit stands for.

    Attributes:
        folder: of the kit.
        role: ``server`` or ``site``; also the name of its files: ``site.key site.csr site.crt``.
        name: of the site, or ``server``.
    """

    folder: Path
    role: str
    name: str

    @classmethod
    def of(cls, folder: Path) -> "Identity":
        """Read whose kit it is.

        Raises:
            ConfigError: it is none, or its settings are wrong.
        """
        if (folder / SITE_FILE).exists():
            name = SiteKit.read(folder).site
            if not 0 < len(name) <= _LONGEST_NAME:
                raise ConfigError(f"site in {SITE_FILE} must have 1 to {_LONGEST_NAME} letters.")
            return cls(folder, SITE_ROLE, name)
        if (folder / SERVER_FILE).exists():
            ServerKit.read(folder)
            return cls(folder, SERVER_ROLE, SERVER_NAME)
        raise ConfigError(
            f"This folder is no kit: it holds neither {SITE_FILE} nor {SERVER_FILE}. Give a kit's folder."
        )

    @property
    def key_file(self) -> Path:
        """The private key."""
        return self.folder / f"{self.role}.key"

    @property
    def request_file(self) -> Path:
        """The request, to be sent to the operator."""
        return self.folder / f"{self.role}.csr"

    @property
    def certificate_file(self) -> Path:
        """The certificate."""
        return self.folder / f"{self.role}.crt"

    def key(self) -> ec.EllipticCurvePrivateKey:
        """Read the private key.

        Raises:
            ConfigError: it is missing, damaged, of another kind, or others can read it.
        """
        name = self.key_file.name
        data = read_bytes(self.key_file, "Make it with `fedssl request KIT`.")
        if self.key_file.stat().st_mode & 0o077:
            raise ConfigError(f"{name} can be read by other users. Take their rights away: chmod 600 {name}")
        load = load_ssh_private_key if self.role == SITE_ROLE else load_pem_private_key
        try:
            key = load(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{name} is damaged, has a password or is of another kind. Restore it, or move it away, make a new one "
                "with `fedssl request KIT` and tell the operator that your key is lost."
            ) from error
        p384(key.public_key(), name)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


@dataclass(frozen=True)
class Requested:
    """A request that was written.

    Attributes:
        name: of the site, or ``server``.
        path: of the request.
        fingerprint: of its public key.
    """

    name: str
    path: Path
    fingerprint: str


def request(kit: Path, *, renew: bool = False) -> Requested:
    """Make private key and request in a kit.

    Args:
        kit: folder of a site's or the server's kit.
        renew: the key is there and stays, only the request is made anew.

    Raises:
        ConfigError: there is a key already, or (to renew) none.
        StorageError: the kit cannot be written.
    """
    who = Identity.of(kit)
    if renew:
        key = who.key()
    else:
        if who.key_file.exists():
            raise ConfigError(
                f"The kit has a key already, {who.key_file.name}. `fedssl request KIT --renew` makes a request with "
                "this key. If others may know it, move it out of the kit, run this again and tell the operator."
            )
        key = new_key()
        write_private(who.key_file, private_ssh(key) if who.role == SITE_ROLE else private_pem(key))
    ca = read_certificate(kit / CA_FILE, "Ask the operator for the kit as it was provisioned.")
    organisations = ca.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    consortium = str(organisations[0].value) if organisations else ""
    made = x509.CertificateSigningRequestBuilder().subject_name(subject_of(who.name, consortium))
    write_public(who.request_file, pem(made.sign(key, hashes.SHA384())), "the request")
    return Requested(who.name, who.request_file, fingerprint(key.public_key()))


def install(kit: Path, certificate: Path, now: datetime) -> Requested:
    """Put a signed certificate into a kit after seeing that it belongs there.

    Args:
        kit: folder of a site's or the server's kit.
        certificate: what the operator sent back.
        now: the time, with its zone.

    Raises:
        ConfigError: it does not belong there.
        StorageError: the kit cannot be written.
    """
    who = Identity.of(kit)
    ca = read_certificate(kit / CA_FILE, "Ask the operator for the kit as it was provisioned.")
    found = read_certificate(certificate, "Give the certificate that `fedssl sign` wrote.")
    key = who.key().public_key()
    if found == ca:
        raise ConfigError(
            f"{certificate.name} is the authority's own certificate. Give the one that it signed for you."
        )
    if reason := misfit(found, ca, who.role, who.name, now):
        raise ConfigError(f"{certificate.name} is not put into the kit: {reason}.")
    if found.public_key() != key:
        raise ConfigError(
            f"{certificate.name} is not put into the kit: it belongs to another key than {who.key_file.name}. Send the "
            f"present {who.request_file.name} to the operator and compare the fingerprints."
        )
    write_public(who.certificate_file, pem(found), "the certificate")
    return Requested(who.name, who.certificate_file, fingerprint(key))
