"""A federation of real Flower processes on loopback for one measurement; nothing of it is left behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

_HOUSE = Path(__file__).parents[1]
_APP = "simulations.flower_benchmark_app"
_MARK = "FEDSSL_BENCHMARK"  # environment variable by which every process of a job is found again
_STOP_S = 15.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        loop: ``ours`` (fedssl) or ``theirs`` (Flower's FedAvg): the modules of ``simulations.flower_benchmark_app``.
        sites: number of SuperNodes.
        rounds: of the federation.
        megabytes: size of the state, in 10^6 bytes of float32.
        precision: of the values on their way.
    """

    loop: str
    sites: int
    rounds: int
    megabytes: float
    precision: str = "float32"


@dataclass
class Outcome:
    """What a job gave.

    Attributes:
        figures: written by the ServerApp: ``before_mb``, ``peak_mb``, ``ru_maxrss_mb`` and one entry a round.
        state: the final state.
        processes: by kind: how many there were, the highest peak memory of one, and the CPU seconds of all, sampled
            once a second.
        seconds: from the start of the first process to the result.
    """

    figures: dict[str, Any]
    state: dict[str, Tensor]
    processes: dict[str, dict[str, float]]
    seconds: float


@dataclass
class _Usage:
    kind: str = ""
    peak_mb: float = 0.0
    cpu_s: float = 0.0


@dataclass
class _Crew:
    """The processes of a job, and what each has used."""

    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    usage: dict[int, _Usage] = field(default_factory=dict)

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own commands
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
                env=self.environment, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def sample(self) -> None:
        for process in left_behind(self.folder):
            with contextlib.suppress(OSError, StopIteration, IndexError):
                self.usage[int(process.name)] = _read_usage(process)

    def stop(self) -> None:
        for process in reversed(self.started):
            process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        deadline = time.monotonic() + _STOP_S
        while (left := left_behind(self.folder)) and time.monotonic() < deadline:
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(other.name), signal.SIGKILL)
            time.sleep(0.1)
        for process in self.started:
            process.poll()


def left_behind(folder: Path) -> list[Path]:
    """List the processes of the job in ``folder`` that still run, as folders in ``/proc``."""
    mark = f"{_MARK}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def _read_usage(process: Path) -> _Usage:
    words = (process / "cmdline").read_bytes().decode().split("\0")
    kind = next(Path(word).name for word in words if Path(word).name.startswith(("flower-", "flwr")))
    status = (process / "status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    times = (process / "stat").read_text().rpartition(")")[2].split()
    return _Usage(kind, peak * 1024 / 1e6, (int(times[11]) + int(times[12])) / _TICKS)


def run_job(job: Job, folder: Path, limit_s: float) -> Outcome:
    """Run one job with fresh processes.

    Args:
        job: what to measure.
        folder: empty; bundle, logs and results go there.
        limit_s: seconds after which it is given up.

    Raises:
        RuntimeError: it did not end well; holds the last lines of every log.
    """
    result = folder / "result.json"
    begin = time.monotonic()
    with _crew(folder) as crew:
        link, *ports = _free_ports(1 + job.sites)
        _write_home(folder, link)
        _write_bundle(job, folder, result)
        address = f"127.0.0.1:{link}"
        crew.start("superlink", ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link)])
        _wait_for_port(link, begin + limit_s)
        for number, port in enumerate(ports, start=1):
            crew.start(
                f"supernode-{number}",
                ["flower-supernode", "--insecure", "--superlink", address, "--host", "127.0.0.1",
                 "--port", str(port), "--node-config", f"number={number}"],
            )  # fmt: skip
        run = crew.start("flwr-run", ["flwr", "run", "bundle", "bench", "--stream"])
        while not result.exists() and run.poll() is None and time.monotonic() < begin + limit_s:
            crew.sample()
            time.sleep(1.0)
        seconds = time.monotonic() - begin
    if not result.exists():
        raise RuntimeError(f"{job} did not end well in {seconds:.0f} s\n{_tails(folder)}")
    state = load_file(result.with_suffix(".safetensors"))
    return Outcome(json.loads(result.read_text()), state, _by_kind(crew.usage), seconds)


@contextlib.contextmanager
def _crew(folder: Path) -> Iterator[_Crew]:
    environment = {
        **os.environ,
        _MARK: str(folder),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_HOUSE),
    }
    crew = _Crew(folder, environment)
    try:
        yield crew
    finally:
        crew.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unused in sockets:
            unused.bind(("127.0.0.1", 0))
        return [int(unused.getsockname()[1]) for unused in sockets]


def _wait_for_port(port: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.2)


def _write_home(folder: Path, port: int) -> None:
    (folder / "home").mkdir(parents=True)
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )


def _write_bundle(job: Job, folder: Path, result: Path) -> None:
    """Copy the app out of the house, so that Flower packs nothing else."""
    room = folder / "bundle" / Path(*_APP.split("."))
    shutil.copytree(_HOUSE / room.relative_to(folder / "bundle"), room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_HOUSE / "simulations" / "__init__.py", room.parent)
    (folder / "bundle" / "pyproject.toml").write_text(
        '[project]\nname = "bench"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = ["flwr"]\n\n'
        '[tool.flwr.app]\npublisher = "fedssl"\nfab-include = ["simulations/**/*.py"]\n\n'
        f'[tool.flwr.app.components]\nserverapp = "{_APP}.{job.loop}:server"\n'
        f'clientapp = "{_APP}.{job.loop}:client"\n\n'
        f"[tool.flwr.app.config]\nsites = {job.sites}\nrounds = {job.rounds}\nmegabytes = {float(job.megabytes)}\n"
        f'precision = "{job.precision}"\nresult = {json.dumps(str(result))}\n'
    )


def _tails(folder: Path, lines: int = 15) -> str:
    logs = sorted(folder.glob("*.log"))
    return "\n".join(
        f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs
    )


def _by_kind(usage: dict[int, _Usage]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for one in usage.values():
        row = table.setdefault(one.kind, {"count": 0, "peak_mb": 0.0, "cpu_s": 0.0})
        row["count"] += 1
        row["peak_mb"] = max(row["peak_mb"], one.peak_mb)
        row["cpu_s"] += one.cpu_s
    return table
