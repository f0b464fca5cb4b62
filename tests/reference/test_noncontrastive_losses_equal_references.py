"""BYOL and Barlow Twins against lightly and loops."""

import copy

import pytest
import same_losses as shared
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity
from torch import nn

from fedssl.methods import barlow, byol
from fedssl.momentum import follow, rising_momentum

LIGHTLY_BARLOW = BarlowTwinsLoss(lambda_param=0.0051)


@shared.in_both_precisions
def test_the_regression_of_byol_and_its_gradient_equal_lightly_and_equation_2(dtype, tolerance):
    def equation_2(predictions, targets):
        pairs = [(p / p.norm(), t / t.norm()) for p, t in zip(predictions, targets, strict=True)]
        return sum(((p - t) ** 2).sum() for p, t in pairs) / len(pairs)

    rows = shared.draw(0, (6, 5), (6, 5), dtype=dtype)
    shared.assert_same(byol.regression, equation_2, rows, tolerance)
    shared.assert_same(byol.regression, lambda p, t: 2.0 + 2.0 * NegativeCosineSimilarity()(p, t), rows, tolerance)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.98), (0.5, 0.99), (1.0, 1.0)])
def test_the_momentum_rises_by_half_a_cosine(progress, expected):
    assert rising_momentum(0.98, progress) == pytest.approx(expected, abs=1e-15)


@shared.in_both_precisions
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_a_target_follows_as_a_loop_over_its_weights_does(dtype, tolerance, momentum):
    slow, fast = (nn.ParameterList(shared.draw(seed, (3, 2), (2,), dtype=dtype)) for seed in range(2))
    expected = [momentum * old.data + (1.0 - momentum) * new.data for old, new in zip(slow, fast, strict=True)]
    follow(slow, fast, momentum=momentum)
    torch.testing.assert_close(list(slow), expected, rtol=0, atol=tolerance)


@shared.in_both_precisions
def test_byol_predicts_its_slow_copy_of_the_other_view_in_both_directions(dtype, tolerance):
    method = byol.BYOL(shared.small_encoder(), hidden=16, width=8, momentum=0.9).to(dtype)
    online, slow = nn.Sequential(method.encoder, method.projector), copy.deepcopy(method.target)
    shared.move(online, seed=2)
    method.begin_step(0.25)
    follow(slow, online, momentum=rising_momentum(0.9, 0.25))
    batch, head = shared.make_batch(1, dtype), nn.Sequential(method.projector, method.predictor)
    first, second = shared.project_by_hand(method.encoder, head, batch.views)
    slow_first, slow_second = (rows.detach() for rows in shared.project_by_hand(*slow, batch.views))
    lightly = NegativeCosineSimilarity()
    reference = 4.0 + 2.0 * lightly(first, slow_second) + 2.0 * lightly(second, slow_first)
    shared.assert_same_training(method, method.loss(batch).total, reference, tolerance)
    method.begin_round()
    torch.testing.assert_close(list(method.target.parameters()), list(online.parameters()), rtol=0, atol=0)


def _barlow(first, second):
    correlation = barlow.cross_correlation(first, second)
    return barlow.invariance(correlation) + 0.0051 * barlow.redundancy(correlation)


def _barlow_loop(first, second):
    total, centred = 0.0, [view - sum(view) / len(view) for view in (first, second)]
    first, second = (view / (sum(view**2) / len(view) + 1e-5) ** 0.5 for view in centred)
    for i, own in enumerate(first.T):
        for j, other in enumerate(second.T):
            c = sum(own * other) / len(own)
            total = total + ((1.0 - c) ** 2 if i == j else 0.0051 * c**2)
    return total


@shared.in_both_precisions
@pytest.mark.parametrize("reference", [LIGHTLY_BARLOW, _barlow_loop], ids=["lightly", "loop"])
def test_barlow_twins_and_its_gradient_equal_lightly_and_a_loop(dtype, tolerance, reference):
    shared.assert_same(_barlow, reference, shared.draw(3, (8, 5), (8, 5), dtype=dtype), tolerance)


@shared.in_both_precisions
def test_the_method_barlow_twins_is_its_loss_of_the_first_two_projections(dtype, tolerance):
    method = barlow.BarlowTwins(shared.small_encoder(), hidden=16, width=8, redundancy_weight=0.0051).to(dtype)
    batch = shared.make_batch(4, dtype)
    reference = LIGHTLY_BARLOW(*shared.project_by_hand(method.encoder, method.projector, batch.views))
    shared.assert_same_training(method, method.loss(batch).total, reference, tolerance)
