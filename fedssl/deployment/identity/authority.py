"""The consortium's certificate authority: it signs, renews and revokes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedssl.deployment.identity.certificates import (
    SERVER_NAME,
    common_name,
    fingerprint,
    new_key,
    p384,
    pem,
    private_pem,
    public_key_bytes,
    read_bytes,
    read_certificate,
    write_private,
    write_public,
)
from fedssl.deployment.identity.consortium_rules import CONSORTIUM_FILE, check_consortium
from fedssl.deployment.identity.issued import Held, Record
from fedssl.deployment.identity.issuing import (
    authority_certificate,
    certificate_for,
    revocation_list,
    server_names,
    subject_of,
)
from fedssl.deployment.settings import CA_FILE, SERVER_FILE, Consortium
from fedssl.errors import ConfigError
from fedssl.storage import exclusive

REVOKED_FILE, RECORD_FILE, CA_KEY_FILE = "revoked.crl", "issued.jsonl", "ca.key"
_AUTHORITY = "Give the folder authority/ that `fedssl provision` made."


@dataclass(frozen=True)
class Issued:
    """A certificate that the authority signed.

    Attributes:
        name: of the site, or ``server``.
        fingerprint: of its public key.
        not_after: end of its validity.
        pem: the certificate.
        kind: ``first``, ``renewal`` (same key) or ``new key``.
    """

    name: str
    fingerprint: str
    not_after: datetime
    pem: bytes
    kind: str


@dataclass(frozen=True)
class Authority:
    """The folder ``ca.key ca.crt consortium.yaml issued.jsonl revoked.crl``.

    Attributes:
        folder: where it lies.
        consortium: whose sites it signs for.
        ca: its certificate.
    """

    folder: Path
    consortium: Consortium
    ca: x509.Certificate

    @classmethod
    def create(cls, folder: Path, consortium: Consortium, now: datetime) -> "Authority":
        """Make key, certificate, record and an empty revocation list in a folder that holds ``consortium.yaml``.

        Raises:
            ConfigError: there is an authority already.
            StorageError: the folder cannot be written.
        """
        key = new_key()
        write_private(folder / CA_KEY_FILE, private_pem(key))
        ca = authority_certificate(key, consortium.name, now)
        write_public(folder / CA_FILE, pem(ca), "the authority's certificate")
        write_private(folder / RECORD_FILE, b"")
        found = cls(folder, consortium, ca)
        found._write_revocations(now)
        return found

    @classmethod
    def open(cls, folder: Path) -> "Authority":
        """Open the authority's folder.

        Raises:
            ConfigError: it is none, or is damaged.
        """
        if not (folder / CA_KEY_FILE).exists():
            raise ConfigError(f"{folder.name or folder} holds no authority: {CA_KEY_FILE} is missing. {_AUTHORITY}")
        folder = folder.resolve()
        consortium = Consortium.read(folder / CONSORTIUM_FILE)
        check_consortium(consortium)
        return cls(folder, consortium, read_certificate(folder / CA_FILE, _AUTHORITY))

    @property
    def record(self) -> Record:
        """All certificates that were signed."""
        return Record(self.folder / RECORD_FILE)

    def sign(self, request: x509.CertificateSigningRequest, now: datetime, *, replace: bool = False) -> Issued:
        """Sign the request of the server or of a site.

        Args:
            request: with name and public key of the holder.
            now: begin of its validity.
            replace: a new key takes the place of one that is still valid; the old one is revoked.

        Raises:
            ConfigError: says why the request is refused.
        """
        name, key = self.examine(request)
        with self._locked():
            held, mine = self.record.read(), fingerprint(key)
            _check_key(name, mine, held)
            others = [one for one in held if one.name == name and one.key != mine and one.valid(now)]
            if others and not replace:
                raise ConfigError(
                    f"{name} has a certificate with another key, valid until {others[-1].not_after:%Y-%m-%d}: someone "
                    f"may want to take over its name. If {name} itself says by telephone that its key is lost, sign "
                    "with --replace; the old key is revoked then."
                )
            certificate = self._certificate(name, key, now)
            end = certificate.not_valid_after_utc
            self.record.add(Held(name, certificate.serial_number, mine, end), now)
            for one in others:
                self.record.revoke(one, now)
            self._write_revocations(now)
        known = {one.key for one in held if one.name == name}
        kind = "renewal" if mine in known else "new key" if known else "first"
        return Issued(name, mine, end, pem(certificate), kind)

    def examine(self, request: x509.CertificateSigningRequest) -> tuple[str, ec.EllipticCurvePublicKey]:
        """Give name and public key of a request that proves possession of its key; signs nothing.

        Raises:
            ConfigError: says why it cannot be signed.
        """
        try:
            name, found, own = common_name(request.subject), request.public_key(), request.is_signature_valid
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError("The request cannot be understood. Ask for one made by `fedssl request KIT`.") from error
        key = p384(found, "The request's key")
        if not own:
            raise ConfigError(
                f"The request of {name or 'nobody'} is not signed by its own key: it was changed on its way, or "
                "whoever made it does not hold the key. Ask for a new one."
            )
        if name != SERVER_NAME and name not in self.consortium.sites:
            raise ConfigError(
                f"The request is for {name or 'no name'}, which is no site of {self.consortium.name}; there are "
                f"{', '.join(self.consortium.sites)}. Add it to sites in the authority's {CONSORTIUM_FILE}, or ask the "
                "site to mend its name in site.yaml."
            )
        if public_key_bytes(key) == public_key_bytes(p384(self.ca.public_key(), CA_FILE)):
            raise ConfigError(
                f"The request of {name} holds the authority's own key. Ask for one with a key of its own."
            )
        return name, key

    def _certificate(self, name: str, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        last = self.ca.not_valid_after_utc
        if now >= last:
            raise ConfigError(f"The authority itself expired on {last:%Y-%m-%d}. Provision the consortium anew.")
        consortium = self.consortium
        hosts = server_names(consortium.host, consortium.also) if name == SERVER_NAME else ()
        end = min(now + timedelta(days=consortium.valid_days), last)
        return certificate_for(subject_of(name, consortium.name), key, self._issuer(), hosts, now, end)

    def revoke(self, name: str, now: datetime) -> int:
        """Revoke all certificates of a name, write the list, and tell how many they were.

        Args:
            name: of a site, or ``server``; empty: only the list is written, which renews its validity.
            now: the time.

        Raises:
            ConfigError: the name has no certificate.
        """
        with self._locked():
            mine = [one for one in self.record.read() if one.name == name]
            if name and not mine:
                raise ConfigError(f"{name} has no certificate. `fedssl certificates AUTHORITY` shows who has one.")
            fresh = [one for one in mine if one.revoked is None]
            for one in fresh:
                self.record.revoke(one, now)
            self._write_revocations(now)
        return len(fresh)

    def _write_revocations(self, now: datetime) -> None:
        revoked = [(one.serial, one.revoked) for one in self.record.read() if one.revoked]
        number = int(now.timestamp())  # grows, also if the record is restored from a backup
        listed = revocation_list(revoked, self._issuer(), number, now)
        write_public(self.folder / REVOKED_FILE, pem(listed), "the list of revoked certificates")

    def hand_to_server(self, issued: Issued | None = None) -> bool:
        """Copy the list, and a site's certificate, into the server's kit if it lies beside the authority.

        Args:
            issued: what was just signed.
        """
        server = self.folder.parent / SERVER_NAME
        if not (server / SERVER_FILE).exists():
            return False
        if issued and issued.name != SERVER_NAME:
            write_public(server / "sites" / f"{issued.name}.crt", issued.pem, "the certificate")
        listed = read_bytes(self.folder / REVOKED_FILE, _AUTHORITY)
        write_public(server / REVOKED_FILE, listed, "the list of revoked certificates")
        return True

    def _issuer(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        try:
            key = load_pem_private_key(read_bytes(self.folder / CA_KEY_FILE, _AUTHORITY), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{CA_KEY_FILE} is damaged, or has a password. Restore it from a backup.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.ca.public_key():
            raise ConfigError(f"{CA_KEY_FILE} does not belong to {CA_FILE}. Restore both from one backup.")
        return key, self.ca

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with exclusive(self.folder / ".lock"):
            yield


def _check_key(name: str, mine: str, held: list[Held]) -> None:
    same = [one for one in held if one.key == mine]
    if others := sorted({one.name for one in same} - {name}):
        raise ConfigError(
            f"The request of {name} holds the key of {others[0]}. Each needs a key of its own: ask {name}."
        )
    if any(one.revoked for one in same):
        raise ConfigError(
            f"The key in the request of {name} was revoked and is never signed again. Let {name} move its old key out "
            "of the kit and make a new one with `fedssl request KIT`."
        )
