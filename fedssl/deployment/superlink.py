"""Flower's SuperLink and the commands that it takes, through Flower's own command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedssl
from fedssl.deployment.parts import FLOWER_ENVIRONMENT, Part
from fedssl.deployment.settings import CA_FILE, ServerKit
from fedssl.errors import ConfigError, FederationError, StorageError
from fedssl.storage import new_secret

_BIN = Path(sys.executable).parent
_HOUSE = Path(fedssl.__file__).resolve().parents[1]
_LINK = "kit"
_COMMAND_S = 60.0
_PACKED = ("fedssl", "server", "client", "configs")


def flower(name: str) -> str:
    """Give the path of one of Flower's commands, of this very installation."""
    return str(_BIN / name)


class SuperLink:
    """The SuperLink of a kit, on loopback.

    Args:
        kit: the server's.
    """

    def __init__(self, kit: ServerKit) -> None:
        self.kit = kit
        self.port = kit.inner_port
        self.home = kit.state / "flower"
        self.secret = kit.state / "superexec.secret"

    def prepare(self) -> None:
        """Write what the processes need: the secret, Flower's home, the bundle.

        Raises:
            ConfigError: fedssl was installed without its checkout.
            StorageError: the state folder cannot be written.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.kit.state.chmod(0o700)
            if not self.secret.exists():
                new_secret(self.secret, 0o600)
            ca = json.dumps(str(self.kit.folder / CA_FILE))
            (self.home / "config.toml").write_text(
                f'[superlink]\ndefault = "{_LINK}"\n\n[superlink.{_LINK}]\naddress = "127.0.0.1:{self.port}"\n'
                f"root-certificates = {ca}\n"
            )
            self._write_bundle()
        except OSError as error:
            text = f"The server's state folder cannot be written ({error.strerror}). Check its rights."
            raise StorageError(text) from error

    def _write_bundle(self) -> None:
        """Copy what runs at server and relays out of the checkout, so that nothing else is packed."""
        if not (_HOUSE / "pyproject.toml").exists() or not (_HOUSE / "configs").is_dir():
            raise ConfigError("fedssl was installed without its checkout; the server runs from one (pip install -e .).")
        shutil.rmtree(self.bundle, ignore_errors=True)
        for name in _PACKED:
            shutil.copytree(_HOUSE / name, self.bundle / name, ignore=shutil.ignore_patterns("__pycache__", "*.j2"))
        shutil.copy(_HOUSE / "pyproject.toml", self.bundle)

    @property
    def bundle(self) -> Path:
        """The folder that Flower packs."""
        return self.kit.state / "fedssl-app"

    def parts(self) -> list[Part]:
        """The SuperLink and the process that starts ServerApps."""
        folder, address = self.kit.folder, f"127.0.0.1:{self.port}"
        link = [
            flower("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port),
            "--ssl-ca-certfile", str(folder / CA_FILE), "--ssl-certfile", str(folder / "server.crt"),
            "--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth",
            "--database", str(self.kit.state / "superlink.db"), "--isolation", "process",
            "--superexec-auth-secret-file", str(self.secret), "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        starter = [
            flower("flower-superexec"), "--runtime-api-address", address, "--root-certificates", str(folder / CA_FILE),
            "--superexec-auth-secret-file", str(self.secret),
        ]  # fmt: skip
        return [
            Part("superlink", link, self.kit.state / "superlink.log", self.environment),
            Part("serverapp", starter, self.kit.state / "serverapp.log", self.environment),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Of Flower's processes and commands."""
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**FLOWER_ENVIRONMENT, "FLWR_HOME": str(self.home), "PATH": path, "NO_PROXY": "127.0.0.1"}

    def nodes(self) -> list[dict[str, Any]]:
        """List the registered nodes."""
        return list(self._ask("supernode", "list", _LINK).get("nodes", []))

    def register(self, site: str, public_key: str) -> int:
        """Register a site's key, in OpenSSH form, under its name; gives the node."""
        path = self.kit.state / "register.pub"
        path.write_text(public_key + "\n")
        return int(self._ask("supernode", "register", str(path), _LINK, "--name", site)["node-id"])

    def unregister(self, node: int) -> None:
        """Forget a node: its key is refused from now on."""
        self._ask("supernode", "unregister", str(node), _LINK)

    def start_run(self, overrides: str) -> int:
        """Submit the run; gives its number."""
        path = self.kit.state / "run.toml"
        path.write_text(f"overrides = {json.dumps(overrides)}\n")
        return int(self._ask("run", str(self.bundle), _LINK, "-c", str(path))["run-id"])

    def run_state(self, run: int) -> tuple[str, str]:
        """Tell how a run stands (pending, starting, running, finished:completed, finished:failed, ...) and why."""
        rows = self._ask("list", _LINK, "--run-id", str(run)).get("runs", [])
        return (str(rows[0]["status"]), str(rows[0]["status-details"])) if rows else ("unknown", "")

    def _ask(self, *words: str) -> dict[str, Any]:
        """Run one of Flower's commands.

        Raises:
            FederationError: it failed, or the SuperLink is not there.
        """
        command: Sequence[str] = [flower("flwr"), *words, "--format", "json"]
        what = " ".join(words[:2] if words[0] == "supernode" else words[:1])
        try:
            done = subprocess.run(  # noqa: S603 - our own command
                command, env={**os.environ, **self.environment}, cwd=self.kit.state, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=_COMMAND_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FederationError(f"Flower's command {what} did not end in {_COMMAND_S:.0f} s.") from error
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError as error:
            tail = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
            raise FederationError(f"Flower's command {what} failed: {tail[0][:200]}.") from error
        if not answer.get("success", False):
            reason = str(answer.get("error-message", "without a reason")).strip().splitlines()[-1]
            raise FederationError(f"Flower's command {what} failed: {reason}.")
        return answer
