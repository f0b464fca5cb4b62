"""The authority's durable record of the certificates that it signed and revoked, ``issued.jsonl``."""

import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError
from fedssl.storage import append_durably

_REMEDY = "Restore it from a backup: without it nobody knows which names and keys are taken or revoked."


@dataclass(frozen=True)
class Held:
    """What the record says of one certificate.

    Attributes:
        name: of the site, or ``server``.
        serial: number of the certificate.
        key: fingerprint of the public key.
        not_after: end of its validity.
        revoked: when it was revoked; None if it was not.
    """

    name: str
    serial: int
    key: str
    not_after: datetime
    revoked: datetime | None = None

    def valid(self, now: datetime) -> bool:
        """Tell whether it is still good."""
        return self.revoked is None and now < self.not_after


@dataclass(frozen=True)
class Record:
    """The file.

    Attributes:
        path: where it lies.
    """

    path: Path

    def add(self, one: Held, now: datetime) -> None:
        """Write down a certificate, before anyone gets it."""
        self._append({
            "event": "issued", "name": one.name, "serial": f"{one.serial:x}", "key": one.key,
            "not_after": one.not_after.isoformat(), "at": now.isoformat(timespec="seconds"),
        })  # fmt: skip

    def revoke(self, one: Held, now: datetime) -> None:
        """Write down that a certificate is revoked, before the list says so."""
        at = now.isoformat(timespec="seconds")
        self._append({"event": "revoked", "name": one.name, "serial": f"{one.serial:x}", "at": at})

    def _append(self, row: dict[str, Any]) -> None:
        append_durably(self.path, (json.dumps(row) + "\n").encode(), "the record of certificates")

    def read(self) -> list[Held]:
        """List all certificates, oldest first.

        Raises:
            ConfigError: the record is missing or damaged.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise ConfigError(f"{self.path.name} cannot be read ({reason}). {_REMEDY}") from error
        if text and not text.endswith("\n"):
            raise ConfigError(
                f"{self.path.name}: the last line was cut off when the command that wrote it was killed. Nothing of it "
                "was handed out: remove this one line with an editor and run that command again."
            )
        found = dict[int, Held]()
        for number, line in enumerate(text.splitlines(), 1):
            try:
                _apply(json.loads(line), found)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.path.name}: line {number} is damaged. {_REMEDY}") from error
        return list(found.values())


def _apply(row: dict[str, Any], found: dict[int, Held]) -> None:
    serial = int(row["serial"], 16)
    if row["event"] == "issued":
        end = datetime.fromisoformat(row["not_after"])
        found[serial] = Held(row["name"], serial, row["key"], end)
    elif row["event"] == "revoked":
        found[serial] = replace(found[serial], revoked=datetime.fromisoformat(row["at"]))
    else:
        raise ValueError(row["event"])
