"""docs/adding_a_method.md does what it says: two new files, nothing else, and the method trains in a federation."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
_BLOCK = re.compile(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMPARE = """
import torch
from lightly.loss import VICRegLoss
from fedssl.build import build_method
from fedssl.config import load
from fedssl.data.batches import ViewBatch
from fedssl.methods.base import project

method = build_method(load(["data.root=.", "encoder=tiny", "method=vicreg"])).double()
views = [torch.randn(6, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
loss = method.loss(ViewBatch(views, torch.zeros(2, 6, dtype=torch.long), torch.zeros(6, dtype=torch.long)))
theirs = VICRegLoss()(*project(method.encoder, method.projector, views))
print(float((loss.total - theirs).abs()))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the project with the files of the page."""
    copy = tmp_path_factory.mktemp("house")
    for room in ("fedssl", "configs", "server", "client", "simulations"):
        shutil.copytree(HOUSE / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = dict(_BLOCK.findall((HOUSE / "docs" / "adding_a_method.md").read_text()))
    assert sorted(Path(name).suffix for name in blocks) == [".py", ".yaml"]
    for name, text in blocks.items():
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    return copy


def _python(house, *arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=house, env=_environment(house), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment(house):
    return {**os.environ, "PYTHONPATH": str(house)}


def test_the_new_method_has_the_loss_of_its_paper(house):
    assert float(_python(house, "-c", _COMPARE)) < 1e-10


def test_the_new_method_trains_in_a_federation(house, tiny, tmp_path):
    run = tmp_path / "run"
    settings = [*tiny, "method=vicreg", "data.sites=[EAST,WEST]", f"run_dir={run}"]
    _python(house, "-c", "import sys; from simulations.run import simulate; simulate(sys.argv[1:])", *settings)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(math.isfinite(row[term]) for row in rows for term in ("loss", "invariance", "variance", "covariance"))


def test_the_new_files_pass_the_projects_own_checks(house):
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        command = [str(Path(sys.executable).with_name(tool[0])), *tool[1:], "--config", str(HOUSE / "pyproject.toml")]
        done = subprocess.run(
            [*command, str(house / "fedssl" / "methods" / "vicreg.py")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
