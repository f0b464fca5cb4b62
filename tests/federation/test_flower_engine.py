"""``flwr run`` on Flower's own engine (SuperLink, Ray) against the in-process simulation."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedssl.checkpoint import load_checkpoint
from fedssl.run_folder import RunFolder
from simulations.run import simulate

HOUSE = Path(__file__).parents[2]


@pytest.fixture
def flower(tmp_path):
    """The environment of a Flower home of its own; its SuperLink is stopped at the end."""
    home = tmp_path / "flwr-home"
    home.mkdir()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    yield environment
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"FLWR_HOME={home}".encode() in (process / "environ").read_bytes()
        except OSError:
            continue
        if mine:
            os.kill(int(process.name), signal.SIGTERM)


_EVERYTHING = [
    "aggregation=adam", "local=ema", "federation.equipartition=federated-sinkhorn", "federation.sinkhorn_iterations=2",
    "federation.precision=bfloat16", "federation.prototype_patients=2",
]  # fmt: skip


@pytest.mark.federation
@pytest.mark.parametrize("more", [[], _EVERYTHING], ids=["plain", "every message there is"])
def test_flwr_run_and_the_in_process_simulation_end_with_equal_bits(tiny, tmp_path, flower, more):
    simulate([*tiny, *more, f"run_dir={tmp_path / 'ours'}"])
    overrides = " ".join([*tiny, *more, f"run_dir={tmp_path / 'flower'}"])
    done = subprocess.run(
        ["flwr", "run", HOUSE, "local", "--stream", "-c", f'overrides="{overrides}"', "--federation-config",
         "num-supernodes=4 client-resources-num-cpus=1"],
        env=flower, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    last = RunFolder(tmp_path / "flower").last
    assert last.exists(), done.stdout + done.stderr
    ours, theirs = load_checkpoint(RunFolder(tmp_path / "ours").last), load_checkpoint(last)
    assert theirs.round == 2
    assert ours.state.keys() == theirs.state.keys()
    for name, value in ours.state.items():
        assert torch.equal(value, theirs.state[name]), name
