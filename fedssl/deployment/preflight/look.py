"""What one check before joining finds out for those after it."""

import itertools
import os
import shlex
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedssl.build import build_method, first_state
from fedssl.build_images import image_store, root_of
from fedssl.build_privacy import is_private
from fedssl.config import REMOTE, Config
from fedssl.data.store import Store
from fedssl.deployment.gate.hello import Hello
from fedssl.deployment.settings import SiteKit
from fedssl.deployment.users import own_name
from fedssl.errors import DataError
from fedssl.packing import HALVES
from fedssl.site.agent import SiteAgent
from fedssl.site.rules import Rules
from fedssl.storage import cache_folder

_WALK_S = 5.0
_FULL_DTYPE = "torch.float32"


@dataclass
class Look:
    """What is known so far; None: not yet, or not at all.

    Attributes:
        kit: the site's.
        images: most files to decode anew.
        hello: the server's answer.
        config: what the kit's plan composes.
        rules: the policy.
        agent: as it would answer the server.
        one_user: a trial, in which one user runs agent and relay.
    """

    kit: SiteKit
    images: int
    hello: Hello | None = None
    config: Config | None = None
    rules: Rules | None = None
    agent: SiteAgent | None = None
    one_user: bool = False

    @property
    def private(self) -> bool:
        """Whether no count may be told; also where nobody knows."""
        return self.config is None or is_private(self.config, self.kit.site)

    def plan(self) -> Config:
        """Give the composed plan of a check that comes after it."""
        assert self.config is not None
        return self.config

    @cached_property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Bytes of each tensor that is shared, in memory and on the wire."""
        config = self.plan()
        half = str(config["federation"]["precision"]) in HALVES
        found = {}
        for name, value in first_state(config, build_method(config)).items():
            size = value.numel() * value.element_size()
            found[name] = (size, size // 2 if half and str(value.dtype) == _FULL_DTYPE else size)
        return found

    @property
    def model_bytes(self) -> int:
        """Bytes of the shared state in memory."""
        return sum(size for size, _ in self.tensors.values())

    @cached_property
    def store(self) -> Store | None:
        """Where the agent would look for the index; None where a PACS was never mirrored.

        Raises:
            DataError: the data are not there.
        """
        config, kit = self.plan(), self.kit
        own = {
            "store": None, "filters": None, "burned_in": str(kit.node.get("burned-in", "refuse")),
            "patient_from": str(kit.node.get("patient-from", "auto")), "worker_memory_gb": 8.0,
            "decode_timeout_s": 60.0, "budget_gb": None,
        }  # fmt: skip
        config = {**config, "data": {**config["data"], **own}}
        if kit.data.startswith(REMOTE):
            if not any(cache_folder().glob("pacs-*/images/pacs")):
                return None
        elif not os.access(kit.data, os.R_OK, effective_ids=True):
            raise DataError(
                "data in site.yaml is no folder and no manifest that the agent can read. Mend it, or its rights."
            )
        return image_store(config, root_of(config, kit.data, site=kit.site), site=kit.site)

    @property
    def indexed(self) -> bool:
        """Whether the images were indexed with the settings of kit and plan."""
        return self.store is not None and self.store.pointer.exists()

    def files(self) -> tuple[int, bool]:
        """Count files below the data for a few seconds; and whether that was all."""
        end, count = time.monotonic() + _WALK_S, 0
        if self.kit.data.startswith(REMOTE) or not Path(self.kit.data).is_dir():
            return 0, False
        for _, folders, names in os.walk(self.kit.data, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            count += sum(not name.startswith(".") for name in names)
            if time.monotonic() > end:
                return count, False
        return count, True

    def index_command(self) -> str:
        """Write the command that indexes the images as the agent would."""
        config, kit = self.plan(), self.kit
        words = ["env", f"FEDSSL_CACHE={cache_folder()}", "fedssl", "index", kit.data, "--site", kit.site]
        words += [f"data.edge={config['data']['edge']}"]
        own = ("burned-in", "patient-from", "workers", "budget-gb")
        words += [f"data.{key.replace('-', '_')}={kit.node[key]}" for key in own if key in kit.node]
        if kit.agent_user == own_name():
            return shlex.join(words)
        command = shlex.join(["sudo", "-u", kit.agent_user, *words])
        if kit.state.exists():
            return command
        made = ["sudo", "install", "-d", "-m", "700", "-o", kit.agent_user, str(kit.state)]
        return f"{shlex.join(made)} && {command}"


def differences(here: tuple[str, ...], there: tuple[str, ...]) -> list[str]:
    """Say which overrides only one side has."""
    only = ((one, "only here", there) for one in here), ((one, "only at the server", here) for one in there)
    return [f"{one} ({where})" for one, where, others in itertools.chain(*only) if one not in others]
