"""The gate's process: who may pass is read from the kit's certificates, again and again. Run by ``fedssl server``."""

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedssl.deployment.gate.app import GateSettings
from fedssl.deployment.gate.callers import Admission
from fedssl.deployment.gate.serving import run_gate
from fedssl.deployment.identity.admission import admitted
from fedssl.deployment.identity.certificates import p384, public_key_bytes, read_certificate
from fedssl.deployment.settings import CA_FILE, ServerKit
from fedssl.errors import ConfigError


def roll_of(kit: ServerKit) -> Mapping[bytes, Admission]:
    """Give all keys that have a certificate in the kit, admitted or not, with the reason.

    Args:
        kit: the server's.
    """
    there, refused = admitted(kit.certificates, kit.folder / CA_FILE, kit.folder / "revoked.crl", datetime.now(UTC))
    found = {one.public_key_bytes: Admission(one.name, "admitted", "", one.not_after) for one in there}
    for site, reason in refused.items():
        try:
            certificate = read_certificate(kit.certificates / f"{site}.crt", "")
            key = public_key_bytes(p384(certificate.public_key(), site))
        except ConfigError:
            continue  # nobody can ask with a key that is not there
        if key not in found:
            found[key] = Admission(site, _state(certificate, reason), reason, certificate.not_valid_after_utc)
    return found


def _state(certificate: x509.Certificate, reason: str) -> str:
    if "revoked" in reason.lower():
        return "revoked"
    return "expired" if certificate.not_valid_after_utc < datetime.now(UTC) else "refused"


def main() -> None:
    """Run the gate of the kit that the command line names, until it is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kit", type=Path)
    parser.add_argument("--fingerprint", default=None)
    arguments = parser.parse_args()
    kit = ServerKit.read(arguments.kit)
    run_gate(GateSettings.of(kit, arguments.fingerprint), lambda: roll_of(kit))


if __name__ == "__main__":
    main()
