"""A consortium of real processes on loopback: the server's kit, the sites' kits, and who may be killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import yaml

from fedssl.deployment.identity.provision import provision
from fedssl.deployment.settings import Consortium, SiteKit

AGENT_USER, RELAY_USER = "daemon", "nobody"  # users of every Linux: no user is made for a test
HOUSE = Path(__file__).parents[2]
KINDS = {
    "serverapp": re.compile(r"flwr-serverapp"),
    "superlink": re.compile(r"flower-superlink"),
    "node": re.compile(r"flower-supernode"),
    "relay": re.compile(r"flwr-clientapp"),
    "agent": re.compile(r"fedssl\.deployment\.agent"),
}


def python_for_others(folder):
    """A Python with this one's packages that other users can run too; None where there is none.

    The Python of the tests may lie in a home folder that nobody else enters. Then one of the system with the same
    version takes its packages.
    """
    if os.getuid() != 0:
        return None
    system = Path("/usr/bin") / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (Path(sys.executable), _borrowing(folder, system)):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "PYTHONPATH": str(HOUSE), "HOME": "/nonexistent"}
            for user in (AGENT_USER, RELAY_USER):
                words = [str(python), "-c", "import fedssl.frames, torch"]
                subprocess.run(words, user=user, cwd="/", check=True, capture_output=True, env=environment)
            return python
    return None


def _borrowing(folder, system):
    """A virtual environment of ``system`` with the packages and commands of this one."""
    packages = Path(sysconfig.get_paths()["purelib"])
    own = folder / "venv" / "lib" / system.name / "site-packages"
    own.mkdir(parents=True)
    (own / "borrowed.pth").write_text(f"{packages}\n")
    (folder / "venv" / "pyvenv.cfg").write_text(f"home = {system.parent}\n")
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(system)
    for command in [*Path(sys.executable).parent.glob("flwr*"), *Path(sys.executable).parent.glob("flower-*")]:
        copy = python.parent / command.name
        copy.write_text(f"#!{python}\n" + command.read_text().partition("\n")[2])
        copy.chmod(0o755)
    return python


def free_ports(count):
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unused in sockets:
            unused.bind(("127.0.0.1", 0))
        return [unused.getsockname()[1] for unused in sockets]


class RealConsortium:
    """Kits and processes; everything is stopped and removed at the end.

    Args:
        data: folder of each site's images, by site; copied, so that only the agent's user reads it.
        plan: overrides.

    Each site has two users where other users can run Python on this machine; else one, as in a trial.
    """

    def __init__(self, data, plan):
        self.folder = Path(tempfile.mkdtemp(prefix="fedssl-consortium-"))
        self.folder.chmod(0o711)
        found = python_for_others(self.folder)
        self.users = users = found is not None
        self.command = [str(found or sys.executable), "-m", "fedssl.cli"]
        port, inner, *node_ports = free_ports(2 + len(data))
        told = Consortium("trial", "localhost", port, tuple(data), tuple(plan))
        provision(told, self.folder / "kits", all_in_one=True)
        self.server = self.folder / "kits" / "server"
        self.change(self.server / "server.yaml", inner_port=inner, listen="127.0.0.1", retry_s=1)
        self.sites = {}
        for (site, images), node_port in zip(data.items(), node_ports, strict=True):
            kit = self.sites[site] = self.folder / "kits" / "sites" / site
            private = self.folder / "data" / site
            shutil.copytree(images, private)
            private.parent.chmod(0o711)
            for parent in (self.folder / "kits", kit.parent, kit):
                parent.chmod(0o711)
            own = {"data": str(private), "node_port": node_port, "agent_user": AGENT_USER, "relay_user": RELAY_USER}
            self.change(kit / "site.yaml", **own)
            if users:
                private.chmod(0o700)
                for path in [private, *private.rglob("*"), kit / "site.key"]:
                    shutil.chown(path, AGENT_USER)
        self.processes = {}

    @staticmethod
    def change(path, **values):
        """Change keys of a YAML file."""
        content = yaml.safe_load(path.read_text()) | values
        path.write_text(yaml.safe_dump(content))

    @property
    def environment(self):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDSSL_", "FLWR_"))}
        return kept | {"OMP_NUM_THREADS": "1", "FEDSSL_TEST": str(self.folder), "PYTHONPATH": str(HOUSE)}

    def start(self, name, *words):
        """Start a fedssl command; its words are in NAME.log."""
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [*self.command, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment,
            cwd=self.folder, start_new_session=True,
        )  # fmt: skip
        return self.processes[name]

    def start_server(self):
        return self.start("server", "server", str(self.server))

    def start_site(self, site):
        return self.start(site, "site", str(self.sites[site]), *([] if self.users else ["--one-user"]))

    def start_all(self):
        self.start_server()
        for site in self.sites:
            self.start_site(site)

    def wait(self, limit_s, each=lambda: None):
        """Wait for the server's end; its exit code."""
        deadline = time.monotonic() + limit_s
        while (code := self.processes["server"].poll()) is None:
            assert time.monotonic() < deadline, f"No end in {limit_s} s\n{self.words()}"
            each()
            time.sleep(0.2)
        return code

    def wait_until(self, true, limit_s, what):
        """Wait for a condition."""
        deadline = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < deadline, f"{what}: not in {limit_s} s\n{self.words()}"
            time.sleep(0.2)

    def said(self, name):
        """All that a command printed."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def words(self, lines=25):
        """The last lines of every log."""
        logs = [
            *self.folder.glob("*.log"),
            *self.server.glob("state/*.log"),
            *self.folder.glob("kits/sites/*/state/*.log"),
        ]
        return "\n".join(
            f"--- {log.relative_to(self.folder)}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in sorted(logs)
        )

    def rounds(self):
        """Finished rounds."""
        path = self.server / "run" / "round_metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def outcome(self):
        return json.loads((self.server / "run" / "outcome.json").read_text())

    def kit(self, site):
        return SiteKit.read(self.sites[site])

    def pids(self, kind=None):
        """Processes of this consortium, of one kind or all: found by a mark in their environment or their parent."""
        mark, found = f"FEDSSL_TEST={self.folder}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode().replace("\0", " ")
                mine = mark in (process / "environ").read_bytes().split(b"\0") or str(self.folder) in words
                home = b"FLWR_HOME=/tmp/fedssl-relay-" in (process / "environ").read_bytes()
                if (mine or home) and (kind is None or KINDS[kind].search(words)):
                    found.append(int(process.name))
        return sorted(found)

    def kill(self, pid):
        """Kill -9; whether there was something to kill."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def stop(self):
        """Stop what runs."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()
        for pid in self.pids():
            self.kill(pid)
        if not os.environ.get("FEDSSL_KEEP"):
            shutil.rmtree(self.folder, ignore_errors=True)
