"""Properties that hold for any input."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.aggregation import prototypes as prototype_rules
from fedssl.aggregation.mean import WeightedMean
from fedssl.aggregation.prototypes import PrototypeSum
from fedssl.data.pairing import epoch_order
from fedssl.optim import Schedule
from fedssl.packing import pack, unpack
from fedssl.prototypes import perplexity, sinkhorn

settings.register_profile("torch", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("torch")
SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(2, 30), st.integers(2, 12))
def test_every_sample_of_sinkhorn_sums_to_one_and_prototypes_share_equally_at_convergence(seed, batch, prototypes):
    scores = torch.randn(batch, prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    few = sinkhorn(scores, epsilon=0.5, iterations=3)
    many = sinkhorn(scores, epsilon=0.5, iterations=500)
    torch.testing.assert_close(few.sum(1), torch.ones(batch, dtype=torch.float64))
    torch.testing.assert_close(
        many.sum(0), torch.full((prototypes,), batch / prototypes, dtype=torch.float64), atol=1e-6, rtol=0
    )


@given(SEEDS, st.integers(1, 40))
def test_perplexity_lies_between_one_and_the_number_of_prototypes(seed, prototypes):
    mass = torch.rand(prototypes, generator=torch.Generator().manual_seed(seed)) + 1e-3
    assert 1 - 1e-9 <= perplexity(mass) <= prototypes + 1e-9
    assert perplexity(torch.ones(prototypes)) == pytest.approx(prototypes)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), SEEDS)
def test_an_epoch_holds_every_image_once_and_spreads_each_patient_evenly(sizes, seed):
    patients = np.repeat(np.arange(len(sizes)), sizes)
    order = epoch_order(patients, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(patients)))
    for patient, size in enumerate(sizes):
        places = np.flatnonzero(patients[order] == patient)
        gaps = np.diff(places)
        if size > 1:
            others = len(sizes)  # each other patient can slip in once more than its share
            assert gaps.max() <= len(patients) / size + others


_DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(
    st.lists(st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6),
    SEEDS,
)
def test_the_wire_returns_every_dtype_and_shape_unchanged(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(tensors)
    }
    arrays, layout = pack(state)
    back = unpack(arrays, layout)
    assert back.keys() == state.keys()
    assert len(arrays) == len({value.dtype for value in state.values()})
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def _sites(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        ({"w": torch.randn(3, 2, generator=generator), "b": torch.randn((), generator=generator)}, examples)
        for examples in torch.randint(1, 50, (count,), generator=generator).tolist()
    ]


@given(SEEDS, st.integers(1, 5))
def test_the_mean_does_not_depend_on_the_order_of_sites_and_keeps_keys_shapes_and_dtypes(seed, count):
    sites = _sites(seed, count)
    results = []
    for order in itertools.islice(itertools.permutations(sites), 6):
        total = WeightedMean().start()
        for state, examples in order:
            WeightedMean().fold(total, state, {}, examples=examples, steps=1)
        results.append(WeightedMean().finish(total, sites[0][0], {})[0])
    for result in results:
        assert {name: (value.shape, value.dtype) for name, value in result.items()} == {
            name: (value.shape, value.dtype) for name, value in sites[0][0].items()
        }
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


def test_the_mean_of_two_sites_is_what_a_person_computes():
    total = WeightedMean().start()
    WeightedMean().fold(total, {"w": torch.tensor([0.0, 4.0])}, {}, examples=1, steps=1)
    WeightedMean().fold(total, {"w": torch.tensor([4.0, 8.0])}, {}, examples=3, steps=1)
    assert WeightedMean().finish(total, {"w": torch.zeros(2)}, {})[0]["w"].tolist() == [3.0, 7.0]


def test_prototypes_are_averaged_by_mass_and_one_without_mass_stays():
    start = torch.eye(3)
    total = PrototypeSum()
    prototype_rules.fold(total, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]), torch.tensor([3.0, 1.0, 0.0]))
    prototype_rules.fold(total, torch.tensor([[0, 1.0, 0], [0, 1.0, 0], [1.0, 0, 0]]), torch.tensor([1.0, 1.0, 0.0]))
    result, agreement = prototype_rules.finish(total, start)
    torch.testing.assert_close(result[0], torch.tensor([3.0, 1.0, 0.0]) / 10**0.5)
    torch.testing.assert_close(result[1:], start[1:])
    lengths, masses = [10**0.5 / 4, 1.0], [4.0, 2.0]
    assert agreement == pytest.approx(sum(a * b for a, b in zip(lengths, masses, strict=True)) / 6)


def test_a_site_without_images_of_a_cluster_does_not_move_its_prototype():
    start = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    total = PrototypeSum()
    prototype_rules.fold(total, start, torch.full((4,), 10.0))
    prototype_rules.fold(total, noise, torch.tensor([0.0, 10.0, 0.0, 0.0]))
    result, _ = prototype_rules.finish(total, start)
    torch.testing.assert_close(result[[0, 2, 3]], start[[0, 2, 3]])
    assert not torch.allclose(result[1], start[1])


@given(st.floats(0, 1), st.floats(0.01, 0.5))
def test_the_learning_rate_rises_then_falls_and_never_leaves_zero_to_one(progress, warmup):
    value = Schedule("cosine", warmup)(progress)
    assert 0 <= value <= 1
    later = Schedule("cosine", warmup)(min(1.0, progress + 1e-3))
    assert later >= value - 1e-12 if progress + 1e-3 <= warmup else later <= value + 1e-12 or progress < warmup
