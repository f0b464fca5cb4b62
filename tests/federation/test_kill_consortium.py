"""Forty kill -9 of all that a consortium consists of: every run ends, with the model of an undisturbed one."""

import random
import sys
import time
from collections import Counter

import pytest

from simulations.run import simulate
from tests.federation.consortium import KINDS, RealConsortium
from tests.federation.test_consortium import PLAN, SITES, assert_same_state

KILLS, KILLS_IN_A_RUN, LIMIT_S = 40, 10, 1500.0
PATIENT = ["federation.wait_s=900", "federation.deadline_s=900", "training.local_steps=6"]


class Killer:
    """Kills one process after the other, of the kind that was killed least often so far.

    Args:
        consortium: whose processes.
        rng: of times and choices.
        most: kills.
        killed: number by kind, over all runs.
    """

    def __init__(self, consortium, rng, most, killed):
        self.consortium, self.rng, self.left, self.killed = consortium, rng, most, killed
        self.due = time.monotonic() + rng.uniform(5, 40)

    def __call__(self):
        if self.left <= 0 or time.monotonic() < self.due:
            return
        there = {kind: pids for kind in KINDS if (pids := self.consortium.pids(kind))}
        least = min(self.killed[kind] for kind in KINDS)
        wanted = [kind for kind in there if self.killed[kind] <= least + 1]
        if not wanted:  # a relay lives for seconds only: wait for one
            return
        kind = self.rng.choice(sorted(wanted))
        if self.consortium.kill(self.rng.choice(there[kind])):
            self.killed[kind] += 1
            self.left -= 1
        self.due = time.monotonic() + self.rng.uniform(1, 25)


@pytest.mark.soak
def test_a_consortium_that_is_killed_again_and_again_ends_with_the_model_of_an_undisturbed_one(brain_mr, tmp_path):
    plan = [*PLAN, *PATIENT]
    simulate([f"data.root={brain_mr}", *plan, "simulation.arms=[federated]", f"run_dir={tmp_path / 'alone'}"])
    killed, runs, begun = Counter(), 0, time.monotonic()
    while killed.total() < KILLS:
        runs += 1
        assert runs <= KILLS, "The kills hit nobody"
        with RealConsortium({site: brain_mr / site for site in SITES}, plan) as consortium:
            begin = time.monotonic()
            killer = Killer(consortium, random.Random(runs), min(KILLS_IN_A_RUN, KILLS - killed.total()), killed)
            consortium.start_all()
            assert consortium.wait(LIMIT_S, killer) == 0, consortium.words()
            assert_same_state(consortium.server / "run", tmp_path / "alone")
        sys.stdout.write(f"\nrun {runs}: {time.monotonic() - begin:.0f} s, killed so far {dict(killed)}")
        sys.stdout.flush()
    assert set(killed) == set(KINDS)
    sys.stdout.write(f"\n{killed.total()} kills in {runs} runs, {time.monotonic() - begun:.0f} s: {dict(killed)}\n")
