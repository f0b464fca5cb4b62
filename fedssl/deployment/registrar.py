"""Keeps the SuperLink's list of nodes equal to the certificates of the kit: registered, expired, revoked."""

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from fedssl import progress
from fedssl.deployment.identity.admission import admitted
from fedssl.deployment.settings import CA_FILE, ServerKit
from fedssl.deployment.superlink import SuperLink
from fedssl.errors import FederationError
from fedssl.storage import write_json

_TAKEN = "already in use"


class Registrar:
    """Registers and unregisters sites.

    Args:
        kit: the server's.
        link: its SuperLink.
    """

    def __init__(self, kit: ServerKit, link: SuperLink) -> None:
        self.kit = kit
        self.link = link
        self.path = kit.state / "nodes.json"
        self.settled: dict[str, str] | None = None  # site: public key, when all was equal
        self.told: dict[str, str] = {}

    def renew(self) -> None:
        """Register who is admitted and not known, unregister who is known and not admitted.

        Raises:
            FederationError: a command of Flower failed; what was done until then stays.
        """
        there, refused = admitted(
            self.kit.certificates, self.kit.folder / CA_FILE, self.kit.folder / "revoked.crl", datetime.now(UTC)
        )
        wanted = {one.name: one.public_key_ssh.strip() for one in there}
        for site, reason in refused.items():
            if self.told.get(site) != reason:
                progress.publish(progress.Note(f"Site {site} is not admitted: {reason}", alarm=True))
        self.told = dict(refused)
        if not wanted and refused:  # one list of revoked that cannot be read: the gate refuses, nobody is forgotten
            return
        if self.settled != wanted:
            self._equalise(wanted)
            self.settled = wanted

    def _equalise(self, wanted: dict[str, str]) -> None:
        there = {int(node["node-id"]) for node in self.link.nodes() if node.get("status") != "unregistered"}
        known = {site: node for site, node in self._known().items() if node["node"] in there}
        for site, node in list(known.items()):
            if wanted.get(site) != node["key"]:
                self.link.unregister(node["node"])
                del known[site]
                self._keep(known)
                progress.publish(progress.Note(f"Site {site} was unregistered"))
        for site, key in wanted.items():
            if site not in known:
                known[site] = {"node": self._register(site, key, there, known), "key": key}
                self._keep(known)
                progress.publish(progress.Note(f"Site {site} was registered"))

    def _register(self, site: str, key: str, there: set[int], known: dict[str, dict[str, Any]]) -> int:
        """Register a key; one that a killed server registered and did not note is found again."""
        try:
            return self.link.register(site, key)
        except FederationError as error:
            left = there - {int(node["node"]) for node in known.values()}
            if _TAKEN not in str(error) or len(left) != 1:
                raise
            return left.pop()

    def _known(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self.path.read_bytes()))
        return {}

    def _keep(self, known: dict[str, dict[str, Any]]) -> None:
        write_json(self.path, known, "the server's list of nodes")
