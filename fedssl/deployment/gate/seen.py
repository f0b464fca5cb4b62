"""What the gate saw of each site: when, whether it is admitted, how many bytes went each way."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from fedssl import progress
from fedssl.errors import StorageError
from fedssl.storage import write_json


@dataclass
class _Site:
    time: str = ""
    state: str = ""
    bytes_up: int = 0
    bytes_down: int = 0


class Seen:
    """Counts by site, kept in a file; what an earlier gate counted goes on. Whoever serves calls ``write``.

    Args:
        path: of the file ``{site: {time, state, bytes_up, bytes_down}}``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sites = _kept(path)
        self._changed = self._failed = False

    def note(self, site: str, state: str) -> None:
        """A site was heard."""
        found = self._sites.setdefault(site, _Site())
        found.time, found.state = datetime.now(UTC).isoformat(timespec="seconds"), state
        self._changed = True

    def add(self, site: str, *, up: int = 0, down: int = 0) -> None:
        """Count bytes of bodies from and to a site that was heard."""
        found = self._sites[site]
        found.bytes_up += up
        found.bytes_down += down
        self._changed = True

    async def write(self) -> None:
        """Write the file if something changed; a full disk does not stop the gate."""
        if not self._changed:
            return
        self._changed = False
        content = {name: asdict(site) for name, site in self._sites.items()}
        try:
            await run_in_threadpool(write_json, self.path, content, "the list of seen sites")
            self._failed = False
        except StorageError as error:
            self._changed = True
            if not self._failed:
                progress.publish(progress.Note(str(error), alarm=True))
            self._failed = True


def _kept(path: Path) -> dict[str, _Site]:
    found: dict[str, _Site] = {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        for name, one in json.loads(path.read_bytes()).items():
            found[name] = _Site(str(one["time"]), str(one["state"]), int(one["bytes_up"]), int(one["bytes_down"]))
    return found
