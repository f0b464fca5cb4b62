"""Who may do what at a hospital: the relay must not read the data, and each user must reach what it needs."""

import os
import subprocess
import sys
from pathlib import Path

from fedssl import progress
from fedssl.deployment.settings import SITE_FILE, SiteKit
from fedssl.deployment.users import account, own_name, started_as, uid_of
from fedssl.errors import ConfigError, StorageError
from fedssl.storage import new_secret

AGENT, RELAY = "agent", "relay"
_KEY = "site.key"


def check_users(kit: SiteKit, only: str, *, one_user: bool) -> None:
    """See that agent and relay are run by two users, and this process by one who may start them.

    Args:
        kit: the site's.
        only: what is started: ``agent``, ``relay`` or empty for all.
        one_user: a trial.

    Raises:
        ConfigError: says which users are wrong.
    """
    if only not in {"", AGENT, RELAY}:
        raise ConfigError(f"--only {only} is unknown; there are {AGENT} and {RELAY}.")
    if one_user:
        text = "Trial: one user runs relay and agent, so that code which the server sends could read the data."
        progress.publish(progress.Note(text, alarm=True))
        return
    if uid_of(kit.agent_user) == uid_of(kit.relay_user):
        raise ConfigError(
            "agent_user and relay_user in site.yaml are one user. The relay must not be able to read the data."
        )
    wanted = {AGENT: kit.agent_user, RELAY: kit.relay_user}.get(only)
    if os.getuid() == 0:
        return
    if wanted is None:
        raise ConfigError(
            "Agent and relay run as two users: start `fedssl site` as root, or each by its own user with --only agent "
            "and --only relay (see the systemd units in the kit), or try it with --one-user."
        )
    if os.getuid() != uid_of(wanted):
        raise ConfigError(f"--only {only} is for the user {wanted} (site.yaml); this is {own_name()}.")


def prepare(kit: SiteKit, *, one_user: bool) -> None:
    """Make the folders, and the secret by which the relay may fetch messages from the node.

    Raises:
        StorageError: a folder cannot be made or given to its user.
    """
    room = kit.socket.parent
    secret = secret_of(kit)
    try:
        kit.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        room.mkdir(mode=0o750, parents=True, exist_ok=True)
        if not secret.exists():
            new_secret(secret, 0o640)
        if one_user:
            return
        owner, group = uid_of(kit.agent_user), account(kit.relay_user).pw_gid
        for path in (room, secret):
            os.chown(path, owner, group, follow_symlinks=False)
        room.chmod(0o2750)  # what is made in it belongs to the relay's group: the socket
        if os.getuid() == 0:
            for path in (kit.state, kit.folder / "site.key"):
                os.chown(path, owner, -1, follow_symlinks=False)
    except OSError as error:
        raise StorageError(
            f"The kit's folders cannot be prepared ({error.strerror}). Let {kit.agent_user} own the kit and be in the "
            f"group of {kit.relay_user}: usermod -aG {kit.relay_user} {kit.agent_user}"
        ) from error


def secret_of(kit: SiteKit) -> Path:
    """Where the secret lies that node and relay share."""
    return kit.socket.parent / "superexec.secret"


_CAN_READ = (
    "import os, sys; p = sys.argv[1]; ok = os.access(p, os.R_OK) and (not os.path.isdir(p) or os.access(p, os.X_OK)); "
    "sys.exit(0 if ok else 1)"
)
_CAN_ENTER = (
    "import os, sys; p = sys.argv[1]; ok = os.access(p, os.R_OK) or (os.path.isdir(p) and os.access(p, os.X_OK)); "
    "sys.exit(0 if ok else 1)"
)


def can_read(path: Path, user: str | None, *, at_all: bool = False) -> bool:
    """Try whether a user can read a path; None: the user of this process.

    With ``at_all`` a folder that it may enter counts too: who knows the name of a file in it can read that.

    Raises:
        ConfigError: that user cannot even run this Python.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-I", "-c", _CAN_ENTER if at_all else _CAN_READ, str(path)],
            check=False,
            capture_output=True,
            cwd="/",
            **started_as(user if os.getuid() == 0 else None),
        )
    except PermissionError as error:
        raise ConfigError(
            f"The user {user} cannot run the Python of this installation. Install fedssl where all users may read, for "
            "example below /opt, with a Python that is not in somebody's home folder."
        ) from error
    return done.returncode == 0


def check_rights(kit: SiteKit, only: str, *, one_user: bool) -> None:
    """Try whether each user can do what it must, and the relay cannot do what it must not.

    Raises:
        ConfigError: says whose rights to change.
    """
    if only != RELAY:
        _agent_can(kit, None if one_user else kit.agent_user)
    if not one_user and only != AGENT:
        _relay_cannot(kit)


def _is_folder(kit: SiteKit) -> bool:
    return "://" not in kit.data


def _agent_can(kit: SiteKit, user: str | None) -> None:
    name = user or own_name()
    if _is_folder(kit) and not can_read(Path(kit.data), user):
        raise ConfigError(f"data in {SITE_FILE} is no folder that {name} can read. Mend it or its rights.")
    if not can_read(kit.folder / _KEY, user):
        raise ConfigError(
            f"{_KEY} is not there or not readable. Make it with `fedssl request KIT`; it belongs to {name} (mode 600)."
        )


def _relay_cannot(kit: SiteKit) -> None:
    forbidden = {kit.folder / _KEY: _KEY, kit.state: f"{kit.state.name}/ of the kit"}
    if _is_folder(kit):
        forbidden[Path(kit.data)] = "the data"
    for path, what in forbidden.items():
        if can_read(path, kit.relay_user, at_all=True):
            raise ConfigError(
                f"The relay's user {kit.relay_user} can read {what}; code that the server sends could too. Take the "
                "right away (chmod o-rwx, and no group in common)."
            )
    if not can_read(kit.socket.parent, kit.relay_user):
        raise ConfigError(
            f"The relay's user {kit.relay_user} cannot enter {kit.socket.parent.name}/ of the kit. Start the agent "
            "first; let the relay's user pass all folders above (chmod o+x), or move the kit to /srv or /opt."
        )
