"""Losses against loops from the papers and against lightly and POT, forward and gradient."""

import math

import numpy as np
import ot
import pytest
import torch
from lightly.loss import NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch.nn import functional as F

from fedssl.contrastive import nt_xent
from fedssl.prototypes import sinkhorn, swapped_prediction


def _pairs(seed, dtype=torch.float64, batch=6, width=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_a_loop_over_equation_1(temperature):
    first, second = _pairs(0)
    points = F.normalize(torch.cat([first, second]), dim=1).detach().numpy()
    batch, total = len(first), 0.0
    for i in range(2 * batch):
        j = (i + batch) % (2 * batch)
        below = sum(math.exp(points[i] @ points[k] / temperature) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(points[i] @ points[j] / temperature) / below)
    assert nt_xent(first, second, temperature=temperature).item() == pytest.approx(total / (2 * batch), abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_nt_xent_and_its_gradient_equal_lightly(dtype, tolerance):
    ours, theirs = _pairs(1, dtype), _pairs(1, dtype)
    loss, reference = nt_xent(*ours, temperature=0.2), NTXentLoss(temperature=0.2)(*theirs)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=0, atol=tolerance)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_sinkhorn_equals_lightly_after_three_iterations(dtype, tolerance):
    scores = torch.randn(20, 7, dtype=dtype, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    reference = lightly_sinkhorn(scores, iterations=3, epsilon=0.05)
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.05, iterations=3), reference, rtol=0, atol=tolerance)


def test_sinkhorn_at_convergence_is_the_optimal_transport_plan_of_pot():
    scores = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    plan = ot.sinkhorn(
        np.full(12, 1 / 12), np.full(4, 1 / 4), -scores.numpy(), reg=0.2, stopThr=1e-14, numItermax=10000
    )
    ours = sinkhorn(scores, epsilon=0.2, iterations=2000).numpy()
    np.testing.assert_allclose(ours / 12, plan, atol=1e-10)


@pytest.mark.parametrize("local_views", [0, 3])
def test_swapped_prediction_and_its_gradient_equal_lightly_with_multi_crop(local_views):
    generator = torch.Generator().manual_seed(4)
    scores = [torch.randn(9, 5, generator=generator, dtype=torch.float64).clamp(-1, 1) for _ in range(2 + local_views)]
    ours, theirs = ([view.clone().requires_grad_() for view in scores] for _ in range(2))
    codes = [sinkhorn(view.detach(), epsilon=0.05, iterations=3) for view in ours[:2]]
    loss = swapped_prediction(ours, codes, temperature=0.1)
    reference = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)(theirs[:2], theirs[2:])
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference.squeeze(), rtol=0, atol=1e-10)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-10)


def test_swapped_prediction_of_a_collapsed_model_is_ln_k():
    scores = [torch.zeros(8, 16) for _ in range(3)]
    codes = [sinkhorn(view, epsilon=0.05, iterations=3) for view in scores[:2]]
    assert swapped_prediction(scores, codes, temperature=0.1).item() == pytest.approx(math.log(16), abs=1e-6)


def test_sinkhorn_survives_scores_whose_exponential_is_infinite_in_half_precision():
    codes = sinkhorn(torch.tensor([[1.0, -1.0], [0.9, 1.0]]).half(), epsilon=0.01, iterations=3)
    assert torch.isfinite(codes).all()
