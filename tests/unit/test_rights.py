"""The relay's user must not be able to read the data: tried with real users, where the tests may become others."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fedssl.deployment import rights
from fedssl.deployment.rights import check_rights, check_users, prepare, secret_of
from fedssl.deployment.settings import SiteKit
from fedssl.errors import ConfigError

AGENT, RELAY = "daemon", "nobody"


def kit_of(folder, **changed):
    own = {"agent_user": AGENT, "relay_user": RELAY} | changed
    return SiteKit(folder, "A", "localhost:1", str(folder / "data"), folder / "state", folder / "relay" / "a.sock",
                   own["agent_user"], own["relay_user"], ())  # fmt: skip


@pytest.fixture
def kit(monkeypatch):
    """A kit whose folders both users can reach; the system's Python tries what they can read."""
    if os.getuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("only root can become other users, who need the system's Python")
    monkeypatch.setattr(rights.sys, "executable", "/usr/bin/python3")
    folder = Path(tempfile.mkdtemp(prefix="fedssl-rights-"))
    folder.chmod(0o711)
    (folder / "data").mkdir(mode=0o700)
    (folder / "site.key").touch(mode=0o600)
    found = kit_of(folder)
    prepare(found, one_user=False)
    os.chown(folder / "data", 1, 1)
    yield found
    shutil.rmtree(folder)


def test_a_kit_that_was_prepared_lets_each_user_do_what_it_must_and_no_more(kit):
    check_rights(kit, "", one_user=False)
    assert secret_of(kit).stat().st_mode & 0o777 == 0o640
    assert len(secret_of(kit).read_bytes()) == 32
    assert rights.can_read(secret_of(kit), RELAY)
    assert not rights.can_read(kit.state, RELAY)
    before = secret_of(kit).read_bytes()
    prepare(kit, one_user=False)
    assert secret_of(kit).read_bytes() == before


@pytest.mark.parametrize("thing", ["data", "site.key", "state"])
def test_a_site_does_not_start_while_the_relays_user_can_read_what_it_must_not(kit, thing):
    (kit.folder / thing).chmod(0o755 if thing != "site.key" else 0o644)
    with pytest.raises(ConfigError, match=r"The relay's user nobody can read .*chmod o-rwx"):
        check_rights(kit, "", one_user=False)


def test_a_site_does_not_start_where_the_agents_user_cannot_read_images_or_key(kit):
    os.chown(kit.folder / "data", 0, 0)
    with pytest.raises(ConfigError, match=r"data in site\.yaml is no folder that daemon can read"):
        check_rights(kit, "", one_user=False)
    os.chown(kit.folder / "data", 1, 1)
    (kit.folder / "site.key").unlink()
    with pytest.raises(ConfigError, match=r"site\.key is not there or not readable"):
        check_rights(kit, "", one_user=False)


def test_a_user_who_cannot_run_python_is_told_where_to_install_it(kit, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_bytes(b"")
    python.chmod(0o600)
    monkeypatch.setattr(rights.sys, "executable", str(python))
    with pytest.raises(ConfigError, match="cannot run the Python of this installation"):
        check_rights(kit, "", one_user=False)


def test_one_user_for_both_is_refused_but_for_a_trial_that_says_so(tmp_path, heard):
    kit = kit_of(tmp_path, relay_user=AGENT)
    with pytest.raises(ConfigError, match="are one user"):
        check_users(kit, "", one_user=False)
    check_users(kit, "", one_user=True)
    assert any("code which the server sends could read the data" in event.text for event in heard)


@pytest.mark.parametrize(("only", "uid", "expected"), [
    ("", 1, "start `fedssl site` as root"), ("relay", 1, "--only relay is for the user nobody"),
    ("agent", 65534, "--only agent is for the user daemon"), ("node", 0, "--only node is unknown"),
])  # fmt: skip
def test_who_may_start_what_is_said(tmp_path, monkeypatch, only, uid, expected):
    monkeypatch.setattr(rights.os, "getuid", lambda: uid)
    with pytest.raises(ConfigError, match=expected):
        check_users(kit_of(tmp_path), only, one_user=False)
