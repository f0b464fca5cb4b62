"""Rules of aggregation against numbers computed by hand, loops over the sites, and torch's own optimisers."""

import gc
import math
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedssl.aggregation import spool
from fedssl.aggregation.adaptive import ServerAdam, ServerYogi
from fedssl.aggregation.base import Aggregator
from fedssl.aggregation.divergence_aware import DivergenceAwareMean
from fedssl.aggregation.krum import Krum
from fedssl.aggregation.mean import WeightedMean
from fedssl.aggregation.median import Median
from fedssl.aggregation.server_momentum import ServerMomentum
from fedssl.aggregation.spool import Spool
from fedssl.aggregation.step_normalised import StepNormalisedMean
from fedssl.aggregation.trimmed_mean import TrimmedMean
from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.config import CONFIG_FOLDER, instantiate_node
from fedssl.errors import ConfigError, FederationError, StorageError

YAMLS = sorted((CONFIG_FOLDER / "aggregation").glob("*.yaml"), key=lambda path: path.stem)
ROBUST = [Median(), TrimmedMean(), Krum()]
REMEMBERING = [ServerMomentum(), ServerMomentum(nesterov=True), ServerAdam(), ServerYogi()]
RULES = [*ROBUST, *REMEMBERING, WeightedMean(), StepNormalisedMean(), DivergenceAwareMean()]


def _name(rule):
    return rule.stem if isinstance(rule, Path) else type(rule).__name__


def run_round(rule, states, reference, examples=None, steps=None, memory=None):
    """One round; sites of one image and one step unless said otherwise."""
    total = rule.start()
    for number, state in enumerate(states):
        rule.fold(
            total,
            state,
            reference,
            examples=examples[number] if examples else 1,
            steps=steps[number] if steps else 1,
        )
    return rule.finish(total, reference, memory or {})


def _one(*values):
    """States of one float64 weight each."""
    return [{"w": torch.tensor([float(value)], dtype=torch.float64)} for value in values]


def _weight(result):
    return result[0]["w"].item()


def random_states(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.stem.weight": (4, 3), "encoder.stem.bias": (4,), "head.weight": (2, 4), "scale": ()}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def _rows(states):
    """[sites, weights] in float64."""
    return np.stack([np.concatenate([v.double().numpy().ravel() for v in state.values()]) for state in states])


# ---------------------------------------------------------------- by hand
def test_server_momentum_of_two_sites_is_what_a_person_computes():
    rule = ServerMomentum(momentum=0.5, rate=2.0)
    state, memory = run_round(rule, _one(3, 7), *_one(1), examples=[1, 3])  # mean 6, d = 1 - 6 = -5
    assert memory["momentum/w"].tolist() == [-5.0]
    assert state["w"].tolist() == [11.0]  # 1 + 2 x 5
    state, memory = run_round(rule, _one(11, 9), state, memory=memory)  # mean 10, d = 1, v = -2.5 + 1
    assert memory["momentum/w"].tolist() == [-1.5]
    assert state["w"].tolist() == [14.0]


def test_nesterov_looks_one_step_ahead_as_a_person_computes():
    rule = ServerMomentum(momentum=0.5, nesterov=True)
    assert _weight(run_round(rule, _one(3, 7), *_one(1), examples=[1, 3])) == 8.5  # d = v = -5: 1 + 5 + 0.5 x 5


def test_server_adam_of_two_sites_is_what_a_person_computes():
    rule = ServerAdam(rate=2.0, beta1=0.5, beta2=0.5, tau=1.0)
    state, memory = run_round(rule, _one(4, 8), *_one(0), examples=[1, 3])  # d = 7
    assert memory["first/w"].tolist() == [3.5]
    assert memory["second/w"].tolist() == [25.0]  # half of 1 and of 49
    assert state["w"].tolist() == pytest.approx([7 / 6])  # 2 x 3.5 / (5 + 1)


def test_server_yogi_of_two_sites_is_what_a_person_computes():
    rule = ServerYogi(rate=2.0, beta1=0.5, beta2=0.5, tau=1.0)
    state, memory = run_round(rule, _one(1, 5), *_one(0), examples=[1, 3])  # d = 4
    assert memory["second/w"].tolist() == [9.0]  # 1 + half of 16
    assert state["w"].tolist() == [1.0]  # 2 x 2 / (3 + 1)
    before = {"first/w": torch.zeros(1, dtype=torch.float64), "second/w": torch.tensor([24.0], dtype=torch.float64)}
    state, memory = run_round(rule, _one(1, 5), *_one(0), examples=[1, 3], memory=before)
    assert memory["second/w"].tolist() == [16.0]  # 24 - half of 16
    assert state["w"].tolist() == pytest.approx([0.8])  # 2 x 2 / (4 + 1)


def test_step_normalised_mean_of_two_sites_is_what_a_person_computes():
    # moves for each step 2 and 3, images 1/4 and 3/4, mean steps 3.5, mean move 2.75
    assert _weight(run_round(StepNormalisedMean(), _one(-4, -12), *_one(0), examples=[1, 3], steps=[2, 4])) == -9.625


def test_a_site_that_took_no_step_counts_as_one_that_did_not_move():
    assert _weight(run_round(StepNormalisedMean(), _one(0, 4), *_one(0), steps=[0, 1])) == 2.0


def _layer(weight, bias):
    return {
        "a.weight": torch.tensor([weight], dtype=torch.float64),
        "a.bias": torch.tensor([bias], dtype=torch.float64),
    }


def test_divergence_aware_mean_of_three_sites_is_what_a_person_computes():
    sites = [_layer(6.0, 8.0), _layer(5.0, 0.0), _layer(-3.0, -4.0)]  # cosines to (3, 4): 1, 0.6, -1
    state, _ = run_round(DivergenceAwareMean(), sites, _layer(3.0, 4.0), examples=[1, 5, 9])
    assert state["a.weight"].item() == pytest.approx((1 * 6 + 3 * 5) / 4)
    assert state["a.bias"].item() == pytest.approx((1 * 8 + 3 * 0) / 4)


def test_a_layer_that_starts_at_zero_is_averaged_by_images_and_one_that_all_turn_against_stays():
    mean, _ = run_round(DivergenceAwareMean(), [_layer(1.0, 0.0), _layer(-7.0, 4.0)], _layer(0.0, 0.0), examples=[3, 1])
    assert (mean["a.weight"].item(), mean["a.bias"].item()) == (-1.0, 1.0)
    start = _layer(3.0, 4.0)
    kept, _ = run_round(DivergenceAwareMean(), [_layer(-1.0, 0.0), _layer(0.0, 0.0)], start)
    assert (kept["a.weight"].item(), kept["a.bias"].item()) == (3.0, 4.0)
    assert kept["a.weight"].data_ptr() != start["a.weight"].data_ptr()


def test_layers_are_weighted_apart_and_weights_of_any_size_have_a_cosine():
    big = 1e300
    reference = {"a.w": torch.tensor([big], dtype=torch.float64), "b.w": torch.tensor([1.0], dtype=torch.float64)}
    turned = {"a.w": torch.tensor([-big], dtype=torch.float64), "b.w": torch.tensor([3.0], dtype=torch.float64)}
    half = {name: value / 2 for name, value in reference.items()}
    state, _ = run_round(DivergenceAwareMean(), [half, turned], reference)
    assert (state["a.w"].item(), state["b.w"].item()) == (big / 2, 1.75)


def test_the_median_is_the_middle_value_or_the_mean_of_the_middle_two():
    assert _weight(run_round(Median(), _one(9, 1, 4), *_one(0), examples=[1, 1, 1000])) == 4.0
    assert _weight(run_round(Median(), _one(9, 1, 4, 5), *_one(0))) == 4.5
    largest = torch.finfo(torch.float64).max
    assert _weight(run_round(Median(), _one(largest, largest, largest, largest), *_one(0))) == largest


def test_the_trimmed_mean_drops_the_extremes_of_each_weight():
    sites = [{"w": torch.tensor(pair)} for pair in ([1.0, -99.0], [2.0, 7.0], [100.0, 1.0], [6.0, 4.0], [-50.0, 50.0])]
    state, _ = run_round(TrimmedMean(hostile=1), sites, {"w": torch.zeros(2)}, examples=[1, 1, 1000, 1, 1])
    assert state["w"].tolist() == [3.0, 4.0]
    state, _ = run_round(TrimmedMean(hostile=2), sites, {"w": torch.zeros(2)})
    assert state["w"].tolist() == [2.0, 4.0]
    assert _weight(run_round(TrimmedMean(hostile=1), _one(*[0.9] * 5), *_one(0))) == 0.9  # 3 x 0.9 / 3 < 0.9


def test_krum_takes_the_most_central_of_five_sites_as_a_person_computes():
    sites = _one(100, 4.5, 0, 2.5, 1)  # two nearest others: 1 has 1 + 2.25, then 2.5 has 2.25 + 4, 0 has 1 + 6.25
    assert _weight(run_round(Krum(), sites, *_one(0))) == 1.0
    assert _weight(run_round(Krum(keep=2), sites, *_one(0))) == 1.75


def test_of_two_equally_central_states_krum_takes_the_same_in_every_order():
    for order in ((0, 1, 3, 4, 100), (100, 4, 3, 1, 0), (3, 0, 100, 1, 4)):  # 1 and 3 both score 5
        assert _weight(run_round(Krum(), _one(*order), *_one(0))) == 1.0


# ---------------------------------------------------------------- dumber oracles
def _pulls(target, reference, seed):
    """Three sites that each move a random part of the way to a target."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: v + (target[n] - v) * torch.rand(v.shape, generator=generator, dtype=v.dtype) for n, v in reference.items()}
        for _ in range(3)
    ]


def _mean_of(states, examples):
    share = [count / sum(examples) for count in examples]
    return {name: sum(p * state[name] for p, state in zip(share, states, strict=True)) for name in states[0]}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 0.3)])
def test_server_momentum_equals_torch_sgd_on_the_pseudo_gradient_over_rounds(momentum, rate, nesterov):
    rule, (state, target) = ServerMomentum(momentum, rate, nesterov=nesterov), random_states(2)
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    sgd = torch.optim.SGD(parameters.values(), lr=rate, momentum=momentum, nesterov=nesterov)
    memory = {}
    for number in range(6):
        sites, examples = _pulls(target, state, number), [5, 1, 10]
        mean = _mean_of(sites, examples)
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - mean[name]
        sgd.step()
        state, memory = run_round(rule, sites, state, examples, memory=memory)
        for name, parameter in parameters.items():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_server_momentum_without_momentum_is_the_mean():
    reference, *sites = random_states(4)
    ours, _ = run_round(ServerMomentum(momentum=0.0), sites, reference, [3, 1, 2])
    mean, _ = run_round(WeightedMean(), sites, reference, [3, 1, 2])
    torch.testing.assert_close(ours, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [ServerAdam, ServerYogi])
def test_adaptive_servers_equal_a_loop_over_the_paper(kind):
    rate, beta1, beta2, tau = 0.1, 0.8, 0.95, 0.01
    rule, (state, target) = kind(rate, beta1, beta2, tau), random_states(2)
    weights = _rows([state])[0].tolist()
    first, second, memory = [0.0] * len(weights), [tau**2] * len(weights), {}
    for number in range(5):
        sites, examples = _pulls(target, state, number), [5, 1, 10]
        rows = _rows(sites)
        for i, before in enumerate(weights):
            delta = sum(n * row[i] for n, row in zip(examples, rows, strict=True)) / 16 - before
            first[i] = beta1 * first[i] + (1 - beta1) * delta
            if kind is ServerAdam:
                second[i] = beta2 * second[i] + (1 - beta2) * delta**2
            elif second[i] > delta**2:
                second[i] -= (1 - beta2) * delta**2
            else:
                second[i] += (1 - beta2) * delta**2
            weights[i] = before + rate * first[i] / (math.sqrt(second[i]) + tau)
        state, memory = run_round(rule, sites, state, examples, memory=memory)
        np.testing.assert_allclose(_rows([state])[0], weights, rtol=1e-12, atol=1e-12)


def test_step_normalised_mean_equals_a_loop_over_the_paper_and_with_equal_steps_the_mean():
    reference, *sites = random_states(5)
    examples, steps = [4, 1, 7, 2], [10, 3, 1, 25]
    rows, start = _rows(sites), _rows([reference])[0]
    share = [count / 14 for count in examples]
    expected = []
    for i, before in enumerate(start):
        moves = [(before - row[i]) / taken for row, taken in zip(rows, steps, strict=True)]
        mean_steps = sum(p * taken for p, taken in zip(share, steps, strict=True))
        expected.append(before - mean_steps * sum(p * move for p, move in zip(share, moves, strict=True)))
    state, memory = run_round(StepNormalisedMean(), sites, reference, examples, steps)
    np.testing.assert_allclose(_rows([state])[0], expected, rtol=1e-12, atol=1e-12)
    assert memory == {}
    equal, _ = run_round(StepNormalisedMean(), sites, reference, examples, [7] * 4)
    mean, _ = run_round(WeightedMean(), sites, reference, examples)
    torch.testing.assert_close(equal, mean, rtol=1e-12, atol=1e-12)


def test_divergence_aware_mean_equals_a_loop_over_sites_and_layers():
    reference, *sites = random_states(5, seed=2)
    examples = [4, 1, 7, 2]
    state, _ = run_round(DivergenceAwareMean(), sites, reference, examples)
    for names in (["encoder.stem.weight", "encoder.stem.bias"], ["head.weight"], ["scale"]):
        start = np.concatenate([reference[name].numpy().ravel() for name in names])
        top, bottom = 0.0, 0.0
        for site, images in zip(sites, examples, strict=True):
            layer = np.concatenate([site[name].numpy().ravel() for name in names])
            weight = images * max(0.0, layer @ start / np.sqrt((layer @ layer) * (start @ start)))
            top, bottom = top + weight * layer, bottom + weight
        found = np.concatenate([state[name].numpy().ravel() for name in names])
        np.testing.assert_allclose(found, top / bottom if bottom else start, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 2**22])
@pytest.mark.parametrize("count", [3, 4, 7, 8])
def test_median_and_trimmed_mean_equal_loops_over_weights_at_any_size_of_block(monkeypatch, block, count):
    monkeypatch.setattr(spool, "BLOCK", block)
    reference, *sites = random_states(count + 1)
    hostile = (count - 1) // 2
    middle, _ = run_round(Median(), sites, reference)
    trimmed, _ = run_round(TrimmedMean(hostile), sites, reference)
    columns = [sorted(column) for column in _rows(sites).T.tolist()]
    np.testing.assert_allclose(_rows([middle])[0], [np.median(column) for column in columns], rtol=1e-15)
    kept = [column[hostile : count - hostile] for column in columns]
    np.testing.assert_allclose(_rows([trimmed])[0], [sum(k) / len(k) for k in kept], rtol=1e-12)


@pytest.mark.parametrize("block", [1, 20, 2**22])
@pytest.mark.parametrize(("count", "hostile", "keep"), [(5, 1, 1), (5, 1, 2), (8, 2, 4), (9, 3, 1)])
def test_krum_equals_a_loop_over_pairs_at_any_size_of_block(monkeypatch, block, count, hostile, keep):
    monkeypatch.setattr(spool, "BLOCK", block)
    reference, *sites = random_states(count + 1, seed=count)
    rows, score = _rows(sites), []
    for one in range(count):
        distances = [sum((rows[one] - rows[other]) ** 2) for other in range(count) if other != one]
        score.append(sum(sorted(distances)[: count - hostile - 2]))
    best = sorted(range(count), key=score.__getitem__)[:keep]
    state, _ = run_round(Krum(hostile, keep), sites, reference)
    np.testing.assert_allclose(_rows([state])[0], sum(rows[site] for site in best) / keep, rtol=1e-12)


# ---------------------------------------------------------------- hostile sites
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(2), Krum(2), Krum(2, 3)], ids=_name)
@pytest.mark.parametrize("value", [1e200, -1e308, math.inf, -math.inf, math.nan])
def test_two_sites_of_seven_that_agree_on_an_absurd_value_are_held_off(rule, value):
    reference, *honest = random_states(6)
    hostile = {name: torch.full_like(like, value) for name, like in reference.items()}
    state, _ = run_round(rule, [hostile, *honest[:3], hostile, *honest[3:]], reference, [10**8, *[1] * 6])
    rows, found = _rows(honest), _rows([state])[0]
    assert (found >= rows.min(0) - 1e-12).all()
    assert (found <= rows.max(0) + 1e-12).all()


@pytest.mark.parametrize(
    ("rule", "count", "remedy"),
    [
        (Median(), 2, "needs 3. Add sites"),
        (TrimmedMean(2), 4, "aggregation.hostile=2 needs 5. Lower aggregation.hostile"),
        (Krum(2), 6, "needs 7. Lower aggregation.hostile"),
        (Krum(1, 4), 6, "aggregation.keep=4 needs 7. Lower aggregation.hostile or aggregation.keep"),
    ],
)
def test_a_robust_rule_says_how_many_answered_how_many_it_needs_and_what_to_do(rule, count, remedy):
    reference, *sites = random_states(count + 1)
    with pytest.raises(FederationError, match=f"^{count} sites answered well.*{remedy}"):
        run_round(rule, sites, reference)
    assert rule.least_sites == count + 1
    run_round(rule, [*sites, reference], reference)


# ---------------------------------------------------------------- every rule
@pytest.mark.parametrize("path", YAMLS, ids=_name)
def test_every_yaml_builds_and_five_sites_that_changed_nothing_return_the_start(path):
    rule = instantiate_node(yaml.safe_load(path.read_text()))
    assert isinstance(rule, Aggregator)
    reference = random_states(1, dtype=torch.float32)[0]
    state, _ = run_round(rule, [reference] * 5, reference, [1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    torch.testing.assert_close(state, reference, rtol=0, atol=1e-6)
    assert list(state) == list(reference)


def test_every_rule_of_this_file_has_a_yaml_with_the_defaults_of_its_class():
    rules = {type(rule): vars(rule) for rule in (instantiate_node(yaml.safe_load(path.read_text())) for path in YAMLS)}
    for rule in RULES:
        assert rules[type(rule)] == vars(type(rule)())


@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_no_rule_changes_what_it_is_given(rule):
    reference, *sites = random_states(6)
    memory = run_round(rule, sites, reference)[1]
    given = [reference, *sites, memory]
    before = [{name: value.clone() for name, value in state.items()} for state in given]
    state, after = run_round(rule, sites, reference, [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], memory)
    for value in [*state.values(), *after.values()]:
        value.add_(1.0)  # what is returned is nobody else's
    for one, other in zip(given, before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=_name)
def test_a_memory_that_went_through_a_file_leads_to_the_same_rounds(rule, dtype, tmp_path):
    (state, target), memory = random_states(2, dtype=dtype), {}
    resumed, stored = state, {}
    for number in range(3):
        sites = _pulls(target, state, number) + _pulls(target, state, number + 10)
        state, memory = run_round(rule, sites, state, memory=memory)
        resumed, stored = run_round(rule, sites, resumed, memory=stored)
        assert all(isinstance(value, torch.Tensor) for value in memory.values())
        save_tensors(tmp_path / "memory.safetensors", {**resumed, **stored}, {}, "the memory")
        back, _ = load_tensors(tmp_path / "memory.safetensors")
        resumed, stored = {name: back[name] for name in resumed}, {name: back[name] for name in stored}
        torch.testing.assert_close(resumed, state, rtol=0, atol=0)
        torch.testing.assert_close(stored, memory, rtol=0, atol=0)


def test_rules_with_momentum_remember_under_names_of_their_own():
    reference, *sites = random_states(4)
    for rule in RULES:
        prefixes = {name.split("/")[0] for name in run_round(rule, sites * 2, reference)[1]}
        expected = {ServerMomentum: {"momentum"}, ServerAdam: {"first", "second"}, ServerYogi: {"first", "second"}}
        assert prefixes == expected.get(type(rule), set())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ServerMomentum, {"momentum": 1.0}),
        (ServerMomentum, {"momentum": -0.1}),
        (ServerMomentum, {"rate": 0.0}),
        (ServerMomentum, {"rate": math.nan}),
        (ServerAdam, {"rate": -1.0}),
        (ServerAdam, {"tau": 0.0}),
        (ServerAdam, {"beta1": 1.0}),
        (ServerYogi, {"beta2": 1.5}),
        (ServerYogi, {"rate": math.inf}),
        (TrimmedMean, {"hostile": 0}),
        (TrimmedMean, {"hostile": True}),
        (Krum, {"hostile": 0}),
        (Krum, {"keep": 0}),
    ],
)
def test_a_setting_without_sense_is_refused_by_its_name(kind, settings):
    ((key, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"aggregation.{key}={value}"):
        kind(**settings)


# ---------------------------------------------------------------- the spool
def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_spool_gives_back_every_number_of_every_dtype(monkeypatch, dtype):
    monkeypatch.setattr(spool, "BLOCK", 10)
    states = random_states(3, dtype=dtype)
    states[1]["head.weight"] = states[1]["head.weight"].T.contiguous().T  # another layout in memory
    kept = Spool()
    for state in states:
        kept.add(dict(reversed(state.items())))  # another order of names
    for site, state in enumerate(states):
        back = kept.combine(lambda block: block[0], states[0], [site])
        assert list(back) == list(state)
        assert all(v.untyped_storage().nbytes() == v.nbytes for v in back.values())  # no view of all weights
        torch.testing.assert_close(back, state, rtol=0, atol=0)


def test_a_state_without_weights_can_be_spooled():
    reference = {"w": torch.zeros(0, 3)}
    for rule in ROBUST:
        assert run_round(rule, [reference] * 5, reference)[0]["w"].shape == (0, 3)


def test_the_spool_leaves_no_name_in_the_folder_and_no_open_file_also_after_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = _open_files()
    total = Median().start()
    Median().fold(total, random_states(1)[0], {}, examples=1, steps=1)
    assert _open_files() == before + 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FederationError):
        Median().finish(total, random_states(1)[0], {})
    del total
    assert _open_files() == before


def test_a_full_disk_is_explained_and_closes_its_file(monkeypatch):
    gc.collect()
    before = _open_files()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", buffering=0))  # noqa: SIM115
    kept = Spool()
    with pytest.raises(StorageError, match=r"disk is full.*TMPDIR") as caught:
        kept.add(random_states(1)[0])
    assert kept.sites == 0
    del kept, caught
    gc.collect()
    assert _open_files() == before


def test_a_disk_that_fills_up_in_the_middle_of_a_state_leaves_the_states_before_it_whole():
    one, two = random_states(2)
    kept, (soft, hard) = Spool(), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept.add(one)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 25 * 8 - 4, hard))  # half of the last number has no room
        with pytest.raises(StorageError, match="disk is full"):
            kept.add(two)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.sites == 1
    kept.add(two)
    for site, state in enumerate((one, two)):
        torch.testing.assert_close(kept.combine(lambda block: block[0], state, [site]), state, rtol=0, atol=0)


def test_a_folder_for_temporary_files_that_is_missing_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "patients"))
    with pytest.raises(StorageError, match="TMPDIR") as caught:
        Median().start()
    assert "patients" not in str(caught.value)


def test_a_spool_that_was_cut_short_is_explained():
    kept = Spool()
    kept.add(random_states(1)[0])
    kept._file.truncate(8)
    with pytest.raises(StorageError, match="shorter"):
        list(kept.blocks())
