"""Sites that come late, go, come back, or are not wanted; and the seeded choice of a round's sites."""

import time
from collections import Counter

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedssl import progress, wire
from fedssl.aggregation.mean import WeightedMean
from fedssl.aggregation.median import Median
from fedssl.aggregation.step_normalised import StepNormalisedMean
from fedssl.aggregation.trimmed_mean import TrimmedMean
from fedssl.errors import FederationError
from fedssl.update import Update
from server.exchange import Plan
from server.rounds import RoundResult, run_rounds
from simulations.grid import InProcessGrid

_START = {"w": torch.ones(3), "prototypes": torch.eye(2)}


class Hospitals(InProcessGrid):
    """A grid whose nodes can be switched on and off, be slow, and whose answers are scripted.

    Args:
        sites: name by node.
        answers: what a site does to the weights that it was sent; missing: nothing.
    """

    def __init__(self, sites, answers=None):
        super().__init__(self._client, {node: {"site": site} for node, site in sites.items()}, {})
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.on = set(sites)
        self.presence = {}
        self.deaf = set()
        self.answers = answers or {}
        self.asked = []
        self.orders = []

    def _client(self, message, context):
        site = str(context.node_config["site"])
        request = wire.read_order(message.content, "f")
        if message.metadata.message_type.startswith("query"):
            told = self.presence.get(message.metadata.dst_node_id, wire.write_presence(site, {"images": 10}))
            return Message(told, reply_to=message)
        self.asked.append((request.order.number, site))
        self.orders.append((site, request.order))
        state = self.answers.get(site, dict)(request.state)
        update = Update(site, state, 10, 1, torch.ones(2), torch.ones(2), {"loss": 1.0, "images": 10.0})
        return Message(wire.write_update(update), reply_to=message)

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node in self.on]

    def pull_messages(self, message_ids):
        silent = self.deaf | (set(self._contexts) - self.on)
        return super().pull_messages(n for n in message_ids if self._waiting[n].metadata.dst_node_id not in silent)


def _plan(**changed):
    plain = {"run": "ab" * 8, "rounds": 1, "fingerprint": "f", "min_sites": 2, "deadline_s": 0.2, "wait_s": 0.1}
    return Plan(**(plain | changed))


def _rounds(grid, aggregator=None, **changed):
    return run_rounds(grid, RoundResult(0, dict(_START)), _plan(**changed), aggregator or WeightedMean())


def test_a_site_that_comes_late_takes_part_from_the_next_round_on(heard):
    grid = Hospitals({2: "a", 3: "b", 4: "late"})
    grid.on = {2, 3}
    rounds = _rounds(grid, rounds=2)
    assert set(next(rounds).metrics) == {"a", "b"}
    grid.on.add(4)
    assert set(next(rounds).metrics) == {"a", "b", "late"}
    assert any("Site late takes part from now on" in str(event) for event in heard)


def test_a_site_that_is_slow_at_the_roll_call_holds_nobody_up_and_comes_in_later():
    grid = Hospitals({2: "a", 3: "b", 4: "slow"})
    grid.deaf = {4}
    rounds = _rounds(grid, rounds=3)
    assert set(next(rounds).metrics) == {"a", "b"}
    begin = time.monotonic()
    second = next(rounds)
    assert set(second.metrics) == {"a", "b"}
    assert time.monotonic() - begin < 0.2
    assert "deadline" in second.absent["node 4"]
    grid.deaf = set()
    third = next(rounds)
    assert set(third.metrics) == {"a", "b", "slow"}
    assert not third.absent


def test_a_site_that_goes_is_named_at_once_and_one_that_comes_back_takes_part_again(heard):
    grid = Hospitals({2: "a", 3: "b", 4: "c"})
    rounds = _rounds(grid, rounds=3)
    next(rounds)
    grid.on.discard(4)
    second = next(rounds)
    assert second.absent == {"c": "is not connected"}
    assert "c" not in second.failed
    grid.on.add(4)
    assert set(next(rounds).metrics) == {"a", "b", "c"}
    assert any("Site c takes part from now on" in str(event) for event in heard)
    last = {site: order.last for site, order in grid.orders if order.number == 3}
    assert last == {"a": 2, "b": 2, "c": 1}  # each goes on from its own state of then


def test_a_site_that_comes_back_under_another_node_takes_its_old_place():
    grid = Hospitals({2: "a", 3: "b", 4: "c", 5: "c"})
    grid.on = {2, 3, 4}
    rounds = _rounds(grid, rounds=2)
    next(rounds)
    grid.on = {2, 3, 5}
    assert set(next(rounds).metrics) == {"a", "b", "c"}


def test_two_nodes_of_one_name_are_told_apart_and_one_is_left_out():
    result = next(_rounds(Hospitals({2: "a", 3: "b", 4: "b"})))
    assert set(result.metrics) == {"a", "b"}
    assert "second node" in result.absent["b (node 4)"]


def test_only_sites_on_the_list_take_part_and_those_that_miss_are_named():
    grid = Hospitals({2: "a", 3: "b", 4: "stranger"})
    result = next(_rounds(grid, sites=("a", "b", "c")))
    assert set(result.metrics) == {"a", "b"}
    assert "not on the list" in result.absent["stranger"]
    assert result.absent["c"] == "is not connected"


def test_a_run_whose_quorum_is_gone_waits_a_while_and_then_ends_with_a_word():
    grid = Hospitals({2: "a", 3: "b"})
    rounds = _rounds(grid, rounds=2)
    next(rounds)
    grid.on = {2}
    begin = time.monotonic()
    with pytest.raises(
        FederationError, match=r"1 of at least 2 sites answered well in round 2 \(a\)\. b: is not connected"
    ):
        next(rounds)
    assert time.monotonic() - begin < 5


def test_a_share_of_the_sites_is_chosen_by_seed_and_everyone_has_a_turn():
    names = {node: f"s{node}" for node in range(2, 10)}
    chosen = []
    for seed in (0, 0, 1):
        grid = Hospitals(names)
        list(_rounds(grid, rounds=40, participation=0.5, seed=seed))
        chosen.append(grid.asked)
    assert chosen[0] == chosen[1] != chosen[2]
    turns = Counter(site for _, site in chosen[0])
    assert all(10 <= turns[site] <= 30 for site in names.values())
    assert all(len([1 for number, _ in chosen[0] if number == r]) == 4 for r in range(1, 41))


def test_a_resumed_run_chooses_the_same_sites_as_an_undisturbed_one():
    names = {node: f"s{node}" for node in range(2, 8)}
    whole, rest = Hospitals(names), Hospitals(names)
    results = list(_rounds(whole, rounds=6, participation=0.4))
    list(run_rounds(rest, results[2], _plan(rounds=6, participation=0.4), WeightedMean()))
    assert rest.asked == [entry for entry in whole.asked if entry[0] > 3]


def test_the_sample_is_never_smaller_than_the_quorum():
    result = next(_rounds(Hospitals({2: "a", 3: "b", 4: "c"}), participation=0.01))
    assert len(result.metrics) == 2


def _times(factor):
    return lambda state: {name: value * factor for name, value in state.items()}


@pytest.mark.parametrize(("factor", "usual"), [(1000.0, None), (-1000.0, None), (1.9, 0.005)])
def test_a_site_whose_weights_jump_is_refused_named_and_the_round_goes_on(factor, usual, heard):
    grid = Hospitals({2: "a", 3: "b", 4: "evil"}, {"evil": _times(factor), "a": _times(1.01), "b": _times(1.02)})
    start = RoundResult(0, dict(_START), usual_change=usual)
    result = next(run_rounds(grid, start, _plan(), WeightedMean()))
    assert "times their norm" in result.failed["evil"]
    assert result.usual_change == pytest.approx(0.015, rel=1e-3)
    torch.testing.assert_close(result.state["w"], torch.full((3,), 1.015))
    assert any("Site evil" in str(event) for event in heard if isinstance(event, progress.Note))


@pytest.mark.parametrize("aggregator", [Median(), TrimmedMean(hostile=2)])
def test_two_hostile_sites_of_seven_cannot_move_weights_or_prototypes_past_the_honest_ones(aggregator):
    def turned(state):
        return {"w": -2.0 * state["w"], "prototypes": state["prototypes"].flip(0)}

    answers = {f"h{number}": _times(1.0 + 0.01 * number) for number in range(5)} | {"x": turned, "y": turned}
    grid = Hospitals(dict(enumerate(answers, 2)), answers)
    result = next(_rounds(grid, aggregator))
    assert bool(((result.state["w"] >= 1.0) & (result.state["w"] <= 1.04)).all())
    torch.testing.assert_close(result.state["prototypes"], torch.eye(2))


def test_a_refusal_under_the_name_of_another_site_leaves_that_site_in():
    grid = Hospitals({2: "a", 3: "b", 4: "x"})
    grid.presence[4] = wire.write_refusal(wire.Refusal("a", "is not what you think"))
    for result in _rounds(grid, rounds=2):
        assert set(result.metrics) == {"a", "b"}
        assert result.absent == {"a (node 4)": "is not what you think"}
    grid.on = {2, 3}
    assert next(_rounds(grid)).absent == {}


def test_a_node_that_refuses_each_time_with_another_word_fills_no_list():
    class Chatty(Hospitals):
        def _client(self, message, context):
            site = str(context.node_config["site"])
            if site == "x":
                word = wire.Refusal(f"x{len(self.asked)}", f"reason {len(self.asked)}")
                return Message(wire.write_refusal(word), reply_to=message)
            return super()._client(message, context)

    results = list(_rounds(Chatty({2: "a", 3: "b", 4: "x"}), rounds=20))
    assert len(results[-1].absent) == 1


@pytest.mark.parametrize("images", [-5, 0, 10**10])
def test_a_site_with_an_impossible_number_of_images_is_left_out(images):
    grid = Hospitals({2: "a", 3: "b", 4: "x"})
    grid.presence[4] = wire.write_presence("x", {"images": images})
    result = next(_rounds(grid, equipartition="site-marginals"))
    assert "impossible number of images" in result.absent["node 4"]


@pytest.mark.parametrize("name", ["", "a\nALARM: b", "$\\bad$", "[red]x", "n" * 65])
def test_a_name_that_would_forge_a_line_of_the_log_is_refused(name, heard):
    grid = Hospitals({2: "a", 3: "b", 4: "x"})
    grid.presence[4] = wire.write_presence(name, {"images": 10})
    result = next(_rounds(grid))
    assert set(result.metrics) == {"a", "b"}
    assert "has a name that is empty, too long" in result.absent["node 4"]
    assert not any("ALARM" in str(event) for event in heard)


def test_a_name_with_an_apostrophe_or_an_umlaut_is_welcome():
    assert set(next(_rounds(Hospitals({2: "St. Mary's", 3: "Köln-Süd"}))).metrics) == {"St. Mary's", "Köln-Süd"}


@pytest.mark.parametrize("sums", [[1.7e308, 0.0], [-1e5, 0.0], [float("nan"), 0.0], [2e4, 0.0], [0.5, 0.0]])
def test_a_site_with_impossible_column_sums_is_left_out_of_sinkhorn_and_nobody_else(sums, heard):
    class Negotiating(Hospitals):
        def _client(self, message, context):
            site = str(context.node_config["site"])
            if message.metadata.message_type.endswith("marginals"):
                told = sums if site == "x" else [-0.7, -0.7]
                return Message(wire.write_column_sums(site, torch.tensor(told).double()), reply_to=message)
            return super()._client(message, context)

    grid = Negotiating({2: "a", 3: "b", 4: "x"})
    result = next(_rounds(grid, equipartition="federated-sinkhorn", sinkhorn_iterations=2))
    assert set(result.metrics) == {"a", "b", "x"}
    assert sum("Federated Sinkhorn goes on without it" in str(event) for event in heard) == 1


def test_a_site_that_hangs_in_sinkhorn_does_not_use_up_the_others_time():
    class Hanging(Hospitals):
        def _client(self, message, context):
            site = str(context.node_config["site"])
            if message.metadata.message_type.endswith("marginals"):
                return Message(wire.write_column_sums(site, torch.tensor([-0.7, -0.7]).double()), reply_to=message)
            return super()._client(message, context)

    grid = Hanging({2: "a", 3: "b", 4: "x"})
    rounds = _rounds(grid, rounds=2, equipartition="federated-sinkhorn", sinkhorn_iterations=3, deadline_s=0.6)
    next(rounds)
    grid.deaf = {4}
    second = next(rounds)
    assert set(second.metrics) == {"a", "b"}
    assert set(second.failed) == {"x"}


@pytest.mark.parametrize("steps", [999_999_999, 11])
def test_steps_that_a_site_cannot_have_taken_are_refused(steps):
    class Boasting(Hospitals):
        def _client(self, message, context):
            answer = super()._client(message, context)
            if "steps" in answer.content.get("site", {}) and str(context.node_config["site"]) == "x":
                answer.content["site"]["steps"] = steps
            return answer

    result = next(_rounds(Boasting({2: "a", 3: "b", 4: "x"}), StepNormalisedMean(), local_epochs=1.0))
    assert f"{steps:.3g} steps" in result.failed["x"]


def test_a_first_round_with_a_rate_of_nothing_refuses_nobody_in_the_second():
    grid = Hospitals({2: "a", 3: "b"}, {"a": _times(1.01), "b": _times(1.02)})
    start = RoundResult(0, dict(_START), usual_change=5e-8)
    assert set(next(run_rounds(grid, start, _plan(), WeightedMean())).metrics) == {"a", "b"}


def test_answers_that_combine_to_a_jump_end_the_run_with_a_sentence():
    class Wild(WeightedMean):
        def finish(self, total, reference, memory):
            state, memory = super().finish(total, reference, memory)
            return {name: value * 1e6 for name, value in state.items()}, memory

    with pytest.raises(FederationError, match=r"combine to a change of .* nothing of it was kept"):
        next(_rounds(Hospitals({2: "a", 3: "b"}), Wild()))


def test_sites_on_the_list_that_are_slow_have_until_the_deadline_to_answer():
    grid = Hospitals({2: "a", 3: "b", 4: "c"})
    grid.deaf = {4}
    begin = time.monotonic()
    result = next(_rounds(grid, sites=("a", "b", "c"), deadline_s=0.5))
    assert time.monotonic() - begin >= 0.5
    assert result.absent["node 4"].startswith("did not answer")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_at_half_precision_small_moves_add_up_instead_of_being_rounded_away(precision):
    def creep(state):
        turned = state["prototypes"] + 1e-4 * torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        return {"w": state["w"] + 1e-4, "prototypes": turned}

    class Half(Hospitals):
        def _client(self, message, context):
            site = str(context.node_config["site"])
            if message.metadata.message_type == "query":
                return Message(wire.write_presence(site, {"images": 10}), reply_to=message)
            request = wire.read_order(message.content, "f")
            update = Update(
                site, creep(request.state), 10, 1, torch.ones(2), torch.ones(2), {"loss": 1.0, "images": 10.0}
            )
            return Message(wire.write_update(update, precision, request.state), reply_to=message)

    full = list(_rounds(Hospitals({2: "a", 3: "b"}, {"a": creep, "b": creep}), rounds=50))[-1]
    half = list(_rounds(Half({2: "a", 3: "b"}), rounds=50, precision=precision))[-1]
    torch.testing.assert_close(half.state["w"], torch.full((3,), 1.005), rtol=0, atol=1e-4)
    torch.testing.assert_close(half.state["prototypes"], full.state["prototypes"], rtol=0, atol=3e-4)
    assert full.state["prototypes"][0, 1] > 4e-3
    assert half.bytes_down < full.bytes_down
    assert half.bytes_up < full.bytes_up
