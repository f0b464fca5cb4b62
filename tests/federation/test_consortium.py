"""A consortium as hospitals deploy it: real processes on loopback, with TLS, keys, two users at each site."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import torch

from fedssl.checkpoint import load_checkpoint
from fedssl.run_folder import RunFolder
from fedssl.site.egress import verify
from simulations.run import simulate
from tests.federation.consortium import HOUSE, RealConsortium

LIMIT_S = 420.0
SITES = ("DU", "FG", "HT")
PLAN = [
    "+experiment=brain_mr", "encoder=tiny", "data.edge=48", "augment.crops.global.edge=40", "heads.num_prototypes=16",
    "augment.crops.local.edge=16", "augment.crops.local.count=1", "heads.hidden=32", "heads.width=16",
    "training.precision=float32", "training.local_steps=3", "training.batch_size=32", "training.threads=1",
    "federation.rounds=3", "federation.sites=[DU,FG,HT]", "federation.min_sites=3", "federation.wait_s=240",
    "federation.deadline_s=240",
]  # fmt: skip


@pytest.fixture
def hospitals_of(brain_mr):
    return {site: brain_mr / site for site in SITES}


def assert_same_state(run, other):
    first, second = load_checkpoint(RunFolder(run).last), load_checkpoint(RunFolder(other).last)
    assert first.round == second.round == 3
    assert first.state.keys() == second.state.keys()
    for name, value in second.state.items():
        assert torch.equal(first.state[name], value), name


class Meter:
    """A TCP proxy that counts the bytes of both directions, and knows nothing of what they are."""

    def __init__(self, port):
        self.port_behind, self.up, self.down = port, 0, 0
        self.line = socket.create_server(("127.0.0.1", 0))
        self.port = self.line.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near = self.line.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.port_behind))
            except OSError:  # the gate is not there yet
                near.close()
                continue
            threading.Thread(target=self.pump, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self.pump, args=(far, near, "down"), daemon=True).start()

    def pump(self, source, sink, name):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.federation
def test_real_hospitals_end_with_the_bits_of_the_simulation_and_their_manifests_tell_all_that_left(
    brain_mr, hospitals_of, tmp_path, capsys
):
    simulate([f"data.root={brain_mr}", *PLAN, "simulation.arms=[federated]", f"run_dir={tmp_path / 'alone'}"])
    with RealConsortium(hospitals_of, PLAN) as consortium:
        meter = Meter(int(consortium.kit("DU").server.rpartition(":")[2]))
        consortium.change(consortium.sites["DU"] / "site.yaml", server=f"localhost:{meter.port}")
        consortium.start_all()
        assert consortium.wait(LIMIT_S) == 0, consortium.words()
        assert_same_state(consortium.server / "run", tmp_path / "alone")
        for site in SITES:
            entries = manifest(consortium, site)
            assert [(entry["kind"], entry["round"]) for entry in entries] == [
                ("presence", 0), ("train", 1), ("train", 2), ("train", 3),
            ]  # fmt: skip
        words = [*consortium.command, "egress", str(consortium.sites["DU"])]
        shown = subprocess.run(words, env=consortium.environment, check=True, capture_output=True, text=True)
        assert "4 messages, chain verified" in shown.stdout
        consortium.stop()
        told = sum(entry["frame_bytes"] for entry in manifest(consortium, "DU"))
        overhead = meter.up - told
        with capsys.disabled():
            sys.stdout.write(f"\nOn the socket {meter.up} bytes left, {told} of them in the manifest, ")
            sys.stdout.write(f"overhead of the protocol {overhead} ({overhead / told:.1%})\n")
        assert 0 < overhead < 0.5 * told + 300_000


def manifest(consortium, site):
    return verify(consortium.kit(site).state / "egress" / "manifest.jsonl", None)


THIEF = '''
"""A bundle that was altered by whoever controls the SuperLink: it tries to take what a hospital has."""

import glob
import os
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
PLACES = {places!r}


def attempt(what, deed):
    try:
        return f"{{what}}: GOT {{str(deed())[:40]}}"
    except Exception as error:
        return f"{{what}}: {{type(error).__name__}}"


@app.query()
def steal(message, context):
    agents = [p for p in glob.glob("/proc/[0-9]*") if b"deployment.agent" in Path(p, "cmdline").read_bytes()]
    told = [attempt(f"list{{i}}", lambda p=p: os.listdir(p)) for i, p in enumerate(PLACES["folders"])]
    told += [attempt(f"read{{i}}", lambda p=p: Path(p).read_bytes()) for i, p in enumerate(PLACES["files"])]
    told += [attempt(f"memory{{i}}", lambda p=p: open(p + "/mem", "rb")) for i, p in enumerate(agents[:1])]
    told += [attempt("environ", lambda: Path(agents[0], "environ").read_bytes())]
    told += [attempt("kill", lambda: os.kill(int(agents[0].rsplit("/")[-1]), 9))]
    told += [attempt("root", lambda: os.setuid(0))]
    reason = f"uid {{os.getuid()}} " + "; ".join(told)
    return Message(RecordDict({{"refused": ConfigRecord({{"site": "DU", "reason": reason}})}}), reply_to=message)
'''


def altered_house(folder, client):
    """A copy of the house with another client door."""
    for name in ("fedssl", "server", "client", "configs", "simulations"):
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOUSE / "pyproject.toml", folder)
    (folder / "client" / "app.py").write_text(client)
    return folder


def start_altered(consortium, house):
    """Start the server of a house that was altered; the hospitals keep theirs."""
    process = subprocess.Popen(
        [*consortium.command, "server", str(consortium.server)], cwd=house, stdin=subprocess.DEVNULL,
        start_new_session=True, stdout=(consortium.folder / "server.log").open("ab"), stderr=subprocess.STDOUT,
        env=consortium.environment | {"PYTHONPATH": str(house)},
    )  # fmt: skip
    consortium.processes["server"] = process


def events(consortium):
    path = consortium.server / "run" / "events.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.federation
def test_a_bundle_that_was_altered_to_read_the_data_gets_nothing(hospitals_of, tmp_path):
    plan = [*PLAN, "federation.sites=null", "federation.min_sites=1", "federation.wait_s=60"]
    with RealConsortium({"DU": hospitals_of["DU"]}, plan) as consortium:
        if not consortium.users:
            pytest.skip("only root can start the relay as another user, who must be able to run Python")
        kit = consortium.kit("DU")
        image = next(path for path in sorted(kit.folder.parents[2].joinpath("data", "DU").rglob("*")) if path.is_file())
        places = {
            "folders": [kit.data, str(kit.state), str(kit.state / "cache")],
            "files": [str(image), str(kit.folder / "site.key"), str(kit.state / "egress" / "manifest.jsonl")],
        }
        start_altered(consortium, altered_house(tmp_path / "house", THIEF.format(places=places)))
        consortium.start_site("DU")
        consortium.wait_until(lambda: any("uid " in text for text in events(consortium)), 120, "The thief's report")
        told = next(text for text in events(consortium) if "uid " in text)
        assert "uid 65534" in told
        assert "GOT" not in told
        assert told.count("PermissionError") == 3 + 3 + 4, told
        assert [entry["kind"] for entry in manifest(consortium, "DU")] == []  # the agent was not even asked


@pytest.mark.federation
def test_a_run_that_asks_for_more_than_the_policy_allows_is_refused_with_the_line(hospitals_of):
    plan = [*PLAN, "federation.sites=null", "federation.min_sites=1", "federation.wait_s=60", "training.local_steps=50"]
    with RealConsortium({"DU": hospitals_of["DU"]}, plan) as consortium:
        policy = consortium.sites["DU"] / "policy.yaml"
        consortium.change(policy, settings={"training.local_steps": 3}, min_sites=1)
        consortium.start_all()
        consortium.wait_until(lambda: any("policy.yaml" in text for text in events(consortium)), 120, "The refusal")
        told = next(text for text in events(consortium) if "policy.yaml" in text)
        line = next(i for i, text in enumerate(policy.read_text().splitlines(), 1) if "training.local_steps" in text)
        assert f"line {line} of policy.yaml" in told
        assert "training.local_steps" in told
        assert {entry["kind"] for entry in manifest(consortium, "DU")} == {"refusal"}
