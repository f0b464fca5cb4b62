"""The files that people edit: ``consortium.yaml``, a server's ``server.yaml`` and a hospital's ``site.yaml``."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fedssl.errors import ConfigError

SERVER_FILE, SITE_FILE, POLICY_FILE = "server.yaml", "site.yaml", "policy.yaml"
CA_FILE = "ca.crt"


def read_settings(path: Path, known: Mapping[str, type | tuple[type, ...]], required: set[str]) -> dict[str, Any]:
    """Read a YAML mapping with known keys.

    Args:
        path: the file.
        known: type, or types, by key.
        required: keys that must be there.

    Raises:
        ConfigError: all that is wrong with it, in one sentence each.
    """
    name = path.name
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}). Give the folder that holds it.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is no YAML: {str(error).splitlines()[0]}. Mend it with an editor.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} holds no settings (key: value).")
    wrong = [_unknown(str(key), known) for key in content if key not in known]
    wrong += [f"{key} is missing" for key in sorted(required - content.keys())]
    wrong += [
        f"{key} is {value!r} where {_kinds(known[key])} is expected"
        for key, value in content.items()
        if key in known and value is not None and not isinstance(value, known[key])
    ]
    if wrong:
        raise ConfigError(f"{name}: {'; '.join(wrong)}.")
    return {key: value for key, value in content.items() if value is not None}


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key} is unknown" + (f" (do you mean {close[0]}?)" if close else f" (there are {', '.join(known)})")


def _kinds(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _texts(values: Any, what: str) -> tuple[str, ...]:  # noqa: ANN401 - whatever the YAML holds
    if not all(isinstance(value, str | int) for value in values):
        raise ConfigError(f"{what} must be a list of words.")
    return tuple(str(value) for value in values)


@dataclass(frozen=True)
class ServerKit:
    """What the operator's machine runs; ``folder`` is the kit, relative paths are below it.

    Attributes:
        folder: of the kit: ``ca.crt server.crt server.key server.yaml sites/ revoked.crl``.
        name: of the consortium.
        listen: address that the gate binds.
        port: that sites reach.
        plan: overrides of the run, equal for server and sites.
        run: run folder.
        state: folder of database, secrets, logs.
        retry_s: pause before a run that ended for want of sites is taken up again.
        give_up_h: hours without a finished round after which the server stops and says so.
        largest_mb: of one HTTP message, in 10^6 bytes.
        inner_port: of the SuperLink, on loopback; by default the one after ``port``.
    """

    folder: Path
    name: str
    listen: str
    port: int
    plan: tuple[str, ...]
    run: Path
    state: Path
    retry_s: float = 60.0
    give_up_h: float = 72.0
    largest_mb: float = 1000.0
    inner_port: int = 0

    @classmethod
    def read(cls, folder: Path) -> "ServerKit":
        """Read ``server.yaml`` of a kit.

        Raises:
            ConfigError: says what is wrong with it.
        """
        number = (int, float)
        known: dict[str, type | tuple[type, ...]] = {
            "name": str, "listen": str, "port": int, "plan": list, "run": str, "state": str, "retry_s": number,
            "give_up_h": number, "largest_mb": number, "inner_port": int,
        }  # fmt: skip
        found = read_settings(folder / SERVER_FILE, known, {"name", "port", "plan"})
        folder = folder.resolve()
        return cls(
            folder, found["name"], found.get("listen", "0.0.0.0"), found["port"],  # noqa: S104 - sites must reach it
            _texts(found["plan"], "server.yaml: plan"), folder / found.get("run", "run"),
            folder / found.get("state", "state"), float(found.get("retry_s", cls.retry_s)),
            float(found.get("give_up_h", cls.give_up_h)), float(found.get("largest_mb", cls.largest_mb)),
            found.get("inner_port", found["port"] + 1),
        )  # fmt: skip

    @property
    def certificates(self) -> Path:
        """Folder of the sites' certificates, ``NAME.crt`` each."""
        return self.folder / "sites"


_NODE_KEYS = {  # key of site.yaml: key of the agent's own node configuration (see build_site.build_agent)
    "labels": "labels", "label": "label", "burned_in": "burned-in", "patient_from": "patient-from", "start": "start",
    "patients": "patients", "workers": "workers", "budget_gb": "budget-gb",
}  # fmt: skip


@dataclass(frozen=True)
class SiteKit:
    """What a hospital runs; relative paths are below ``folder``.

    Attributes:
        folder: of the kit: ``ca.crt site.crt site.key site.yaml policy.yaml``.
        site: its name in the consortium.
        server: ``HOST:PORT`` of the gate.
        data: folder of images, or a PACS.
        state: folder of the agent: egress manifest, logs.
        socket: the agent's Unix socket.
        agent_user: who holds data and key.
        relay_user: who runs code that came from the server; must not be able to read the data.
        plan: overrides that the consortium agreed on.
        node_port: port on loopback between node and relay.
        node: further keys of the agent's node configuration.
    """

    folder: Path
    site: str
    server: str
    data: str
    state: Path
    socket: Path
    agent_user: str
    relay_user: str
    plan: tuple[str, ...]
    node_port: int = 9094
    node: Mapping[str, str | int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "SiteKit":
        """Read ``site.yaml`` of a kit.

        Raises:
            ConfigError: says what is wrong with it.
        """
        known: dict[str, type | tuple[type, ...]] = {
            "site": (str, int), "server": str, "data": str, "state": str, "socket": str, "agent_user": str,
            "relay_user": str, "plan": list, "node_port": int, **dict.fromkeys(_NODE_KEYS, (str, int)),
        }  # fmt: skip
        found = read_settings(folder / SITE_FILE, known, {"site", "server", "data", "plan"})
        folder = folder.resolve()
        data = str(found["data"])
        if "://" not in data:
            data = str(folder / Path(data).expanduser())
        return cls(
            folder, str(found["site"]), found["server"], data, folder / found.get("state", "state"),
            folder / found.get("socket", "relay/agent.sock"), found.get("agent_user", "fedssl-agent"),
            found.get("relay_user", "fedssl-relay"), _texts(found["plan"], "site.yaml: plan"),
            found.get("node_port", cls.node_port),
            {theirs: found[ours] for ours, theirs in _NODE_KEYS.items() if ours in found},
        )  # fmt: skip

    def node_config(self) -> dict[str, str | int]:
        """Give the agent's own node configuration: where the images are and what the hospital says of them."""
        return {"site": self.site, "data-dir": self.data, **self.node}


@dataclass(frozen=True)
class Consortium:
    """``consortium.yaml``: who trains what together.

    Attributes:
        name: of the consortium: letters, digits, hyphens.
        host: name or address by which sites reach the server.
        also: further names and addresses of the server, for its certificate.
        port: of the server.
        sites: names.
        plan: Hydra overrides of the run.
        valid_days: of certificates.
        contact: whom to write to.
    """

    name: str
    host: str
    port: int
    sites: tuple[str, ...]
    plan: tuple[str, ...]
    also: tuple[str, ...] = ()
    valid_days: int = 365
    contact: str = ""

    @classmethod
    def read(cls, path: Path) -> "Consortium":
        """Read a ``consortium.yaml``.

        Raises:
            ConfigError: says what is wrong with it.
        """
        known: dict[str, type | tuple[type, ...]] = {
            "name": str, "host": str, "port": int, "sites": list, "plan": list, "also": list, "valid_days": int,
            "contact": str,
        }  # fmt: skip
        assert set(known) == {one.name for one in fields(cls)}
        found = read_settings(path, known, {"name", "host", "port", "sites", "plan"})
        for key in ("sites", "plan", "also"):
            found[key] = _texts(found.get(key, ()), f"{path.name}: {key}")
        return cls(**found)
