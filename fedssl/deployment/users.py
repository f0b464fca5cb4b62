"""The users of this machine: who this process is, and how a process is started as another."""

import contextlib
import os
import pwd
from typing import Any

from fedssl.errors import ConfigError


def uid_of(user: str) -> int:
    """Give the number of a user, by name or number.

    Raises:
        ConfigError: there is no such user on this machine.
    """
    try:
        return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise ConfigError(
            f"There is no user {user} on this machine. Make it (useradd --system {user}), or name another in site.yaml."
        ) from error


def own_name() -> str:
    """Name of the user who runs this process, or its number."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


def account(user: str) -> pwd.struct_passwd:
    """Give what the system knows of a user, by name or number.

    Raises:
        ConfigError: there is no such user on this machine.
    """
    try:
        return pwd.getpwuid(uid_of(user))
    except KeyError as error:
        raise ConfigError(f"The user with the number {user} has no name on this machine. Name another.") from error


def started_as(user: str | None) -> dict[str, Any]:
    """Give the arguments with which ``subprocess`` starts a process as another user; None: as this one.

    Raises:
        ConfigError: there is no such user on this machine.
    """
    if user is None:
        return {}
    found = account(user)
    groups = os.getgrouplist(found.pw_name, found.pw_gid)
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": groups}
