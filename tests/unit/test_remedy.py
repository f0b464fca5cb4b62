"""What the server does against collapse: dead prototypes start again, the contrastive term weighs more."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedssl import wire
from fedssl.errors import ConfigError
from fedssl.methods.contrastive_clustering import ContrastiveClustering
from fedssl.order import Order
from fedssl.prototypes import reseed
from server.remedy import Remedy
from server.rounds import RoundResult

_HEALTHY = {"loss": 1.0, "images": 100.0, "clustering": 1.0, "effective_prototypes": 8.0, "rankme": 20.0}
_ILL = _HEALTHY | {"clustering": math.log(8)}


def _result(number=10, ill=(), sites=("A", "B", "C"), usage=None):
    metrics = {site: _ILL if site in ill else _HEALTHY for site in sites}
    prototypes = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    shares = usage or [1 / 8] * 8
    return RoundResult(
        number,
        {"prototypes": prototypes, "encoder.w": torch.ones(2)},
        metrics=metrics,
        examples=dict.fromkeys(sites, 100),
        usage=dict.fromkeys(sites, shares),
    )


def _remedy(**changed):
    plain = {
        "rounds": 20,
        "num_prototypes": 8,
        "num_blocks": 1,
        "width": 64,
        "seed": 0,
        "reseed": False,
        "contrast": 1.0,
    }
    return Remedy(**(plain | changed))


def test_signs_are_looked_for_only_after_the_first_rounds():
    assert _remedy().treat(_result(number=3, ill="ABC"), 1.0).signs == {}
    assert set(_remedy().treat(_result(number=5, ill="AC"), 1.0).signs) == {"A", "C"}


def test_without_a_remedy_nothing_changes_but_the_signs():
    before = _result(ill="ABC", usage=[1.0] + [0.0] * 7)
    after = _remedy().treat(before, 1.0)
    assert torch.equal(after.state["prototypes"], before.state["prototypes"])
    assert (after.contrast, after.reseeded) == (1.0, 0)


def test_dead_prototypes_start_again_beside_the_busiest_and_the_others_stay():
    shares = [0.5, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]
    before = _result(ill="ABC", usage=shares)
    after = _remedy(reseed=True).treat(before, 1.0)
    old, new = before.state["prototypes"], after.state["prototypes"]
    assert after.reseeded == 5
    assert torch.equal(new[:3], old[:3])
    torch.testing.assert_close(new.norm(dim=1), torch.ones(8))
    # 0.5 is split first, then 0.3, then 0.25 (half of 0.5), then 0.2, then 0.15
    parents = (new[3:] @ old[:3].T).argmax(1).tolist()
    assert parents == [0, 1, 0, 2, 1]
    assert ((new[3:] @ old[:3].T).amax(1) > 0.9).all()
    assert torch.equal(new, _remedy(reseed=True).treat(before, 1.0).state["prototypes"])


def test_a_healthy_round_is_not_reseeded():
    assert _remedy(reseed=True).treat(_result(ill="A", usage=[1.0] + [0.0] * 7), 1.0).reseeded == 0
    assert _remedy(reseed=True).treat(_result(ill="AB", usage=[1.0] + [0.0] * 7), 1.0).reseeded == 7


def test_a_prototype_that_one_site_uses_is_not_dead():
    result = _result(ill="AB", sites=("A", "B"))
    result.usage = {"A": [0.125] * 8, "B": [1.0] + [0.0] * 7}
    assert _remedy(reseed=True).treat(result, 1.0).reseeded == 0


def test_what_a_small_hospital_alone_uses_is_not_dead():
    result = _result(ill=("large", "small"), sites=("large", "small"))
    result.usage = {"large": [0.25] * 4 + [0.0] * 4, "small": [0.0] * 4 + [0.25] * 4}
    result.examples = {"large": 5000, "small": 50}
    assert _remedy(reseed=True).treat(result, 1.0).reseeded == 0


def test_prototypes_of_a_block_start_again_beside_busy_ones_of_the_same_block():
    before = _result(ill="ABC", usage=[0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0])
    new = _remedy(reseed=True, num_blocks=2).treat(before, 1.0).state["prototypes"]
    old = before.state["prototypes"]
    nearest = (new @ old[[0, 4]].T).argmax(1).tolist()
    assert nearest == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_block_that_nobody_has_images_for_is_left_alone():
    before = _result(ill="ABC", usage=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    after = _remedy(reseed=True, num_blocks=2).treat(before, 1.0)
    assert after.reseeded == 2
    assert torch.equal(after.state["prototypes"][4:], before.state["prototypes"][4:])


def test_a_collapse_inside_blocks_is_seen():
    result = _result()
    result.metrics = dict.fromkeys("ABC", _HEALTHY | {"clustering": math.log(4)})
    assert _remedy().treat(result, 1.0).signs == {}
    assert set(_remedy(num_blocks=2).treat(result, 1.0).signs) == {"A", "B", "C"}


def test_the_last_round_is_not_reseeded_because_nothing_trains_the_new_prototypes():
    assert _remedy(reseed=True).treat(_result(number=20, ill="ABC", usage=[1.0] + [0.0] * 7), 1.0).reseeded == 0


def test_the_contrastive_term_weighs_more_while_most_sites_show_signs_and_less_when_none_does():
    remedy = _remedy(contrast=2.0)
    assert remedy.treat(_result(ill="AB"), 1.0).contrast == 2.0
    assert remedy.treat(_result(ill="A"), 2.0).contrast == 2.0
    assert remedy.treat(_result(), 2.0).contrast == 1.0
    assert remedy.treat(_result(), 1.0).contrast == 1.0
    assert remedy.treat(_result(ill="ABC"), wire.MOST_CONTRAST).contrast == wire.MOST_CONTRAST


def test_reseeding_with_random_shares_keeps_the_sphere_and_counts_the_dead():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        prototypes = F.normalize(torch.randn(32, 8, generator=generator), dim=1)
        share = torch.rand(32, generator=generator) * (torch.rand(32, generator=generator) < 0.5)
        share = share / share.sum()
        new, count = reseed(prototypes, share[None], generator)
        dead = [k for k in range(32) if share[k] < 0.1 / 32]
        assert count == len(dead)
        assert all(torch.equal(new[k], prototypes[k]) for k in range(32) if k not in dead)
        torch.testing.assert_close(new.norm(dim=1), torch.ones(32))


def test_a_site_refuses_an_absurd_contrast():
    for value in (0.5, 100.0, float("nan")):
        order = wire.write_order(Order("ab" * 8, 1, 2, "f", value), None)
        with pytest.raises(ConfigError, match="contrastive term"):
            wire.read_order(order, "f")
    order = wire.write_order(Order("ab" * 8, 1, 2, "f", 4.0), None)
    assert wire.read_order(order, "f").order.contrast == 4.0


def test_the_default_methods_contrastive_term_takes_the_factor():
    from fedssl.data.batches import ViewBatch
    from fedssl.encoders import build_encoder

    method = ContrastiveClustering(
        build_encoder("test_resnet", norm_groups=16), num_prototypes=8, hidden=16, width=8, contrastive_temperature=0.2,
        clustering_temperature=0.1, epsilon=0.05, iterations=3,
    )  # fmt: skip
    views = [torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    batch = ViewBatch(views, torch.zeros(2, 4, dtype=torch.long), torch.full((4,), -1))
    method.contrast = 3.0
    loss = method.loss(batch)
    torch.testing.assert_close(loss.total.detach(), 3.0 * loss.terms["contrastive"] + loss.terms["clustering"])
