"""The real ServerApp and ClientApp in one process: rounds, refusals, resume, overhead."""

import math
import time

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedssl import progress, wire
from fedssl.aggregation.mean import WeightedMean
from fedssl.checkpoint import load_checkpoint
from fedssl.config import load
from fedssl.errors import ConfigError, DataError, FederationError
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from fedssl.update import Update
from server.rounds import Plan, run_rounds
from simulations.arms import plan_arms
from simulations.grid import InProcessGrid
from simulations.run import simulate


def _final(folder):
    return load_checkpoint(RunFolder(folder).last)


def _same(first, second):
    return first.state.keys() == second.state.keys() and all(
        torch.equal(first.state[name], second.state[name]) for name in first.state
    )


@pytest.fixture
def notes():
    """What was said during the test."""
    heard = []
    stop = progress.listen(heard.append)
    yield heard
    stop()


def test_a_federation_trains_and_leaves_everything_that_a_run_folder_promises(tiny, tmp_path):
    simulate([*tiny, f"run_dir={tmp_path / 'run'}"])
    folder = RunFolder(tmp_path / "run")
    rounds, sites = read_jsonl(folder.round_metrics), read_jsonl(folder.metrics)
    assert [row["round"] for row in rounds] == [1, 2]
    assert {row["site"] for row in sites} == {"EAST", "HARBOUR", "SOUTH", "WEST"}
    assert all(math.isfinite(row["loss"]) and row["data_wait"] < 1 for row in sites)
    assert rounds[0]["comm/bytes_up"] > 4 * 1000
    assert folder.best.exists()
    assert (folder.path / "config.resolved.yaml").exists()
    assert (folder.path / "environment.json").exists()
    assert list((folder.path / "tensorboard").iterdir())
    assert _final(folder.path).images_seen == sum(row["images"] for row in sites)


def test_two_equal_runs_end_with_equal_bits(tiny, tmp_path):
    for name in "ab":
        simulate([*tiny, f"run_dir={tmp_path / name}"])
    assert _same(_final(tmp_path / "a"), _final(tmp_path / "b"))


def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path):
    settings = [*tiny, "federation.rounds=3"]
    simulate([*settings, f"run_dir={tmp_path / 'whole'}"])

    def interrupt(event):
        if isinstance(event, progress.Step) and event.round == 3 and event.site == "SOUTH":
            raise KeyboardInterrupt

    stop = progress.listen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate([*settings, f"run_dir={tmp_path / 'cut'}"])
    stop()
    assert _final(tmp_path / "cut").round == 2
    simulate([*settings, f"run_dir={tmp_path / 'cut'}", "resume=true"])
    assert _same(_final(tmp_path / "whole"), _final(tmp_path / "cut"))
    drop = {"seconds", "images_per_s", "data_wait"}
    whole, cut = (
        [
            {key: value for key, value in row.items() if key not in drop}
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_a_run_folder_is_never_overwritten_unless_told_to(tiny, tmp_path):
    run = [*tiny, "federation.rounds=1", f"run_dir={tmp_path / 'run'}"]
    simulate(run)
    with pytest.raises(ConfigError, match="resume=true"):
        simulate(run)
    simulate([*run, "overwrite=true"])


def test_a_folder_that_is_no_run_is_not_deleted_even_when_told_to_overwrite(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run's folder"):
        simulate([*tiny, f"run_dir={tmp_path / 'thesis'}", "overwrite=true"])
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_resume_with_another_configuration_is_refused(tiny, tmp_path):
    simulate([*tiny, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="has the configuration"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "federation.rounds=4", "optim.lr=0.01", "resume=true"])


def test_more_prototypes_than_images_excludes_the_site_by_name_and_says_what_to_do(tiny, tmp_path):
    with pytest.raises(FederationError, match=r"EAST.*Lower method\.num_prototypes to"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "method.num_prototypes=500"])


def test_an_unknown_site_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="ATLANTIS"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "data.sites=[EAST,ATLANTIS]"])


def test_arms_see_equally_many_images(tiny, tmp_path):
    settings = [
        *tiny,
        f"run_dir={tmp_path / 'run'}",
        "simulation.arms=[federated,single_site,pooled]",
        "training.batch_size=8",
    ]
    _, arms = simulate(settings)
    seen = {arm.name: _final(arm.folder).images_seen for arm in arms}
    assert set(seen) == {"federated", "single_site", "pooled"}
    assert max(seen.values()) - min(seen.values()) <= 0.12 * max(seen.values())


def test_the_single_site_arm_holds_images_of_one_site_only(tiny, hospitals, tmp_path):
    from fedssl.build import open_images, participants

    config = load([*tiny, "simulation.arms=[federated,single_site]"])
    arm = plan_arms(config, open_images(config), tiny)[1]
    alone = load(arm.overrides)
    assert participants(alone, open_images(alone)) == {"EAST": ["EAST"]}


def test_a_collapsed_run_says_so_loudly(tiny, tmp_path, notes):
    settings = ["federation.rounds=4", "method.clustering_temperature=100", "optim.lr=1e-9"]
    simulate([*tiny, *settings, f"run_dir={tmp_path / 'run'}"])
    alarms = [event.text for event in notes if isinstance(event, progress.Note) and event.alarm]
    assert any("COLLAPSE at site EAST, round 4" in text and "ln K" in text for text in alarms)
    assert read_jsonl(tmp_path / "run" / "round_metrics.jsonl")[-1]["ssl/collapse"]["EAST"]


# ---------------------------------------------------------------- hostile and broken answers

_START = {"w": torch.zeros(3), "prototypes": torch.eye(2)}


def _honest(site, value, **changed):
    state = {"w": torch.full((3,), float(value)), "prototypes": torch.eye(2)}
    plain = {"site": site, "state": state, "examples": 10, "mass": torch.ones(2), "usage": torch.ones(2)}
    return wire.write_update(Update(**(plain | changed), metrics={"loss": 1.0, "images": 10.0}))


def _run(answers, **changed):
    """Run one round with scripted sites; returns the result of the last round."""

    def client_app(message, context):
        site = str(context.node_config["site"])
        if message.metadata.message_type == "query":
            return Message(wire.write_presence(site, {"images": 10}), reply_to=message)
        content = answers[site]
        return Message(content, reply_to=message)

    nodes = {number + 2: {"site": site} for number, site in enumerate(answers)}
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    plan = Plan(
        **(
            {"run": "ab" * 8, "rounds": 1, "fingerprint": "f", "min_sites": 2, "deadline_s": 1.0, "wait_s": 0.1}
            | changed
        )
    )
    grid = InProcessGrid(client_app, nodes, {})
    return list(run_rounds(grid, dict(_START), 0, plan, WeightedMean()))[-1]


_BROKEN = {
    "not a number": _honest("evil", float("nan")),
    "a missing tensor": _honest("evil", 1, state={"w": torch.zeros(3)}),
    "a queue besides": _honest("evil", 1, state={**_START, "queue": torch.zeros(5)}),
    "another shape": _honest("evil", 1, state={"w": torch.zeros(4), "prototypes": torch.eye(2)}),
    "another name": _honest("good-1", 1),
    "nothing at all": RecordDict({}),
    "a layout that lies": RecordDict(
        {
            **dict(_honest("evil", 1).items()),
            "layout": ConfigRecord({"layout": '{"float32": [["w", [3]], ["prototypes", [9]]]}'}),
        }
    ),
    "broken JSON": RecordDict({**dict(_honest("evil", 1).items()), "layout": ConfigRecord({"layout": "{"})}),
    "records of the wrong kind": RecordDict({"state": MetricRecord({"a": 1.0}), "layout": ArrayRecord({})}),
    "a layout of the wrong shape": RecordDict(
        {**dict(_honest("evil", 1).items()), "layout": ConfigRecord({"layout": "[]"})}
    ),
    "a negative size": RecordDict(
        {**dict(_honest("evil", 1).items()), "layout": ConfigRecord({"layout": '{"float32": [["w", [-1, -7]]]}'})}
    ),
    "a refusal without a reason": RecordDict({"refused": ConfigRecord({"site": "evil"})}),
    "a refusal of the wrong kind": RecordDict({"refused": MetricRecord({"a": 1.0})}),
    "bytes that are no array": RecordDict(
        {
            **dict(_honest("evil", 1).items()),
            "counts": ArrayRecord({"mass": Array("float32", (2,), "numpy.ndarray", b"PK\x03")}),
        }
    ),
    "more images than there are people": _honest("evil", 1, examples=2**62),
    "a refusal": wire.write_refusal(wire.Refusal("evil", "has no images")),
    "an error of Flower": Error(0, "Traceback (most recent call last): /data/patients/MEYER^ANNA"),
}


@pytest.mark.parametrize("answer", _BROKEN.values(), ids=_BROKEN.keys())
def test_a_broken_answer_is_refused_named_and_the_round_goes_on_with_the_rest(answer, notes):
    result = _run({"evil": answer, "good-1": _honest("good-1", 2), "good-2": _honest("good-2", 4)})
    assert result.state["w"].tolist() == [3.0, 3.0, 3.0]
    assert set(result.failed) == {"evil"}
    said = [event.text for event in notes if isinstance(event, progress.Note) and event.alarm]
    assert any("Site evil" in text for text in said)
    assert not any("MEYER" in text or "/data" in text for text in said)


@pytest.mark.parametrize(
    "answer", [RecordDict({}), RecordDict({"refused": MetricRecord({"a": 1.0})})], ids=["empty", "odd"]
)
def test_a_broken_answer_to_the_roll_call_leaves_that_node_out_and_the_rest_goes_on(answer):
    def client_app(message, context):
        site = str(context.node_config["site"])
        if message.metadata.message_type == "query":
            return Message(answer if site == "evil" else wire.write_presence(site, {"images": 10}), reply_to=message)
        return Message(_honest(site, 2), reply_to=message)

    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    nodes = {number: {"site": site} for number, site in enumerate(("evil", "a", "b"), 2)}
    plan = Plan("ab" * 8, 1, "f", 2, 1.0, 0.1)
    result = next(run_rounds(InProcessGrid(client_app, nodes, {}), dict(_START), 0, plan, WeightedMean()))
    assert set(result.metrics) == {"a", "b"}


def test_too_few_good_answers_end_the_run_and_every_bad_site_is_named():
    with pytest.raises(
        FederationError,
        match=r"1 of at least 2 sites answered well in round 1 \(good-1\)\. evil: tensor w is not finite",
    ):
        _run({"evil": _honest("evil", float("nan")), "good-1": _honest("good-1", 2)})


def test_too_few_connected_sites_end_the_run_instead_of_waiting_for_ever():
    begin = time.monotonic()
    with pytest.raises(FederationError, match=r"1 of at least 3 sites connected"):
        _run({"good-1": _honest("good-1", 2)}, min_sites=3)
    assert time.monotonic() - begin < 5


def test_the_result_does_not_depend_on_the_order_in_which_sites_connect():
    answers = {name: _honest(name, value) for name, value in (("a", 0.1), ("b", 0.7), ("c", 1.3))}
    first, second = _run(answers), _run(dict(reversed(answers.items())))
    assert torch.equal(first.state["w"], second.state["w"])


def test_an_answer_that_never_comes_is_named_after_the_deadline():
    class Silent(InProcessGrid):
        def pull_messages(self, message_ids):
            answers = super().pull_messages(message_ids)
            return [a for a in answers if a.metadata.message_type == "query" or a.metadata.src_node_id != 2]

    def client_app(message, context):
        site = str(context.node_config["site"])
        content = (
            wire.write_presence(site, {"images": 10}) if message.metadata.message_type == "query" else _honest(site, 1)
        )
        return Message(content, reply_to=message)

    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    nodes = {2: {"site": "late"}, 3: {"site": "x"}, 4: {"site": "y"}}
    plan = Plan("ab" * 8, 1, "f", 2, deadline_s=0.2, wait_s=0.1)
    result = next(run_rounds(Silent(client_app, nodes, {}), dict(_START), 0, plan, WeightedMean()))
    assert "deadline" in result.failed["late"]
    assert set(result.metrics) == {"x", "y"}


def test_a_site_with_another_configuration_is_refused_with_both_sides_named():
    order = wire.write_order(wire.Order("ab" * 8, 1, 1, "server-config"), _START)
    with pytest.raises(ConfigError, match=r"site-config.*server-config"):
        wire.read_order(order, "site-config")


def test_eight_sites_that_change_nothing_leave_the_state_as_it_was():
    state = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "prototypes": torch.eye(2)}

    def client_app(message, context):
        site = str(context.node_config["site"])
        if message.metadata.message_type == "query":
            return Message(wire.write_presence(site, {"images": 10}), reply_to=message)
        _, received = wire.read_order(message.content, "f")
        update = Update(site, received, 10, torch.ones(2), torch.ones(2), {"loss": 1.0, "images": 10.0})
        return Message(wire.write_update(update), reply_to=message)

    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    nodes = {number + 2: {"site": f"site-{number}"} for number in range(8)}
    plan = Plan("ab" * 8, 2, "f", 8, 60.0, 1.0)
    results = list(run_rounds(InProcessGrid(client_app, nodes, {}), state, 0, plan, WeightedMean()))
    assert [len(result.metrics) for result in results] == [8, 8]
    assert torch.equal(results[-1].state["w"], state["w"])
