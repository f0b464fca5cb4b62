"""Private sites in a whole federation: the gate, the ledger, what leaves, and sites without privacy beside them."""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedssl.build import build_method, first_state
from fedssl.build_site import build_agent
from fedssl.checkpoint import load_checkpoint
from fedssl.config import fingerprint, load
from fedssl.errors import ConfigError, DataError, FederationError, PrivacyError
from fedssl.order import Order
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.progress import Note
from fedssl.run_folder import RunFolder
from fedssl.site.ledger import Ledger
from fedssl.storage import read_jsonl
from fedssl.update import METRICS
from simulations import privacy_table
from simulations.run import simulate

FIRST = {"partition-id": 0}


@pytest.fixture
def private(tiny, tmp_path):
    """Overrides of a federation with private sites that trains in seconds; the noise is hopeless, as it should be."""
    kept = [text for text in tiny if not text.startswith(("heads.num_prototypes", "augment.crops.local"))]
    return [
        *kept, "augment.crops.local.count=0", "privacy=patient", "method.num_prototypes=4", "privacy.batch=3",
        "privacy.patients=30", "privacy.steps=2", "privacy.images=1", "privacy.engine=loop", "privacy.spare=0",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_run(request, _own_cache):
    """The sites' memory is shared by all tests of a session: every test is another run."""
    order.run = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    for bound in Path(os.environ["FEDSSL_CACHE"]).glob("*/ledger-id"):  # these patients are counted nowhere yet
        bound.unlink()


def order(number, last=None, **changed):
    return Order(order.run, number, 2, "f", last=number - 1 if last is None else last, **changed)


def agent_of(overrides, **node):
    config = load(overrides)
    agent = build_agent(config, {**FIRST, **node})
    return agent, first_state(config, build_method(config))


def ledger_rows(agent):
    return [json.loads(line) for line in agent.terms.ledger.path.read_text().splitlines()]


def test_a_federation_with_one_private_site_and_others_without_runs_and_reports_epsilon_by_site(private, tmp_path):
    simulate([*private, "privacy.sites=[SOUTH]"])
    folder = RunFolder(tmp_path / "run")
    rounds, sites = read_jsonl(folder.round_metrics), read_jsonl(folder.metrics)
    assert [set(row["privacy/epsilon"]) for row in rounds] == [{"SOUTH"}, {"SOUTH"}]
    spent = [row["privacy/epsilon"]["SOUTH"] for row in rounds]
    assert 0 < spent[0] < spent[1] <= 8.0
    assert {row["site"] for row in sites if "epsilon" in row} == {"SOUTH"}
    assert {row["site"] for row in sites if "rankme" in row} == {"EAST", "HARBOUR", "WEST"}
    assert load_checkpoint(folder.last).ledgers.keys() == {"SOUTH"}
    assert [path.name for path in (folder.path / "ledgers").iterdir()] == [
        path.parent.name for path in (folder.path / "ledgers").glob("*/ledger.jsonl")
    ]


def test_the_ledger_of_a_run_is_what_the_accountant_says_of_its_public_constants(private, tmp_path):
    simulate(private)
    (path,) = (tmp_path / "run" / "ledgers").glob("*EAST*/ledger.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    reserved = [row for row in rows if row["kind"] == "reserve"]
    assert [(row["round"], row["rate"], row["steps"]) for row in reserved] == [(1, 0.1, 2), (2, 0.1, 2)]
    total = epsilon_of([Spend(row["sigma"], row["rate"], row["steps"]) for row in reserved], 1e-6)
    assert reserved[-1]["epsilon"] == pytest.approx(total)
    assert total == pytest.approx(8.0, rel=0.01)  # planned for these rounds, no more and hardly less


def test_what_leaves_a_private_site_is_on_the_list_and_made_of_public_constants_and_noise(private):
    agent, state = agent_of(private)
    update = agent.train(order(1), state)
    assert update.state.keys() == state.keys()
    assert update.metrics.keys() <= METRICS
    assert update.metrics.keys() == {
        "loss", "images", "steps", "effective_prototypes", "released_prototypes", "optimizer_restarted", "epsilon",
        "delta",
    }  # fmt: skip
    assert (update.examples, update.steps, update.metrics["images"]) == (30, 2, 6.0)  # nominal, not what the site has
    assert agent.examples == 30 != len(agent.cohort.members)


def test_one_patient_more_changes_no_constant_that_leaves(private, monkeypatch):
    agent, state = agent_of(private)
    mechanism = agent.terms.mechanism
    fewer, _ = agent_of(private)
    fewer.cohort.members.pop()
    assert fewer.terms.mechanism == mechanism
    monkeypatch.setattr(fewer.memory, "recall_answer", lambda *_: None)
    fewer.terms = replace(fewer.terms, run_cap=100.0)
    updates = [one.train(order(1), state) for one in (agent, fewer)]
    for name in ("images", "steps", "delta"):
        assert updates[0].metrics[name] == updates[1].metrics[name]
    assert updates[0].examples == updates[1].examples


def test_the_same_question_again_gets_the_same_bits_and_costs_nothing(private):
    agent, state = agent_of(private)
    first = agent.train(order(1), state)
    entries = len(ledger_rows(agent))
    again, _ = agent_of(private)
    second = again.train(order(1, ledger=first.ledger), state)
    assert all(torch.equal(first.state[name], second.state[name]) for name in state)
    assert second.metrics == first.metrics
    assert len(ledger_rows(agent)) == entries


def test_another_question_about_the_same_round_is_another_release_and_costs_again(private):
    agent, state = agent_of([*private, "privacy.spare=0.5"])
    first = agent.train(order(1), state)
    other = {name: value + 1e-3 for name, value in state.items()}
    second = agent.train(order(1), other)
    assert second.metrics["epsilon"] > first.metrics["epsilon"]
    assert not torch.equal(first.state["prototypes"], second.state["prototypes"]) or any(
        not torch.equal(first.state[name], second.state[name]) for name in state
    )


def test_the_gate_refuses_before_anything_is_computed(private, monkeypatch):
    agent, state = agent_of(private)
    for number in (1, 2):
        agent.train(order(number), state)
    before = ledger_rows(agent)
    monkeypatch.setattr(type(agent), "_train", lambda *_: pytest.fail("it computed"))
    other = {name: value + 1e-3 for name, value in state.items()}
    with pytest.raises(PrivacyError, match="this run"):
        agent.train(order(2), other)
    assert ledger_rows(agent) == before


UNFIT = {
    "a round beyond the run": (lambda state: state, {"number": 3}, "round 3 of 2"),
    "another run length": (lambda state: state, {"number": 1, "rounds": 9}, "the run has 2"),
    "a missing tensor": (lambda state: dict(list(state.items())[1:]), {"number": 1}, "another encoder"),
    "not a number": (lambda state: {n: v * torch.nan for n, v in state.items()}, {"number": 1}, "not finite"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_trained_is_refused_before_it_costs_anything(private, case):
    changed, asked, reason = UNFIT[case]
    agent, state = agent_of(private)
    with pytest.raises(FederationError, match=reason):
        agent.train(replace(order(1), **asked), changed(state))
    assert not agent.terms.ledger.path.exists()


def test_a_round_that_dies_is_paid_for(private, monkeypatch):
    agent, state = agent_of(private)
    monkeypatch.setattr(agent.private_method, "take_votes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agent.train(order(1), state)
    assert [row["kind"] for row in ledger_rows(agent)] == ["open", "reserve"]
    assert agent.terms.ledger.epsilon() > 0


def test_an_older_copy_of_the_ledger_is_found_out_by_what_the_server_remembers(private):
    agent, state = agent_of(private)
    first = agent.train(order(1), state)
    old = agent.terms.ledger.path.read_bytes(), agent.terms.ledger.anchor.read_bytes()
    second = agent.train(order(2), first.state)
    agent.terms.ledger.path.write_bytes(old[0])
    agent.terms.ledger.anchor.write_bytes(old[1])
    with pytest.raises(PrivacyError, match="older copy"):
        agent.train(order(2, ledger=second.ledger), second.state)


def test_two_steps_with_equal_seeds_give_unequal_noise(private, tmp_path):
    states = []
    for name in "ab":
        agent, state = agent_of([*private, f"run_dir={tmp_path / name}"])
        agent.memory.recall_answer = lambda *_: None  # that of the other run folder's agent
        torch.manual_seed(0)
        states.append(agent.train(order(1), state).state)
    assert not any(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.startswith("encoder."))


def test_fewer_simulated_patients_than_a_step_expects_are_refused_with_the_numbers(private):
    with pytest.raises(FederationError, match=r"has \d+ training patients, fewer than the 25"):
        simulate([*private, "privacy.batch=25"])


def test_the_answer_of_a_hospital_does_not_depend_on_how_many_patients_it_has(private, hospitals, heard):
    """Else a server could ask with one batch size after the other, or patient by patient."""
    config = load([*private, "privacy.batch=25"])
    agent = build_agent(config, hospital(hospitals, patients=500))
    assert len(agent.cohort.members) < 25
    agent.check()
    assert any(isinstance(event, Note) and "fewer than the 25" in event.text for event in heard)
    with pytest.raises(DataError, match="declares 20 training patients"):
        build_agent(config, hospital(hospitals, patients=20)).check()


def test_the_run_does_not_choose_which_patients_of_a_hospital_train(private, hospitals):
    cohorts = [
        build_agent(load([*private, f"data.test_fraction={share}"]), hospital(hospitals)).cohort.members
        for share in (0.1, 0.9)
    ]
    assert [one.tolist() for one in cohorts[0]] == [one.tolist() for one in cohorts[1]]


def test_a_patient_with_too_many_images_does_not_train_and_only_the_site_is_told(private, hospitals, heard):
    agent = build_agent(load([*private, "privacy.most_images=2"]), hospital(hospitals))
    agent.check()
    assert all(len(one) <= 2 for one in agent.cohort.members)
    assert any(
        isinstance(event, Note) and event.alarm and "more than privacy.most_images=2" in event.text for event in heard
    )


def test_arms_that_should_see_equally_many_images_are_refused(private):
    with pytest.raises(ConfigError, match=r"simulation\.arms=\[federated\].*privacy_table"):
        simulate([*private, "simulation.arms=[federated,pooled]"])


def test_the_table_of_epsilons_is_made_of_arms_with_equal_splits_and_goes_on_where_it_was(
    private, tmp_path, monkeypatch
):
    monkeypatch.setattr(privacy_table, "SEEDS", (0,))
    monkeypatch.setattr(privacy_table, "_EPSILONS", (8.0,))
    settings = [*private, "federation.rounds=1", "evaluation.bootstrap=20", "evaluation.seeds=1"]
    privacy_table.main(settings)
    cells = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert {cell["method"] for cell in cells} == {"epsilon inf", "epsilon 8", "random weights"}
    told = [row for row in read_jsonl(tmp_path / "run" / "epsilon inf-0" / "metrics.jsonl") if "epsilon" in row]
    assert told == []
    images = {(tmp_path / "run" / f"{name}-0" / "images.json").read_text() for name in ("epsilon inf", "epsilon 8")}
    assert len(images) == 1
    monkeypatch.setattr(privacy_table, "_train", lambda *_: pytest.fail("it trained again"))
    privacy_table.main(settings)


def test_a_delta_too_large_for_the_stated_patients_is_refused(private):
    with pytest.raises(ConfigError, match="too large for 30 patients"):
        simulate([*private, "privacy.delta=0.01"])


def test_a_start_of_the_sites_own_is_never_used(private, tmp_path):
    agent, state = agent_of(private, start=str(tmp_path / "own.safetensors"))
    assert agent.own_start is None
    assert not agent.train(order(1), state).independent


def test_column_sums_and_marginals_are_not_given(private):
    agent, state = agent_of(private)
    with pytest.raises(PrivacyError, match="no column sums"):
        agent.column_sums(order(1), state, None)
    with pytest.raises(ConfigError, match="marginals"):
        agent.train(order(1), state, marginal=torch.full((4,), 0.25))
    with pytest.raises(ConfigError, match=r"federation\.equipartition"):
        simulate([*private, "federation.equipartition=federated-sinkhorn"])


# ---------------------------------------------------------------- the hospital's own demands


def hospital(hospitals, **node):
    """A hospital's own node; each test has another site, because anchors of ledgers lie in the session's cache."""
    return {"data-dir": str(hospitals / "EAST"), "site": f"EAST {order.run}", **node}


def test_a_hospital_that_wants_privacy_takes_part_in_no_run_without(private, hospitals):
    config = load([*private, "privacy.sites=[SOUTH]"])
    with pytest.raises(PrivacyError, match=r"privacy profile consortium.*privacy=patient"):
        build_agent(config, hospital(hospitals, **{"privacy-profile": "consortium"}))


def test_the_cap_of_a_hospital_holds_whatever_the_run_asks_for_and_counts_all_studies(private, hospitals):
    node = hospital(hospitals, **{"privacy-profile": "strict", "epsilon-cap": 9.0})
    config = load(private)
    state, done = first_state(config, build_method(config)), 0

    def train_studies():
        nonlocal done
        for done in range(9):
            build_agent(config, node).train(Order(f"{order.run[:8]}{done:08x}", 1, 2, fingerprint(config)), state)

    with pytest.raises(PrivacyError, match="all runs at this site"):
        train_studies()
    assert done >= 1
    ledger = build_agent(config, node).terms.ledger
    assert ledger.epsilon() <= 9.0
    assert len({entry["run"] for entry in ledger.entries() if entry["kind"] == "reserve"}) == done


def test_a_ledger_that_was_edited_stops_the_site(private, hospitals):
    config, node = load(private), hospital(hospitals)
    state = first_state(config, build_method(config))
    agent = build_agent(config, node)
    agent.train(order(1), state)
    path = agent.terms.ledger.path
    path.write_bytes(path.read_bytes().replace(b'"steps":2', b'"steps":1'))
    with pytest.raises(PrivacyError, match="ledger"):
        build_agent(config, node).train(order(2), state)


def test_a_new_name_of_the_site_gives_no_new_budget(private, hospitals):
    config, node = load(private), hospital(hospitals)
    state = first_state(config, build_method(config))
    build_agent(config, node).train(order(1), state)
    renamed = build_agent(config, {**node, "site": f"{node['site']} B", "data-dir": node["data-dir"]})
    with pytest.raises(PrivacyError, match="another privacy ledger"):
        renamed.train(order(2), state)


def test_patients_who_are_counted_train_in_no_run_without_privacy(private, hospitals):
    config, node = load(private), hospital(hospitals)
    build_agent(config, node).train(order(1), first_state(config, build_method(config)))
    with pytest.raises(PrivacyError, match="keeps a privacy ledger"):
        build_agent(load([*private, "privacy.sites=[SOUTH]"]), node)


def test_state_of_plain_runs_is_never_taken_up_by_private_ones(private, hospitals):
    plain, _ = agent_of([*private, "privacy.sites=[WEST]"])
    kept, _ = agent_of(private)
    assert plain.memory.folder != kept.memory.folder


def test_unknown_profiles_and_caps_are_refused(private, hospitals):
    for node, text in (({"privacy-profile": "lax"}, "strict"), ({"epsilon-cap": "many"}, "no number"),
                       ({"epsilon-cap": -1}, "above 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            build_agent(load(private), hospital(hospitals, **node))


# ---------------------------------------------------------------- what is learnt


def test_clusters_stay_in_use_without_noise_and_collapse_without_potentials_and_centre(private, tmp_path):
    """Test 8 of the design, on the plain method: the state that the votes move is what keeps the clusters apart."""
    used = {}
    for name, changed in (("votes", []), ("none", ["method.rate=0", "method.centring=0"])):
        settings = [
            *private, "privacy.sites=['-']", "training.local_steps=20", "federation.rounds=3", "optim=adamw",
            "method.num_prototypes=8", "data.sites=[SOUTH]", "federation.min_sites=1", f"run_dir={tmp_path / name}",
            *changed,
        ]  # fmt: skip
        simulate(settings)
        rows = [row for row in read_jsonl(RunFolder(tmp_path / name).metrics) if row["round"] == 3]
        used[name] = max(row["effective_prototypes"] for row in rows), min(row["code_entropy"] for row in rows)
    assert used["votes"][0] > 8 / 4
    assert used["votes"][0] > used["none"][0]
    assert all(math.isfinite(value) for pair in used.values() for value in pair)


def test_a_ledger_object_is_never_shared_between_sites(private):
    first, _ = agent_of(private)
    second, _ = agent_of(private, **{"partition-id": 1})
    assert isinstance(first.terms.ledger, Ledger)
    assert first.terms.ledger.path != second.terms.ledger.path
    assert replace(first.terms, ledger=second.terms.ledger) != first.terms
