"""SIGKILL of the server or of a site, whatever it does: a run that is resumed ends as one that nobody disturbed."""

import json
import multiprocessing
import operator
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch
from doomed import doomed
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedssl import progress
from fedssl.checkpoint import load_checkpoint
from fedssl.config import as_text
from fedssl.run_folder import RunFolder
from simulations.processes import SpoolGrid, process_context, run_in_processes, run_server, serve_site

CONFIGURATIONS = [  # overrides on top of the tiny federation's
    ["federation.rounds=6"],
    [
        "federation.rounds=5", "aggregation=adam", "local=ema", "federation.participation=0.67", "collapse.reseed=true",
        "federation.equipartition=federated-sinkhorn", "federation.precision=bfloat16",
    ],
]  # fmt: skip
KILLS = -(-60 // len(CONFIGURATIONS))  # of each configuration
KILLS_IN_A_RUN = 10
SITES = ["EAST", "SOUTH", "WEST"]
SERVER, NODES = 1, range(2, 2 + len(SITES))
PATIENCE_S = 120.0  # for an undisturbed run, many times what it needs
SERVER_AIMS = [("", 14), ("checkpoints/", 7), ("metrics.jsonl", 7)]  # files, and how many operations on them
VARIES = {"time", "seconds", "images_per_s", "data_wait"}  # between any two runs


class Federation:
    """A server and its sites, in processes that die at random moments. The sites live on from run to run."""

    def __init__(self, overrides, folder, seed):
        self.overrides, self.folder, self.rng = overrides, folder, np.random.default_rng(seed)
        self.spool, self.log = folder / "spool", folder / "operations"
        self.spool.mkdir()
        self.processes, self.doomed, self.killed, self.most_kills = {}, {}, Counter(), 0

    def __enter__(self):
        for node in NODES:
            self.start(node)
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.kill()
            process.join(10)

    def start(self, who):
        """Start the server (again) or a site; some will kill themselves at one of their operations on files."""
        if who == SERVER:
            begun = (self.run_dir / "environment.json").exists()
            overrides = [*self.overrides, f"run_dir={self.run_dir}", "resume=true" if begun else "overwrite=true"]
            settings = (run_server, self.spool, list(NODES), as_text(overrides))
            (aim, most), share = SERVER_AIMS[self.rng.integers(len(SERVER_AIMS))], 1 / 2
            aim = f"{self.run_dir}/{aim}"
        else:
            node_config = {"partition-id": who - NODES[0], "num-partitions": len(NODES)}
            settings = (serve_site, self.spool, who, node_config, {"overrides": as_text(self.overrides)})
            aim, most, share = "/state/", 8, 1 / 4
        self.doomed[who] = self.killed.total() < self.most_kills and self.rng.random() < share
        due = int(self.rng.integers(1, most)) if self.doomed[who] else 0
        arguments = (settings[0], due, aim, self.log, *settings[1:])
        self.processes[who] = process_context().Process(target=doomed, args=arguments)
        self.processes[who].start()

    def run(self, name, kills=0, typical_s=0.0):
        """Run to the end, with at most about so many kills on the way; gives the seconds that it took."""
        begun, self.run_dir, self.most_kills = time.monotonic(), self.folder / name, self.killed.total() + kills
        self.start(SERVER)
        while True:
            more = self.killed.total() < self.most_kills
            if self.wait(self.rng.uniform(0.0, typical_s / 2) if more else PATIENCE_S):
                return time.monotonic() - begun
            assert more, f"The run takes longer than {PATIENCE_S} s"
            others = [who for who in [SERVER] * len(NODES) + [*NODES] if not self.doomed[who]]
            if others:
                self.kill(int(self.rng.choice(others)))

    def wait(self, seconds):
        """Wait so long, and start again whoever dies; whether the server is done."""
        deadline = time.monotonic() + seconds
        while True:
            who_by_sentinel = {process.sentinel: who for who, process in self.processes.items()}
            ended = wait(list(who_by_sentinel), max(0.0, deadline - time.monotonic()))
            if not ended:
                return False
            for who in [who_by_sentinel[sentinel] for sentinel in ended]:
                self.processes[who].join()
                if who == SERVER and self.processes[who].exitcode == 0:
                    del self.processes[SERVER]
                    return True
                self.bury(who)

    def kill(self, who):
        """Kill a process at this moment; one that has ended just before is for ``wait``."""
        self.processes[who].kill()
        self.processes[who].join(10)
        if self.processes[who].exitcode == -signal.SIGKILL:
            self.bury(who)

    def bury(self, who):
        """Count a kill and start again; a process that ended in another way is a defect."""
        code = self.processes[who].exitcode
        assert code == -signal.SIGKILL, f"Node {who} (the server is {SERVER}) ended with exit code {code}"
        self.killed["server" if who == SERVER else "site"] += 1
        self.start(who)


def rows(path):
    """All lines of a metrics file, each of which must be whole, by round and site."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(line["round"], line.get("site", "")): line for line in lines}
    assert [(line["round"], line.get("site", "")) for line in lines] == sorted(found), f"{path.name} has other rows"
    return found


def differences(first, second):
    """Names of the figures that differ, with round and site; those that vary between any two runs are left out."""
    first, second = rows(first), rows(second)
    assert first.keys() == second.keys()
    assert all(first[key].keys() == second[key].keys() for key in second)
    return [
        (*key, name, first[key][name], value)
        for key, row in second.items()
        for name, value in row.items()
        if name not in VARIES and first[key][name] != value
    ]


def unequal(first, second):
    """Names of all that differs between two checkpoints, bit for bit; the random name of the run does not count."""
    first, second = (
        {
            (room, name): value
            for room, content in vars(checkpoint).items()
            for name, value in (content.items() if isinstance(content, Mapping) else [("", content)])
        }
        for checkpoint in (first, second)
    )
    assert first.keys() == second.keys()
    same = {True: torch.equal, False: operator.eq}
    compared = second.keys() - {("run", "")}
    return [key for key in sorted(compared) if not same[torch.is_tensor(second[key])](first[key], second[key])]


def assert_same(run_dir, undisturbed):
    """The same bits, the same figures, nothing left behind."""
    killed, whole = RunFolder(run_dir), RunFolder(undisturbed)
    for name in ("last", "best"):
        assert unequal(load_checkpoint(getattr(killed, name)), load_checkpoint(getattr(whole, name))) == []
    assert [number for number, _ in rows(killed.round_metrics)] == list(range(1, load_checkpoint(whole.last).round + 1))
    assert differences(killed.metrics, whole.metrics) == []
    assert differences(killed.round_metrics, whole.round_metrics) == []
    assert sorted(path.name for path in killed.last.parent.iterdir()) == ["best.safetensors", "last.safetensors"]


@pytest.fixture
def overrides(tiny, tmp_path_factory):
    """Of the tiny federation; the images' store is named, as the fork server keeps its own environment."""
    store = tmp_path_factory.getbasetemp() / "cache"
    waits = ["federation.deadline_s=100", "federation.wait_s=100"]
    return [*tiny, f"data.store={store}", f"data.sites=[{','.join(SITES)}]", *waits]


@pytest.mark.federation
@pytest.mark.parametrize("more", CONFIGURATIONS, ids=lambda more: " ".join(more) or "plain")
def test_a_federation_that_is_killed_again_and_again_ends_as_one_that_nobody_disturbed(overrides, more, tmp_path):
    begun, runs = time.monotonic(), 0
    with Federation([*overrides, *more], tmp_path, seed=len(" ".join(more))) as federation:
        federation.run("whole")
        typical_s = federation.run("again")
        assert_same(tmp_path / "again", tmp_path / "whole")
        while federation.killed.total() < KILLS:
            runs += 1
            federation.run(f"killed-{runs}", min(KILLS_IN_A_RUN, KILLS - federation.killed.total()), typical_s)
            assert_same(tmp_path / f"killed-{runs}", tmp_path / "whole")
            assert runs < 5 * KILLS, "The kills hit nobody"
        assert federation.killed.total() >= KILLS
    words = f"{federation.killed} in {runs} runs, {time.monotonic() - begun:.0f} s ({typical_s:.1f} s each)"
    sys.stdout.write(f"\n{words}; at operations: {Counter((tmp_path / 'operations').read_text().splitlines())}\n")


@pytest.mark.federation
def test_a_federation_of_processes_ends_with_the_bits_of_one_in_a_single_process(overrides, tmp_path):
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.grid import run_in_process

    overrides, sites = [*overrides, "data.sites=[EAST,WEST]"], 2
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    run_in_process(server_app, client_app, sites=sites, overrides=as_text([*overrides, f"run_dir={alone}"]))
    run_in_processes(sites=sites, overrides=as_text([*overrides, f"run_dir={apart}"]))
    assert_same(apart, alone)


def test_a_dead_site_is_named_and_an_interrupted_federation_leaves_nothing_behind(overrides, tmp_path, monkeypatch):
    def disturb(event):
        if "take part" in str(event):
            multiprocessing.active_children()[0].kill()
        if "ended with exit code -9" in str(event):
            raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stop = progress.listen(disturb)
    overrides = [*overrides, "data.sites=[EAST,WEST]", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(sites=2, overrides=as_text(overrides))
    stop()
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob("fedssl-spool-*")) == []


def test_a_server_that_is_started_again_drops_what_was_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)
    message = Message(RecordDict(), 2, "train", ttl=10.0)
    (name,) = SpoolGrid(tmp_path, [2]).push_messages([message])
    assert [path.name for path in (tmp_path / "inbox" / "2").iterdir()] == [name]
    grid = SpoolGrid(tmp_path, [2])
    assert list((tmp_path / "inbox" / "2").iterdir()) == []
    assert list(grid.pull_messages([name])) == []
