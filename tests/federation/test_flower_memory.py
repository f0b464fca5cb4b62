"""Real SuperLink and SuperNodes: the right mean comes out, and the server's memory does not grow with the sites."""

import pytest
import torch
from torch.nn import functional as F

from simulations.flower_benchmark_app.arrays import change, examples, make_state
from simulations.flower_processes import Job, left_behind, run_job

MEGABYTES, ROUNDS, LIMIT_S = 40.0, 2, 300.0


def expected(sites):
    """The weighted mean of x + d_i in every round; prototypes: the direction of the weighted mean of directions."""
    numbers = range(1, sites + 1)
    state = {name: value.double() for name, value in make_state(MEGABYTES).items()}
    for _ in range(ROUNDS):
        for name, value in state.items():
            answers = [value + change(i) for i in numbers]
            if name == "prototypes":
                answers = [F.normalize(answer, dim=1) for answer in answers]
            mean = sum(examples(i) * answer for i, answer in zip(numbers, answers, strict=True))
            mean = mean / sum(examples(i) for i in numbers)
            state[name] = F.normalize(mean, dim=1) if name == "prototypes" else mean
    return {name: value.float() for name, value in state.items()}


def run(sites, folder):
    folder.mkdir()
    outcome = run_job(Job("ours", sites, ROUNDS, MEGABYTES), folder, LIMIT_S)
    assert not left_behind(folder)
    assert len(outcome.figures["rounds"]) == ROUNDS
    wanted = expected(sites)
    assert outcome.state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.state[name], value, rtol=0, atol=1e-6, msg=name)
    return outcome.figures


@pytest.mark.federation
def test_four_sites_take_no_more_memory_than_two(tmp_path):
    two, four = run(2, tmp_path / "two"), run(4, tmp_path / "four")
    assert four["peak_mb"] <= 1.3 * two["peak_mb"]
    # Python and torch alone take most of the peak. A server that held the answers would need a state more for each.
    assert four["peak_mb"] - two["peak_mb"] <= 0.5 * (4 - 2) * MEGABYTES


@pytest.mark.federation
def test_a_job_that_fails_shows_the_logs_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)did not end well.*flwr-run\.log"):
        run_job(Job("absent", 1, 1, 1.0), tmp_path, 60.0)
    assert not left_behind(tmp_path)
