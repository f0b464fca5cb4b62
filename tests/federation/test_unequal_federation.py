"""Real sites in one process: what they release, how long they work, marginals, resume with every state, partitions."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedssl import progress
from fedssl.build import build_method
from fedssl.build_images import open_images, simulated_sites
from fedssl.build_site import build_agent
from fedssl.checkpoint import load_checkpoint
from fedssl.cluster_sums import ClusterSums
from fedssl.config import load
from fedssl.data.batches import Batches, ViewBatch
from fedssl.errors import ConfigError, DataError, FederationError
from fedssl.marginals import column_step, site_marginal
from fedssl.order import Order
from fedssl.prototypes import Clusters, sinkhorn
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from fedssl.update import shared_state
from simulations.run import simulate

_RUN = "ab" * 8
_A_WEIGHT = "encoder.conv1.0.weight"


def _order(number, rounds=2, **changed):
    return Order(_RUN, number, rounds, "f", **changed)


@pytest.fixture
def site(hospitals, tiny, tmp_path, monkeypatch):
    """A maker of a hospital's own agent, and the state that it is sent first."""
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path))

    def make(*overrides, **node):
        settings = load([*tiny, *overrides])
        agent = build_agent(settings, {"data-dir": str(hospitals / "EAST"), "site": "EAST", **node})
        return agent, shared_state(build_method(settings))

    return make


def _final(folder):
    return load_checkpoint(RunFolder(folder).last)


def test_support_counts_each_patient_once_however_many_images_are_nearest():
    generator = torch.Generator().manual_seed(0)
    sums, seen = ClusterSums(), set()
    for _ in range(5):
        nearest = torch.randint(-1, 6, (2, 9), generator=generator)
        patient = torch.randint(0, 7, (2, 9), generator=generator)
        views = [torch.zeros(9, 1, 2, 2)]
        batch = ViewBatch(views, torch.zeros(2, 9, dtype=torch.long), torch.full((9,), -1), patient)
        sums.add(Clusters(torch.ones(6), nearest, torch.tensor(1.0)), batch)
        seen |= {(int(p), int(k)) for p, k in zip(patient.flatten(), nearest.flatten(), strict=True) if k >= 0}
    assert sums.support().tolist() == [sum(1 for _, k in seen if k == number) for number in range(6)]


@pytest.mark.parametrize("pairing", ["image", "patient"])
def test_batches_say_which_patient_is_behind_each_view(site, pairing):
    agent, _ = site(f"pairing={pairing}")
    images = agent.images
    batches = Batches(images, 8, 1.0, seed=0, pairing=pairing)
    groups = images.column("group")
    for batch, (first, second) in zip(batches, batches.positions(), strict=True):
        views = agent.views(batch, torch.Generator().manual_seed(0))
        for row, places in zip(views.patient, (first, second), strict=True):
            equal = row[:, None] == row[None]
            assert equal.tolist() == (groups[places][:, None] == groups[places][None]).tolist()


def test_a_prototype_leaves_only_if_enough_patients_stand_behind_it(site):
    agent, start = site("federation.prototype_patients=1")
    free = agent.train(_order(1), start)
    patients = len(np.unique(agent.images.column("group")))
    held, _ = site(f"federation.prototype_patients={patients + 1}")
    kept = held.train(_order(1), start)
    assert torch.equal(kept.state["prototypes"], start["prototypes"])
    assert kept.mass.sum() == kept.usage.sum() == kept.metrics["released_prototypes"] == 0
    assert not torch.equal(free.state["prototypes"], start["prototypes"])
    assert torch.equal(free.state[_A_WEIGHT], kept.state[_A_WEIGHT])
    some, _ = site("federation.prototype_patients=3")
    part = some.train(_order(1), start)
    released = part.mass > 0
    assert 0 < released.sum() == part.metrics["released_prototypes"] < len(released)
    assert torch.equal(part.state["prototypes"][~released], start["prototypes"][~released])
    assert torch.equal(part.state["prototypes"][released], free.state["prototypes"][released])
    assert torch.equal(part.mass[released], free.mass[released])
    assert not part.usage[~released].any()


def test_a_hospital_may_ask_for_more_patients_than_the_run_but_not_for_fewer(site):
    assert site("federation.prototype_patients=7", **{"prototype-patients": 20})[0].work.prototype_patients == 20
    assert site("federation.prototype_patients=7", **{"prototype-patients": 1})[0].work.prototype_patients == 7


def test_a_round_may_be_a_number_of_steps_or_a_time(site):
    agent, start = site("training.local_steps=3", "training.batch_size=8")
    update = agent.train(_order(1), start)
    assert update.steps == update.metrics["steps"] == 3
    assert update.metrics["images"] == 24
    agent, start = site("training.local_seconds=0.5", "training.batch_size=8")
    begin = time.monotonic()
    update = agent.train(_order(1), start)
    assert time.monotonic() - begin < 20
    assert update.steps > 1
    assert update.metrics["seconds"] >= 0.5
    agent, start = site("training.local_seconds=1e-9")
    assert agent.train(_order(1), start).steps == 1


def test_a_site_goes_on_from_the_round_that_counted_and_forgets_the_others(site):
    agent, start = site("federation.rounds=4")
    first = agent.train(_order(1, 4), start)
    second = agent.train(_order(2, 4, last=1), first.state)
    again = agent.train(_order(2, 4, last=1), first.state)
    assert all(torch.equal(second.state[name], again.state[name]) for name in start)
    without = agent.train(_order(2, 4, last=0), first.state)  # round 1 did not count: a fresh optimiser
    assert second.metrics["optimizer_restarted"] == without.metrics["optimizer_restarted"] == 0.0
    assert not torch.equal(without.state[_A_WEIGHT], second.state[_A_WEIGHT])
    agent.train(_order(2, 4, last=1), first.state)
    agent.train(_order(3, 4, last=2), second.state)
    kept = sorted(path.stem for path in (agent.memory.folder / _RUN / "EAST").glob("*"))
    assert kept == ["round_00002", "round_00003"]


def test_a_lost_state_is_said_loudly(site, heard):
    agent, start = site()
    assert agent.train(_order(2, last=1), start).metrics["optimizer_restarted"] == 1.0
    assert any("EAST lost its optimiser state of round 1" in str(event) for event in heard)


def test_fedema_mixes_what_the_site_kept_on_its_disk(site):
    agent, start = site("local=ema", "federation.rounds=3")
    first = agent.train(_order(1, 3), start)
    seen = {}
    original = agent.work.rule.begin

    def spy(received, own, scale):
        seen.update(own=own, scale=scale, begun=original(received, own, scale))
        return seen["begun"]

    agent.work.rule.begin = spy
    agent.train(_order(2, 3, last=1), start)
    assert all(torch.equal(seen["own"][name], first.state[name]) for name in start if name != "prototypes")
    assert seen["scale"] is None
    agent.train(_order(3, 3, last=2), start)
    assert seen["scale"] == pytest.approx(seen["begun"][1])


def test_sites_and_server_negotiate_what_one_sinkhorn_over_all_their_images_gives(tiny, tmp_path):
    settings = load([*tiny, f"run_dir={tmp_path}"])
    agents = [build_agent(settings, {"partition-id": number, "num-partitions": 4}) for number in range(4)]
    for agent in agents:
        agent.work = replace(agent.work, prototype_patients=0)  # nothing is withheld
    start, potentials = shared_state(build_method(settings)), None
    for iteration in range(4):
        sums = [agent.column_sums(_order(1), start if iteration == 0 else {}, potentials) for agent in agents]
        potentials = column_step(potentials, sums, [len(agent.images) for agent in agents])
    scores = [agent.memory.scores(_order(1))[0] for agent in agents]
    assert [len(part) for part in scores] == [len(agent.images) for agent in agents]
    pooled = sinkhorn(torch.cat(scores), epsilon=0.05, iterations=4).split([len(part) for part in scores])
    for agent, part, expected in zip(agents, scores, pooled, strict=True):
        codes = F.softmax(part / 0.05 + potentials, dim=1)
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-10)
        agent.train(_order(1), start, potentials=potentials)
        torch.testing.assert_close(
            agent.method.marginal, site_marginal(part, potentials, epsilon=0.05).float(), rtol=0, atol=0
        )


def test_a_column_behind_which_too_few_patients_stand_says_what_the_least_of_the_others_says(site):
    agent, start = site("federation.prototype_patients=3")
    sums = agent.column_sums(_order(1), start, None)
    scores, released = agent.memory.scores(_order(1))
    nearest, groups = scores.argmax(1).numpy(), agent.images.column("group")
    support = [len(set(groups[nearest == number].tolist())) for number in range(8)]
    assert released.tolist() == [count >= 3 for count in support]
    assert 0 < released.sum() < 8
    assert sums[~released].unique().tolist() == [sums[released].min().item()]
    strict, start = site("federation.prototype_patients=999")
    assert strict.column_sums(_order(1), start, torch.zeros(8).double()).tolist() == [0.0] * 8


def test_a_site_that_asks_for_scores_it_never_made_is_refused(site):
    agent, start = site()
    with pytest.raises(DataError):
        agent.train(_order(1), start, potentials=torch.zeros(8).double())


_EVERYTHING = [
    "federation.rounds=5", "aggregation=adam", "local=ema", "federation.participation=0.6",
    "federation.equipartition=federated-sinkhorn", "federation.precision=bfloat16", "collapse.reseed=true",
]  # fmt: skip


_OTHERS = ["federation.rounds=5", "aggregation=yogi", "federation.equipartition=site-marginals"]


@pytest.mark.parametrize("more", [_EVERYTHING, pytest.param(_OTHERS, marks=pytest.mark.federation)])
def test_a_run_with_every_state_there_is_resumes_to_the_same_bits(tiny, tmp_path, more):
    simulate([*tiny, *more, f"run_dir={tmp_path / 'whole'}"])

    def interrupt(event):
        if isinstance(event, progress.Step) and event.round == 4:
            raise KeyboardInterrupt

    stop = progress.listen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate([*tiny, *more, f"run_dir={tmp_path / 'broken'}"])
    stop()
    simulate([*tiny, *more, f"run_dir={tmp_path / 'broken'}", "resume=true"])
    whole, broken = _final(tmp_path / "whole"), _final(tmp_path / "broken")
    for room in ("state", "memory", "mass"):
        first, second = getattr(whole, room), getattr(broken, room)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert whole.answered == broken.answered
    assert [row["federation/sites"] for row in read_jsonl(tmp_path / "whole" / "round_metrics.jsonl")] == [
        row["federation/sites"] for row in read_jsonl(tmp_path / "broken" / "round_metrics.jsonl")
    ]


def test_a_run_without_a_lower_loss_stops_early_and_a_resume_does_not_go_on(tiny, tmp_path, heard):
    run = [*tiny, "federation.rounds=30", "federation.patience=2", "optim.lr=1e-12", f"run_dir={tmp_path / 'run'}"]
    simulate(run)
    done = _final(tmp_path / "run")
    assert done.stale(2)
    assert not done.stale(3)
    assert done.round == done.best_round + 2 < 30
    assert any("Stopped after round" in str(event) for event in heard)
    before = (tmp_path / "run" / "round_metrics.jsonl").read_text()
    simulate([*run, "resume=true"])
    assert (tmp_path / "run" / "round_metrics.jsonl").read_text() == before


def test_a_site_that_pretrained_alone_brings_its_weights_once(site, tiny, tmp_path):
    simulate([*tiny, "simulation.only=EAST", "federation.min_sites=1", f"run_dir={tmp_path / 'alone'}"])
    own = RunFolder(tmp_path / "alone").last
    agent, start = site("optim.lr=0", "optim.warmup=0", start=str(own))
    joined = agent.train(_order(1), start)
    assert joined.independent
    alone = load_checkpoint(own).state
    torch.testing.assert_close(dict(joined.state)[_A_WEIGHT], alone[_A_WEIGHT])
    later = agent.train(_order(2, last=1), start)
    assert not later.independent
    torch.testing.assert_close(dict(later.state)[_A_WEIGHT], start[_A_WEIGHT])
    other, start = site("heads.width=8", start=str(own))
    with pytest.raises(DataError, match="another encoder or method"):
        other.train(_order(1), start)


@pytest.mark.parametrize(
    ("partition", "names"),
    [
        ("iid", {"site-1", "site-2", "site-3"}),
        ("quantity", {"site-1", "site-2", "site-3"}),
        ("dirichlet", {"site-1", "site-2", "site-3"}),
    ],
)
def test_a_partition_deals_all_training_patients_out(tiny, partition, names):
    settings = load([*tiny, f"simulation.partition={partition}", "simulation.sites=3"])
    store = open_images(settings)
    if partition == "dirichlet":
        table = str(load(tiny)["data"]["root"]) + "/labels.csv"
        settings = load(
            [*tiny, "simulation.partition=dirichlet", "simulation.sites=3", f"data.labels={table}", "data.label=lesion"]
        )
    sites = simulated_sites(settings, store)
    natural = simulated_sites(load(tiny), store)
    assert set(sites) == names
    rows = np.concatenate([part.rows for part in sites.values()])
    assert sorted(rows.tolist()) == sorted(np.concatenate([part.rows for part in natural.values()]).tolist())
    owners = [set(part.column("group").tolist()) for part in sites.values()]
    assert sum(map(len, owners)) == len(set.union(*owners))


def test_a_federation_trains_on_a_partition_through_scanners_of_its_own(tiny, tmp_path):
    more = ["simulation.partition=iid", "simulation.sites=3", "simulation.scanner_shift=0.5"]
    _, arms = simulate([*tiny, *more, "simulation.arms=[federated,single_site,pooled]", f"run_dir={tmp_path / 'run'}"])
    assert [arm.sites for arm in arms] == [3, 1, 1]
    assert _final(tmp_path / "run").sites == ["site-1", "site-2", "site-3"]
    assert _final(arms[1].folder).sites[0].startswith("site-")
    config = load(arms[2].overrides)
    pooled = simulated_sites(config, open_images(config))["pooled"]
    own = simulated_sites(load([*tiny, *more]), open_images(config))
    for part in own.values():
        places = np.flatnonzero(np.isin(pooled.rows, part.rows))[:5]
        mine = np.array([np.flatnonzero(part.rows == pooled.rows[place])[0] for place in places])
        assert np.array_equal(pooled.read(places).values, part.read(mine).values)


def test_a_site_that_is_none_of_the_simulation_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"simulation\.only=NOBODY is none of the sites EAST"):
        simulate([*tiny, "simulation.only=NOBODY", f"run_dir={tmp_path / 'run'}"])


def test_versions_that_differ_are_refused_with_both_sides_named(tiny, tmp_path, monkeypatch):
    from fedssl import wire

    plain = wire.write_order

    def older(order, *rest):
        content = plain(order, *rest)
        content["order"]["protocol"], content["order"]["version"] = 2, "0.0.9"
        return content

    monkeypatch.setattr(wire, "write_order", older)
    with pytest.raises(FederationError, match=r"has fedssl .* \(protocol 4\), the server '0\.0\.9' \(protocol 2\)"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}"])


def test_the_arms_of_one_site_train_plainly_whatever_rule_the_federation_follows(tiny, tmp_path):
    more = ["aggregation=trimmed_mean", "aggregation.hostile=1", "local=proximal", "local.mu=0.1", "simulation.sites=3"]
    arms = ["simulation.arms=[federated,single_site]", f"run_dir={tmp_path / 'run'}", "federation.rounds=1"]
    _, planned = simulate([*tiny, *more, *arms])
    assert [_final(arm.folder).round for arm in planned] == [1, 1]
    alone = load(planned[1].overrides)
    assert alone["aggregation"]["_target_"].endswith("WeightedMean")
    assert alone["local"]["_target_"].endswith("LocalRule")


def test_a_rule_that_needs_more_sites_than_there_are_says_so_before_work_begins(tiny, tmp_path):
    with pytest.raises(FederationError, match="4 of at least 5 sites have images"):
        simulate([*tiny, "aggregation=trimmed_mean", "aggregation.hostile=2", f"run_dir={tmp_path / 'run'}"])
