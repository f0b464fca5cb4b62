"""States on the wire: half precision, differences, checksums."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.aggregation.matching import aligned, match
from fedssl.errors import FederationError
from fedssl.packing import pack, size_in_bytes, unpack
from fedssl.update import Update

_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def _state(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(40, 3, generator=generator), "b": scale * torch.randn((), generator=generator)}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_halves_the_bytes_and_rounds_as_torch_does(precision):
    state = _state()
    full, half = pack(state)[0], pack(state, precision)[0]
    payload = [sum(len(array.data) for array in record.values()) - 128 for record in (full, half)]  # NumPy's header
    assert payload[1] * 2 == payload[0]
    back = unpack(*pack(state, precision))
    kind = getattr(torch, precision)
    assert all(torch.equal(back[name], value.to(kind).float()) for name, value in state.items())


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1e-2, 0.1]))
@settings(deadline=None)
def test_a_difference_is_rounded_by_its_own_size_not_by_that_of_the_weights(precision, seed, size):
    reference, change = _state(seed), _state(seed + 1, size)
    state = {name: reference[name] + change[name] for name in reference}
    back = unpack(*pack(state, precision, reference), reference)
    for name, value in state.items():
        error = (back[name] - value).abs()
        bound = _EPSILON[precision] * (value - reference[name]).abs() + 1e-6 * value.abs() + 1e-7
        assert bool((error <= bound).all())


def test_at_full_precision_a_reference_changes_nothing():
    state = _state()
    assert all(torch.equal(value, state[name]) for name, value in unpack(*pack(state, "float32", _state(5))).items())


def test_a_number_beyond_half_precision_is_refused_with_what_to_do():
    with pytest.raises(FederationError, match=r"federation\.precision=bfloat16"):
        pack({"w": torch.tensor([1e6])}, "float16")
    assert unpack(*pack({"w": torch.tensor([1e6])}, "bfloat16"))["w"].item() == pytest.approx(1e6, rel=1e-2)


def test_a_flipped_bit_is_noticed():
    arrays, layout = pack(_state())
    ((name, array),) = arrays.items()
    broken = bytearray(array.data)
    broken[-1] ^= 1
    changed = ArrayRecord({name: Array(array.dtype, array.shape, array.stype, bytes(broken))})
    with pytest.raises(FederationError, match="checksum"):
        unpack(changed, layout)


def test_an_unknown_precision_and_a_difference_to_nothing_are_refused():
    arrays, layout = pack(_state())
    with pytest.raises(FederationError, match="unknown precision"):
        unpack(arrays, ConfigRecord({**dict(layout), "precision": "float8"}))
    arrays, layout = pack(_state(), "bfloat16", _state(1))
    with pytest.raises(FederationError, match="not sent"):
        unpack(arrays, layout)
    with pytest.raises(FederationError, match="not sent"):
        unpack(arrays, layout, {"a": torch.zeros(1), "b": torch.zeros(())})
    assert json.loads(str(layout["layout"])).keys() == {"float32"}
    assert size_in_bytes.__doc__


def test_matching_finds_the_best_of_all_orders():
    generator = torch.Generator().manual_seed(0)
    own, reference = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    cosine = torch.nn.functional.normalize(reference, dim=1) @ torch.nn.functional.normalize(own, dim=1).T
    import itertools

    best = max(
        itertools.permutations(range(6)),
        key=lambda order: sum(float(cosine[k, order[k]]) for k in range(6) if cosine[k, order[k]] >= 0.3),
    )
    partner, similar = match(own, reference, similar=0.3)
    assert similar.tolist() == [float(cosine[k, best[k]]) >= 0.3 for k in range(6)]
    assert [p for p, kept in zip(partner.tolist(), similar, strict=True) if kept] == [
        best[k] for k in range(6) if similar[k]
    ]


def test_a_site_that_trained_by_itself_gets_its_prototypes_mass_and_use_in_our_order():
    reference = torch.eye(4)
    own = torch.stack([torch.eye(4)[2], torch.eye(4)[0], torch.tensor([0.1, 0.2, 0.1, -1.0]), torch.eye(4)[1]])
    counts = torch.tensor([20.0, 1.0, 30.0, 10.0])
    update = Update("late", {"w": torch.zeros(1), "prototypes": own}, 9, 1, counts, 2 * counts, {}, independent=True)
    turned = aligned(update, reference)
    assert turned.mass.tolist() == [1.0, 10.0, 20.0, 0.0]  # the last is like none of ours: it has no say
    assert turned.usage.tolist() == [2.0, 20.0, 40.0, 0.0]
    torch.testing.assert_close(turned.state["prototypes"], torch.eye(4))


def test_a_withheld_prototype_does_not_take_the_place_of_one_of_the_sites_own():
    reference = torch.eye(3)
    near = torch.nn.functional.normalize(torch.tensor([[0.8, 0.6, 0.0]]), dim=1)[0]
    own = torch.stack([reference[0], near, reference[2]])  # 0 came back as it was sent
    update = Update(
        "late", {"prototypes": own}, 9, 1, torch.tensor([0.0, 5.0, 5.0]), torch.ones(3), {}, independent=True
    )
    turned = aligned(update, reference)
    assert turned.mass.tolist() == [5.0, 0.0, 5.0]
    torch.testing.assert_close(turned.state["prototypes"][0], near)


def test_by_index_is_right_with_a_shared_start_and_matching_with_permuted_starts():
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    order = torch.randperm(64, generator=generator)
    own = torch.nn.functional.normalize(truth + 0.02 * torch.randn(64, 32, generator=generator), dim=1)[order]
    partner, similar = match(own, truth)
    assert bool(similar.all())
    assert float((own[partner] * truth).sum(1).mean()) > 0.98
    assert float((own * truth).sum(1).mean()) < 0.2
