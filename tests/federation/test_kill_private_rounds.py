"""SIGKILL in the middle of private rounds: the ledger stays valid, epsilon only grows, and it is what was spent."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from doomed import doomed

from fedssl.build import build_method, first_state
from fedssl.build_site import build_agent
from fedssl.config import fingerprint, load
from fedssl.order import Order
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.site.ledger import Ledger
from simulations.processes import process_context

pytestmark = pytest.mark.slow
KILLS = 50
RUN = "0123456789abcdef"
AIMS = ("ledger", "answer_", "round_", "anchor")  # files, at whose operations a site dies
PATIENCE_S = 120.0


def serve_rounds(overrides, answers):
    """Train every round that is not answered yet, as a server that was never disturbed would ask for them."""
    torch.set_num_threads(1)
    config = load(overrides)
    agent = build_agent(config, {"partition-id": 0})
    state = first_state(config, build_method(config))
    for number in range(1, config["federation"]["rounds"] + 1):
        place = answers / f"{number}.json"
        known = json.loads(place.read_text()) if place.exists() else None
        order = Order(RUN, number, config["federation"]["rounds"], fingerprint(config), last=number - 1)
        if known is None:
            update = agent.train(order, state)
            facts = {"epsilon": update.metrics["epsilon"], "ledger": update.ledger}
            place.with_suffix(".new").write_text(json.dumps(facts))
            place.with_suffix(".new").replace(place)


def entries_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def replay(path):
    """Epsilon of all that was reserved, from the lines of the file alone."""
    spent = [row for row in entries_of(path) if row["kind"] == "reserve"]
    return epsilon_of([Spend(row["sigma"], row["rate"], row["steps"]) for row in spent], 1e-6)


def test_fifty_kills_in_private_rounds_leave_a_valid_ledger_a_growing_epsilon_and_what_the_accountant_says(
    tiny, tmp_path
):
    kept = [text for text in tiny if not text.startswith(("heads.num_prototypes", "augment.crops.local", "federation"))]
    overrides = [
        *kept, "augment.crops.local.count=0", "privacy=patient", "privacy.epsilon=60", "method.num_prototypes=4",
        "privacy.batch=3", "privacy.patients=60", "privacy.steps=2", "privacy.images=1", "privacy.engine=loop",
        "privacy.spare=0.9", "federation.rounds=60", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    answers, log = tmp_path / "answers", tmp_path / "operations"
    answers.mkdir()
    agent = build_agent(load(overrides), {"partition-id": 0})  # indexes once, and says where the ledger lies
    path, anchor = agent.terms.ledger.path, agent.terms.ledger.anchor
    rng, context, seen, killed = np.random.default_rng(5), process_context(), 0.0, Counter()
    while killed.total() < KILLS:
        aimed = bool(rng.random() < 0.6)
        settings = (int(rng.integers(1, 12)), str(rng.choice(AIMS))) if aimed else (0, "")
        process = context.Process(target=doomed, args=(serve_rounds, *settings, log, overrides, answers))
        process.start()
        process.join(PATIENCE_S if aimed else float(rng.uniform(1.0, 9.0)))
        process.kill()
        process.join(PATIENCE_S)
        killed["aimed" if aimed else "timed"] += process.exitcode == -9
        ledger = Ledger(path, anchor, site=agent.site, delta=1e-6)
        ledger.entries()  # verifies the chain
        epsilon = ledger.epsilon()
        assert epsilon >= seen, "epsilon fell"
        assert epsilon == pytest.approx(replay(path), abs=1e-9)
        seen = epsilon
        for answer in answers.glob("*.json"):
            known = json.loads(answer.read_text())
            ledger.check_known(known["ledger"])
            assert known["epsilon"] <= epsilon
    reserved = Counter(row["round"] for row in entries_of(path) if row["kind"] == "reserve")
    released = Counter(row["round"] for row in entries_of(path) if row["kind"] == "release")
    assert reserved.total() > len(reserved), "no round was cut off after it was paid for: the kills came too early"
    assert len(released) >= 5
    assert all(reserved[number] >= count for number, count in released.items())
    assert killed["aimed"] >= 10
    assert killed["timed"] >= 10
