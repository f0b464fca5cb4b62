"""SIGKILL while a privacy ledger is written: whatever was acknowledged is there, and what is there verifies."""

import itertools
import math
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedssl.errors import PrivacyError
from fedssl.site.ledger import Ledger

# Reserves and releases until it dies: in the middle of its own file operation with a given number, or when it is killed
# from outside. A write may leave a part of its bytes. Every entry that the ledger has taken is reported on the pipe.
CHILD = r"""
import hashlib, math, os, signal, sys
from pathlib import Path
from fedssl.privacy.accounting import Spend
from fedssl.site import ledger as module
path, anchor = map(Path, sys.argv[1:3])
due, rounds, share = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
module.epsilon_of = lambda spends, delta: math.sqrt(sum(one.steps * (one.rate / one.sigma) ** 2 for one in spends))
report, done = os.write, 0
def counted(name, own):
    def operation(*arguments, **settings):
        global done
        done += name != "mkdir" or not os.path.isdir(arguments[0])
        if done == due:
            if name == "write" and share:
                own(arguments[0], arguments[1][:int(share * len(arguments[1]))])
            report(1, f"died {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **settings)
    return operation
for name in ("mkdir", "write", "fsync", "replace", "truncate", "ftruncate"):
    setattr(os, name, counted(name, getattr(os, name)))
own = module.Ledger(path, anchor, site="NORTH", delta=1e-6)
for number in range(rounds):
    run = f"run{number % 3}"
    spend = Spend(1.0 + number % 4, .01, 1 + number % 5)
    taken = own.reserve(run, number, spend, cap=1e6)
    report(1, f"reserve {taken.number} {taken.epsilon!r} {taken.spend.sigma} {taken.spend.steps}\n".encode())
    digest = hashlib.sha256(os.urandom(8)).hexdigest()
    own.release(taken, digest)
    report(1, f"release {taken.number} {digest}\n".encode())
report(1, b"ended\n")
"""


def ledger_in(folder):
    return Ledger(folder / "state" / "ledger.jsonl", folder / "cache" / "anchor.json", site="NORTH", delta=1e-6)


def killed(ledger, *, due=0, share=0.0, rounds=1000, rng=None):
    """Run a process until it dies; what it reported. With ``rng`` it is killed from outside, soon after some report."""
    command = [sys.executable, "-c", CHILD, ledger.path, ledger.anchor, str(due), str(rounds), str(share)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = []
    if rng is not None:
        ended = os.pidfd_open(process.pid)
        said = [process.stdout.readline() for _ in range(rng.integers(1, 12))]
        select.select([ended], [], [], rng.uniform(0.0, 0.01))
        process.kill()
        os.close(ended)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode in {0, -signal.SIGKILL}, errors[-3000:]
    return [line.split() for line in [*said, *rest.splitlines()]]


def holds(ledger, reports, before):
    """The ledger verifies, goes on from what it was, has all that was reported, and its epsilon is its spends'."""
    entries = ledger.entries()
    assert entries[: len(before)] == before
    own = [entry for entry in entries if entry["kind"] == "reserve"]
    for word, *values in reports:
        if word == "reserve":
            number, epsilon, sigma, steps = int(values[0]), *map(float, values[1:])
            found = entries[number]
            assert (found["kind"], found["epsilon"], found["sigma"], found["steps"]) == (word, epsilon, sigma, steps)
        elif word == "release":
            assert [
                entry["sha256"] for entry in entries if entry["kind"] == word and entry["reservation"] == int(values[0])
            ] == values[1:]
    spent = 0.0
    for entry in own:
        spent += entry["steps"] * (entry["rate"] / entry["sigma"]) ** 2
        assert entry["epsilon"] == pytest.approx(math.sqrt(spent), rel=1e-12)
    assert [entry["epsilon"] for entry in own] == sorted(entry["epsilon"] for entry in own)
    assert ledger.epsilon() == (own[-1]["epsilon"] if own else 0.0)
    return entries


def scenario(folder, seed, kills):
    """Kill again and again while one ledger grows; gives where processes died, the entries, and how many were torn."""
    rng, ledger = np.random.default_rng(seed), ledger_in(folder)
    entries, operations, torn = [], Counter(), 0
    for _ in range(kills):
        inside = rng.random() < 0.6
        if inside:
            reports = killed(ledger, due=int(rng.integers(1, 60)), share=float(rng.choice([0.0, rng.random()])))
        else:
            reports = killed(ledger, rng=rng)
        died = [values[0] for word, *values in reports if word == "died"]
        assert len(died) == inside
        operations.update(died or ["from outside"])
        torn += not ledger.path.read_bytes().endswith(b"\n")
        entries = holds(ledger, reports, entries)
    return operations, entries, torn


def test_a_ledger_holds_after_every_one_of_five_kills(tmp_path):
    operations, entries, _ = scenario(tmp_path, seed=0, kills=5)
    assert operations.total() == 5
    assert len(entries) > 5


@pytest.mark.slow
def test_a_ledger_holds_after_every_one_of_fifty_kills(tmp_path):
    operations, entries, torn = scenario(tmp_path, seed=1, kills=50)
    sys.stdout.write(f"\n50 kills: {dict(operations)}; {torn} torn entries; {len(entries)} whole ones\n")
    assert operations.total() == 50
    assert {"write", "fsync", "replace", "from outside"} <= set(operations)
    unused = {entry["number"] for entry in entries if entry["kind"] == "reserve"}
    unused -= {entry["reservation"] for entry in entries if entry["kind"] == "release"}
    assert torn
    assert unused  # rounds that were cut off, and count


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_ledger_holds_whichever_of_its_first_operations_is_the_last(tmp_path, share):
    """Every operation of the first two rounds in its turn; afterwards a process that is left alone goes on."""
    for due in itertools.count(1):
        ledger = ledger_in(tmp_path / str(due))
        reports = killed(ledger, due=due, share=share, rounds=2)
        if reports[-1] == ["ended"]:
            break
        entries = holds(ledger, reports, [])
        reports = killed(ledger, rounds=2)
        assert reports[-1] == ["ended"]
        assert len(holds(ledger, reports, entries)) >= 5
    assert due > 20


def test_a_ledger_from_which_an_acknowledged_entry_is_missing_would_be_noticed(tmp_path):
    ledger = ledger_in(tmp_path)
    reports = killed(ledger, rounds=3)
    holds(ledger, reports, [])
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PrivacyError):
        holds(ledger, reports, [])
    Path(ledger.anchor).unlink()
    with pytest.raises(AssertionError):
        holds(ledger, reports, [])
