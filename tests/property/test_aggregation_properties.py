"""What holds for every rule of aggregation, whatever the sites send."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.aggregation.adaptive import ServerAdam, ServerYogi
from fedssl.aggregation.divergence_aware import DivergenceAwareMean
from fedssl.aggregation.krum import Krum
from fedssl.aggregation.mean import WeightedMean
from fedssl.aggregation.median import Median
from fedssl.aggregation.server_momentum import ServerMomentum
from fedssl.aggregation.step_normalised import StepNormalisedMean
from fedssl.aggregation.trimmed_mean import TrimmedMean

settings.register_profile("torch", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("torch")
SEEDS = st.integers(0, 2**31)
SORTED = [Median(), TrimmedMean(), TrimmedMean(2), Krum(), Krum(1, 2)]
SUMMED = [
    WeightedMean(), ServerMomentum(), ServerMomentum(nesterov=True), ServerAdam(), ServerYogi(), StepNormalisedMean(),
    DivergenceAwareMean(),
]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def _name(rule):
    return f"{type(rule).__name__}{sorted(vars(rule).items())}"


def _run(rule, sites, reference, memory):
    total = rule.start()
    for state, examples, steps in sites:
        rule.fold(total, state, reference, examples=examples, steps=steps)
    return rule.finish(total, reference, memory)


def _state(generator, like, scale=1.0):
    return {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, (shape, dtype) in like.items()
    }


def _sites(seed, count, like, grid=None):
    """A start and the sites' answers; with a grid, values of few kinds so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    states = [_state(generator, like) for _ in range(count + 1)]
    if grid:
        states = [{name: (value * grid).round() / grid for name, value in state.items()} for state in states]
    figures = torch.randint(1, 100, (count, 2), generator=generator).tolist()
    return states[0], [(state, *pair) for state, pair in zip(states[1:], figures, strict=True)]


LIKE = {"a.weight": ((3, 2), torch.float64), "a.bias": ((3,), torch.float64), "scale": ((), torch.float64)}


@pytest.mark.parametrize("rule", SORTED, ids=_name)
@given(SEEDS, st.integers(5, 8), st.randoms(use_true_random=False), st.sampled_from([None, 1.0]))
def test_robust_rules_return_the_same_bits_in_every_order_of_sites_also_where_states_tie(rule, seed, count, rng, grid):
    reference, sites = _sites(seed, count, {**LIKE, "low": ((4,), torch.bfloat16)}, grid)
    expected, _ = _run(rule, sites, reference, {})
    rng.shuffle(sites)
    found, _ = _run(rule, sites, reference, {})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rule", SUMMED, ids=_name)
@given(SEEDS, st.integers(1, 8), st.randoms(use_true_random=False))
def test_rules_that_sum_do_not_depend_on_the_order_of_sites_beyond_float64_rounding(rule, seed, count, rng):
    reference, sites = _sites(seed, count, LIKE)
    memory = {}
    for _ in range(2):  # the second round has a memory
        expected, known = _run(rule, sites, reference, memory)
        rng.shuffle(sites)
        found, same = _run(rule, sites, reference, memory)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(same, known, rtol=1e-12, atol=1e-12)
        memory = known


@pytest.mark.parametrize("rule", [*SORTED, *SUMMED], ids=_name)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=5),
    SEEDS,
)
def test_every_rule_keeps_names_shapes_and_dtypes_and_remembers_tensors(rule, tensors, seed):
    like = {f"layer{i // 2}.t{i}": tensor for i, tensor in enumerate([*tensors, ((), torch.float32)])}
    reference, sites = _sites(seed, 5, like)
    state, memory = _run(rule, sites, reference, {})
    state, memory = _run(rule, sites, state, memory)
    assert [(n, v.shape, v.dtype) for n, v in state.items()] == [(n, v.shape, v.dtype) for n, v in reference.items()]
    assert all(torch.isfinite(value).all() for value in [*state.values(), *memory.values()])
    for name, value in memory.items():
        assert value.shape == reference[name.partition("/")[2]].shape


def _values(low, high, width=32):
    return st.floats(low, high, width=width, allow_nan=False)


@st.composite
def _attacks(draw, width=32):
    """``hostile`` and rows of 2 f + 3 sites with three weights, hostile ones first; the order in which they answer."""
    hostile = draw(st.integers(1, 3))
    top = 1e30 if width == 32 else 1e308
    bound = float(np.float32(top)) if width == 32 else top
    bad = st.lists(_values(-bound, bound, width), min_size=3, max_size=3)
    good = st.lists(_values(-10, 10, width) | st.sampled_from([-5e-324 if width == 64 else -1e-45, 0.0]), min_size=3,
                    max_size=3)  # fmt: skip
    rows = [draw(bad) for _ in range(hostile)] + [draw(good) for _ in range(hostile + 3)]
    return hostile, rows, draw(st.permutations(range(2 * hostile + 3)))


@pytest.mark.parametrize("width", [32, 64])
@given(st.data())
def test_hostile_sites_cannot_move_median_and_trimmed_mean_beyond_the_honest_range_of_any_weight(width, data):
    hostile, rows, order = data.draw(_attacks(width))
    dtype = torch.float32 if width == 32 else torch.float64
    states = [{"w": torch.tensor(row, dtype=dtype)} for row in rows]
    honest = torch.stack([state["w"] for state in states[hostile:]])
    for rule in (Median(), TrimmedMean(hostile)):
        found = _run(rule, [(states[i], 1 if i >= hostile else 10**8, 1) for i in order], states[-1], {})[0]["w"]
        assert (found >= honest.min(0).values).all()
        assert (found <= honest.max(0).values).all()


@given(SEEDS, st.integers(1, 3), _values(1e3, float(np.float32(1e30))), st.booleans(), st.integers(1, 4), st.data())
def test_krum_never_chooses_a_hostile_site_that_is_far_away(seed, hostile, far, together, keep, data):
    generator = torch.Generator().manual_seed(seed)
    honest = [{"w": torch.rand(4, generator=generator) * 2 - 1} for _ in range(hostile + 3)]
    places = [{"w": far * (torch.rand(4, generator=generator) + 1)} for _ in range(hostile)]
    bad = [places[0] if together else place for place in places]
    keep = min(keep, hostile + 1)
    order = data.draw(st.permutations([(state, 1, 1) for state in [*bad, *honest]]))
    found = _run(Krum(hostile, keep), order, honest[0], {})[0]["w"].double()
    rows = torch.stack([state["w"] for state in honest]).double()
    if keep == 1:
        assert (found == rows).all(1).any()
    assert (found >= rows.min(0).values - 1e-6).all()
    assert (found <= rows.max(0).values + 1e-6).all()


@given(SEEDS, st.integers(1, 6), st.integers(1, 50))
def test_equal_steps_make_the_step_normalised_mean_the_mean(seed, count, steps):
    reference, sites = _sites(seed, count, LIKE)
    sites = [(state, examples, steps) for state, examples, _ in sites]
    ours, _ = _run(StepNormalisedMean(), sites, reference, {})
    mean, _ = _run(WeightedMean(), sites, reference, {})
    torch.testing.assert_close(ours, mean, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.integers(1, 6))
def test_no_weight_of_the_divergence_aware_mean_leaves_the_range_of_the_sites_and_the_start(seed, count):
    reference, sites = _sites(seed, count, LIKE)
    state, _ = _run(DivergenceAwareMean(), sites, reference, {})
    for name, value in state.items():
        known = torch.stack([reference[name], *[site[name] for site, _, _ in sites]])
        assert (value >= known.min(0).values - 1e-12).all()
        assert (value <= known.max(0).values + 1e-12).all()


@given(SEEDS, _values(1e-6, 100.0, 64))
def test_the_first_step_of_the_adaptive_servers_is_bounded_by_their_rate_whatever_the_sites_moved(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    reference, site = _state(generator, LIKE), _state(generator, LIKE, scale)
    for rule in (ServerAdam(), ServerYogi()):
        state, _ = _run(rule, [(site, 1, 1)], reference, {})
        bound = rule.rate * (1 - rule.beta1) / math.sqrt(1 - rule.beta2)
        for name, value in state.items():
            assert ((value - reference[name]).abs() <= bound * (1 + 1e-9)).all()
