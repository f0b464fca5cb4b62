"""Rounds whose sites answer wrongly, late or not at all."""

import time

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedssl import progress, wire
from fedssl.aggregation.mean import WeightedMean
from fedssl.errors import ConfigError, FederationError
from fedssl.order import Order
from fedssl.packing import pack
from fedssl.update import Update
from server.exchange import Plan
from server.rounds import RoundResult, run_rounds
from simulations.grid import InProcessGrid

_START = {"w": torch.zeros(3), "prototypes": torch.eye(2)}


def _honest(site, value, **changed):
    state = {"w": torch.full((3,), float(value)), "prototypes": torch.eye(2)}
    plain = {"site": site, "state": state, "examples": 10, "steps": 1, "mass": torch.ones(2), "usage": torch.ones(2)}
    return wire.write_update(Update(**(plain | changed), metrics={"loss": 1.0, "images": 10.0}))


def test_counts_of_prototypes_for_a_method_without_any_are_refused_and_the_round_goes_on():
    start = {"w": torch.zeros(3)}

    def site(name, **counts):
        update = Update(name, start, 10, 1, counts.get("mass"), counts.get("usage"), {"loss": 1.0, "images": 10.0})
        return wire.write_update(update)

    answers = {"good-1": site("good-1"), "good-2": site("good-2")}
    answers["evil"] = site("evil", mass=torch.ones(2), usage=torch.ones(2))
    result = _run(answers, start)
    assert set(result.failed) == {"evil"}
    assert "counts prototypes where the method has none" in result.failed["evil"]


def _run(answers, start=None, **changed):
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
            | {"largest_change": 100.0}
            | changed
        )
    )
    grid = InProcessGrid(client_app, nodes, {})
    return list(run_rounds(grid, RoundResult(0, dict(start or _START)), plan, WeightedMean()))[-1]


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
def test_a_broken_answer_is_refused_named_and_the_round_goes_on_with_the_rest(answer, heard):
    result = _run({"evil": answer, "good-1": _honest("good-1", 2), "good-2": _honest("good-2", 4)})
    assert result.state["w"].tolist() == [3.0, 3.0, 3.0]
    assert set(result.failed) == {"evil"}
    said = [event.text for event in heard if isinstance(event, progress.Note) and event.alarm]
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
    plan = Plan("ab" * 8, 1, "f", 2, 1.0, 0.1, largest_change=100.0)
    result = next(run_rounds(InProcessGrid(client_app, nodes, {}), RoundResult(0, dict(_START)), plan, WeightedMean()))
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
    result = next(run_rounds(Silent(client_app, nodes, {}), RoundResult(0, dict(_START)), plan, WeightedMean()))
    assert "deadline" in result.failed["late"]
    assert set(result.metrics) == {"x", "y"}


def test_a_site_with_another_configuration_is_refused_with_both_sides_named():
    order = wire.write_order(Order("ab" * 8, 1, 1, "server-config"), pack(_START))
    with pytest.raises(ConfigError, match=r"site-config.*server-config"):
        wire.read_order(order, "site-config")


def test_eight_sites_that_change_nothing_leave_the_state_as_it_was():
    state = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "prototypes": torch.eye(2)}

    def client_app(message, context):
        site = str(context.node_config["site"])
        if message.metadata.message_type == "query":
            return Message(wire.write_presence(site, {"images": 10}), reply_to=message)
        received = wire.read_order(message.content, "f").state
        update = Update(site, received, 10, 1, torch.ones(2), torch.ones(2), {"loss": 1.0, "images": 10.0})
        return Message(wire.write_update(update), reply_to=message)

    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    nodes = {number + 2: {"site": f"site-{number}"} for number in range(8)}
    plan = Plan("ab" * 8, 2, "f", 8, 60.0, 1.0)
    results = list(run_rounds(InProcessGrid(client_app, nodes, {}), RoundResult(0, state), plan, WeightedMean()))
    assert [len(result.metrics) for result in results] == [8, 8]
    assert torch.equal(results[-1].state["w"], state["w"])
