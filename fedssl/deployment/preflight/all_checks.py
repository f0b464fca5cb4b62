"""``fedssl preflight``: what a hospital looks at before it joins. Each check ends in time and stops no other."""

import contextlib
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import fedssl
from fedssl.deployment.agent import own_folders
from fedssl.deployment.preflight.checks import clock, plan, policy, server, users, version
from fedssl.deployment.preflight.images import decode, index, round_time
from fedssl.deployment.preflight.look import Look
from fedssl.deployment.preflight.machine import disk, gpu
from fedssl.deployment.preflight.report import FAIL, UNKNOWN, Finding, Report
from fedssl.deployment.preflight.report import report_json as report_json
from fedssl.deployment.preflight.report import write_page as write_page
from fedssl.deployment.settings import SiteKit
from fedssl.deployment.users import account, own_name, uid_of
from fedssl.errors import FedsslError
from fedssl.storage import cache_folder

Check = Callable[[Look], Finding]
CHECKS: dict[str, tuple[Check, float]] = {  # the longest time of each, in seconds
    "server": (server, 60.0),
    "version": (version, 5.0),
    "clock": (clock, 5.0),
    "plan": (plan, 60.0),
    "policy": (policy, 120.0),
    "users": (users, 60.0),
    "disk": (disk, 120.0),
    "gpu": (gpu, 60.0),
    "index": (index, 300.0),
    "decode": (decode, 120.0),
    "round": (round_time, 900.0),
}
_AS_AGENT = frozenset({"disk", "index", "decode", "round"})  # what they make on the disk must be the agent's


def preflight(kit: SiteKit, *, images: int = 200, one_user: bool = False) -> Report:
    """Look at all that a site needs to join.

    Args:
        kit: the site's.
        images: most files that are decoded anew, to measure how fast that is.
        one_user: a trial, in which this very user runs agent and relay.
    """
    if one_user:
        kit = replace(kit, agent_user=own_name(), relay_user=own_name())
    own_folders(kit)
    look = Look(kit, images, one_user=one_user)
    findings = []
    for name, (check, limit_s) in CHECKS.items():
        try:
            with _as_agent(kit) if name in _AS_AGENT else contextlib.nullcontext():
                findings.append(_checked(name, check, look, limit_s))
        except FedsslError as error:  # there is no such user, as the check of the users says
            findings.append(Finding(name, UNKNOWN, f"This is seen with the rights of the agent's user. {error}"))
    system = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    return Report(
        kit.site, kit.server, datetime.now(UTC), fedssl.__version__, system, look.private, findings, _hidden(kit)
    )


def _checked(name: str, check: Check, look: Look, limit_s: float) -> Finding:
    """Run a check for so long at most; what hangs on a dead network drive is left behind."""
    done: list[Finding] = []

    def work() -> None:
        try:
            done.append(check(look))
        except FedsslError as error:
            done.append(_failed(name, error))
        except Exception as error:  # noqa: BLE001 - one check never stops the others, and its text may hold a path
            found = f"The check failed with an unforeseen {type(error).__name__}."
            done.append(Finding(name, FAIL, found, "Tell the operator, who can ask the makers of fedssl."))

    thread = threading.Thread(target=work, daemon=True, name=f"preflight-{name}")
    thread.start()
    thread.join(limit_s)
    if done:
        return done[0]
    found = f"This took longer than {limit_s:.0f} s and was left alone."
    return Finding(name, UNKNOWN, found, "See whether the disk answers, and whether another fedssl works there.")


def _failed(name: str, error: FedsslError) -> Finding:
    """Turn an error into a finding; what a site says of itself to the server begins with a verb."""
    text = str(error)
    text = f"This site {text}" if text[:1].islower() and not text.startswith("data in ") else text
    return Finding(name, FAIL, text if text.endswith((".", "?")) else f"{text}.")


@contextlib.contextmanager
def _as_agent(kit: SiteKit) -> Iterator[None]:
    """Where root looks, look with the rights of the agent's user, and leave nothing in its folders that is root's."""
    if os.getuid() != 0 or uid_of(kit.agent_user) == 0:
        yield
        return
    record, groups = account(kit.agent_user), os.getgroups()
    os.setgroups(os.getgrouplist(record.pw_name, record.pw_gid))
    os.setegid(record.pw_gid)
    os.seteuid(record.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _hidden(kit: SiteKit) -> tuple[tuple[str, str], ...]:
    """List what names this machine, its folders and its users, and the words that stand for them."""
    folders = {
        kit.data: "DATA", str(kit.folder): "KIT", str(kit.state): "STATE", str(cache_folder()): "CACHE",
        str(Path.home()): "HOME", str(Path.cwd()): "HERE", **{str(value): key.upper() for key, value in _files(kit)},
    }  # fmt: skip
    names = {
        Path(kit.data).name: "DATA", kit.data.rpartition("//")[2].partition("/")[0]: "PACS",
        socket.gethostname(): "HOST", own_name(): "USER", kit.agent_user: "AGENT", kit.relay_user: "RELAY",
    }  # fmt: skip
    public = {kit.site, kit.server, kit.server.rpartition(":")[0], "", "/", "localhost"}
    return tuple((own, word) for own, word in {**names, **folders}.items() if own not in public)


def _files(kit: SiteKit) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in kit.node.items() if key in {"labels", "start"}]
