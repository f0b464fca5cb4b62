"""``fedssl site``: the hospital's side. Agent and node run as the user who holds data and key, the relay as another."""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from fedssl import progress
from fedssl.deployment.agent import own_folders
from fedssl.deployment.gate.hello import hello
from fedssl.deployment.parts import FLOWER_ENVIRONMENT, Part, Parts, stopped_by_signals
from fedssl.deployment.rights import AGENT, RELAY, check_rights, check_users, prepare, secret_of
from fedssl.deployment.settings import CA_FILE, SiteKit
from fedssl.deployment.superlink import flower
from fedssl.deployment.users import uid_of
from fedssl.errors import FedsslError
from fedssl.storage import write_json

_LOOK_S, _TELL_S, _GREET_S, _RETRY_S = 0.5, 5.0, 60.0, 15.0


def run_site(folder: Path, *, only: str = "", one_user: bool = False) -> None:
    """Run the hospital's processes until stopped.

    Args:
        folder: of the kit.
        only: ``agent`` (agent and node) or ``relay``, where each is started by its own user; empty: all.
        one_user: let this very user run all: for trials, because code that the server sends could then read the data.

    Raises:
        ConfigError: the kit, the users or the rights are not as they must be.
    """
    kit = SiteKit.read(folder)
    check_users(kit, only, one_user=one_user)
    home = Path(tempfile.mkdtemp(prefix="fedssl-relay-"))
    try:
        with stopped_by_signals():
            if only != RELAY:
                prepare(kit, one_user=one_user)
            check_rights(kit, only, one_user=one_user)
            if os.getuid() == 0 and not one_user:
                os.chown(home, uid_of(kit.relay_user), -1)
            _keep(kit, _parts(kit, only, home, one_user=one_user), greet=only != RELAY)
    except KeyboardInterrupt:
        progress.publish(progress.Note("Stopped."))
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _parts(kit: SiteKit, only: str, home: Path, *, one_user: bool) -> list[Part]:
    root = os.getuid() == 0 and not one_user
    agent, relay = (kit.agent_user, kit.relay_user) if root else (None, None)
    own_folders(kit)
    environment = {**FLOWER_ENVIRONMENT, "FLWR_HOME": str(kit.state / "flower"), "HOME": str(kit.state)}
    trial = ["--one-user"] if one_user else []
    found = []
    if only != RELAY:
        command = [sys.executable, "-m", "fedssl.deployment.agent", str(kit.folder), *trial]
        found = [
            Part("agent", command, kit.state / "agent.log", {"HOME": str(kit.state)}, agent),
            Part("node", _node(kit), kit.state / "node.log", environment, agent),
        ]
    if only != AGENT:
        command = [
            flower("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{kit.node_port}", "--insecure",
            "--superexec-auth-secret-file", str(secret_of(kit)),
        ]  # fmt: skip
        bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
        bare |= {**FLOWER_ENVIRONMENT, "FLWR_HOME": str(home), "HOME": str(home)}
        log = (home if only == RELAY else kit.state) / "relay.log"
        found.append(Part("relay", command, log, bare, relay, inherits=False))
    return found


def _node(kit: SiteKit) -> list[str]:
    return [
        flower("flower-supernode"), "--superlink", kit.server, "--root-certificates", str(kit.folder / CA_FILE),
        "--auth-supernode-private-key", str(kit.folder / "site.key"), "--isolation", "process",
        "--host", "127.0.0.1", "--port", str(kit.node_port), "--superexec-auth-secret-file", str(secret_of(kit)),
        "--node-config", f'site="{kit.site}" socket="{kit.socket}"',
    ]  # fmt: skip


def _keep(kit: SiteKit, found: list[Part], *, greet: bool) -> None:
    """Keep the parts alive; the node starts when the server knows this site."""
    parts = Parts([part for part in found if part.name != "node"])
    node = Parts([part for part in found if part.name == "node"])
    due, told, said, met = 0.0, 0.0, "", not greet
    try:
        while True:
            parts.check()
            if greet and time.monotonic() >= due:
                met, said = _greet(kit, said, met=met)
                due = time.monotonic() + (_GREET_S if said == "" else _RETRY_S)
            if met:
                node.check()
            if greet and time.monotonic() >= told:
                _tell(kit, said, parts, node)
                told = time.monotonic() + _TELL_S
            time.sleep(_LOOK_S)
    finally:
        for one in (node, parts):
            one.stop()


def _greet(kit: SiteKit, said: str, *, met: bool) -> tuple[bool, str]:
    """Ask the server whether it knows this site; say what is wrong once, and when it is well again."""
    try:
        answer = hello(kit.folder, kit.server, kit.folder / CA_FILE, kit.folder / "site.key")
    except FedsslError as error:
        if str(error) != said:
            text = f"{error} Trying again every {_RETRY_S:.0f} s."
            progress.publish(progress.Note(text, alarm=True))
        return met, str(error)
    if said or not met:
        text = f"The server of {answer.consortium} knows this site, {answer.site}; its SuperLink is {answer.superlink}."
        progress.publish(progress.Note(text))
    return True, ""


def _tell(kit: SiteKit, said: str, *kept: Parts) -> None:
    states = {name: state for parts in kept for name, state in parts.states().items()}
    state = "cannot reach the server" if said else "running"
    write_json(kit.state / "site.json", {"state": state, "reason": said, "parts": states}, "the site's state")
