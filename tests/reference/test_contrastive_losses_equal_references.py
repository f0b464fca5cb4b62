"""NT-Xent, MoCo's InfoNCE and ReLIC against loops and other people's code, forward and gradient."""

import copy
import itertools
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from pytorch_metric_learning.losses import NTXentLoss as MetricNTXentLoss
from pytorch_metric_learning.losses import SelfSupervisedLoss
from same_losses import (
    assert_same,
    assert_same_training,
    draw,
    follow_by_hand,
    in_both_precisions,
    make_batch,
    move,
    project_by_hand,
    small_encoder,
)
from scipy.stats import entropy
from torch import nn
from torch.nn import functional as F

from fedssl.contrastive import nt_xent
from fedssl.methods.moco import MoCo, info_nce
from fedssl.methods.relic import ReLIC, divergence, instance_discrimination, log_similarity
from fedssl.methods.simclr import SimCLR
from fedssl.momentum import rising_momentum
from fedssl.queues import Queue


@in_both_precisions
@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
def test_nt_xent_and_its_gradient_equal_pytorch_metric_learning(dtype, tolerance, temperature):
    reference = SelfSupervisedLoss(MetricNTXentLoss(temperature=temperature))
    views = draw(0, (6, 5), (6, 5), dtype=dtype)
    assert_same(lambda a, b: nt_xent(a, b, temperature=temperature), reference, views, tolerance)


def _google(first, second, temperature):
    """loss_a + loss_b: each view's mean of -log softmax over the other view's images and its own other images."""
    total, views = 0.0, [[row / row.norm() for row in view] for view in (first, second)]
    for own, other in (views, reversed(views)):
        for i, anchor in enumerate(own):
            rivals = [*other, *(row for k, row in enumerate(own) if k != i)]
            shares = [torch.exp(anchor @ rival / temperature) for rival in rivals]
            total = total - torch.log(shares[i] / sum(shares)) / len(own)
    return total


@in_both_precisions
def test_the_loss_of_googles_simclr_is_exactly_twice_nt_xent(dtype, tolerance):
    views = draw(1, (5, 4), (5, 4), dtype=dtype)
    assert_same(lambda a, b: 2.0 * nt_xent(a, b, temperature=0.2), lambda a, b: _google(a, b, 0.2), views, tolerance)


@in_both_precisions
def test_simclr_is_nt_xent_of_the_projections_of_its_first_two_views(dtype, tolerance):
    method, batch = SimCLR(small_encoder(), hidden=16, width=8, temperature=0.2).to(dtype), make_batch(2, dtype)
    reference = NTXentLoss(temperature=0.2)(*project_by_hand(method.encoder, method.projector, batch.views))
    assert_same_training(method, method.loss(batch).total, reference, tolerance)


def _info_nce(queries, keys, negatives, temperature=0.2):
    losses = []
    for i, query in enumerate(queries):
        others = list(negatives) or [key for j, key in enumerate(keys) if j != i]
        shares = [torch.exp(query @ key / temperature) for key in (keys[i], *others)]
        losses.append(-torch.log(shares[0] / sum(shares)))
    return sum(losses) / len(losses)


@in_both_precisions
@pytest.mark.parametrize("held", [0, 1, 12])
def test_info_nce_and_its_gradient_equal_a_loop_over_equation_1(dtype, tolerance, held):
    rows = [F.normalize(drawn, dim=1) for drawn in draw(3, (5, 4), (5, 4), (held, 4), dtype=dtype)]
    assert_same(lambda q, k, n: info_nce(q, k, n, temperature=0.2), _info_nce, rows, tolerance)


@in_both_precisions
def test_info_nce_and_its_gradient_equal_lightly_with_a_memory_bank(dtype, tolerance):
    first, second, negatives = draw(4, (5, 4), (5, 4), (12, 4), dtype=dtype)
    bank = F.normalize(negatives, dim=1)

    def lightly(queries, keys):
        loss = NTXentLoss(temperature=0.2, memory_bank_size=(12, 4))
        loss.memory_bank.bank = bank.clone()  # [negatives, width]
        return loss(queries, keys)

    def ours(queries, keys):
        return info_nce(F.normalize(queries, dim=1), F.normalize(keys, dim=1), bank, temperature=0.2)

    assert_same(ours, lightly, (first, second), tolerance)


@in_both_precisions
@pytest.mark.parametrize("queue_length", [0, 3, 6, 40])
def test_moco_begins_anew_follows_compares_then_queues_as_written_out(dtype, tolerance, queue_length):
    sizes = {"hidden": 16, "width": 8, "queue_length": queue_length}
    method = MoCo(small_encoder(), temperature=0.2, momentum=0.9, **sizes).to(dtype)
    move(method.target, seed=5)  # what an earlier round left
    method.queue.add(torch.ones(2, 8, dtype=dtype))
    method.begin_round()
    online = nn.Sequential(method.encoder, method.projector)
    slow, memory = copy.deepcopy(online), deque(maxlen=queue_length)
    for step in range(4):
        method.begin_step(step / 4)
        follow_by_hand(slow, online, 0.9)
        batch = make_batch(step, dtype)
        queries = F.normalize(online(batch.views[0]), dim=1)
        keys = F.normalize(slow(batch.views[1]), dim=1).detach()
        reference = _info_nce(queries, keys, memory)
        memory.extend(keys)
        for weight, gradient in assert_same_training(method, method.loss(batch).total, reference, tolerance):
            weight.data -= 0.5 * gradient
    held = sorted(method.queue.held().tolist())
    np.testing.assert_allclose(held, sorted(row.tolist() for row in memory), rtol=0, atol=tolerance)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 7), st.lists(st.none() | st.integers(0, 9), max_size=12))
def test_a_queue_holds_what_a_deque_holds(length, additions):
    queue, memory, counter = Queue(length, 1), deque(maxlen=length), itertools.count()
    for rows in additions:
        if rows is None:
            queue.clear()
            memory.clear()
            continue
        numbers = [float(next(counter)) for _ in range(rows)]
        queue.add(torch.tensor(numbers).reshape(rows, 1))
        memory.extend(numbers)
        assert sorted(queue.held()[:, 0].tolist()) == list(memory)


@in_both_precisions
def test_instance_discrimination_of_relic_is_info_nce_in_both_directions(dtype, tolerance):
    def ours(first, second, slow_first, slow_second):
        forward = log_similarity(first, slow_second, temperature=0.2)
        return instance_discrimination(forward, log_similarity(second, slow_first, temperature=0.2))

    def reference(*views):
        first, second, slow_first, slow_second = (F.normalize(view, dim=1) for view in views)
        return (_info_nce(first, slow_second, []) + _info_nce(second, slow_first, [])) / 2

    assert_same(ours, reference, draw(10, *[(5, 4)] * 4, dtype=dtype), tolerance)


@in_both_precisions
@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_of_relic_and_its_gradient_through_p_alone_equal_pytorch_and_scipy(dtype, tolerance, seed):
    log_p, log_q = (F.log_softmax(drawn, dim=1) for drawn in draw(seed, (5, 5), (5, 5), dtype=dtype))

    def pytorch(p, q):  # KL(target || input): the other way round
        return F.kl_div(q.detach(), p, log_target=True, reduction="batchmean")

    assert_same(divergence, pytorch, (log_p, log_q), tolerance)
    scipy = np.mean(entropy(log_p.double().exp().numpy(), log_q.double().exp().numpy(), axis=1))
    assert divergence(log_p, log_q).item() == pytest.approx(scipy, abs=tolerance)
    assert divergence(log_p, log_q) > 0


def test_views_that_agree_have_no_divergence_and_nothing_to_learn_from_it():
    online, target = (drawn.requires_grad_() for drawn in draw(11, (5, 4), (5, 4)))
    log_p = log_similarity(online, target, temperature=0.2)
    cost = divergence(log_p, log_p.clone())
    assert cost.item() == 0.0
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(cost, [online, target])) < 1e-12


@in_both_precisions
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_relic_equals_its_formula_written_out(dtype, tolerance, alpha):
    sizes = {"hidden": 16, "width": 8}
    method = ReLIC(small_encoder(), temperature=0.2, invariance_weight=alpha, momentum=0.9, **sizes).to(dtype)
    batch = make_batch(12, dtype)
    slow, online = copy.deepcopy(method.target), nn.Sequential(method.encoder, method.projector)
    move(online, seed=13)
    follow_by_hand(slow, online, rising_momentum(0.9, 0.25))
    method.begin_step(0.25)
    torch.testing.assert_close(list(method.target.parameters()), list(slow.parameters()), rtol=0, atol=tolerance)
    head = nn.Sequential(method.projector, method.predictor)
    predicted = [F.normalize(rows, dim=1) for rows in project_by_hand(method.encoder, head, batch.views)]
    targets = [F.normalize(rows, dim=1).detach() for rows in project_by_hand(*method.target, batch.views)]
    shares = []  # p_i(j) in both directions
    for rows, columns in zip(predicted, reversed(targets), strict=True):
        similarity = torch.exp(rows @ columns.T / 0.2)
        shares.append(similarity / similarity.sum(1, keepdim=True))
    total = 0.0
    for p, q in (shares, reversed(shares)):
        for i in range(4):
            fixed = q[i].detach()
            distance = sum(p[i, j] * (torch.log(p[i, j]) - torch.log(fixed[j])) for j in range(4))
            total = total + (alpha * distance - torch.log(p[i, i])) / (4 * 2)
    assert_same_training(method, method.loss(batch).total, total, tolerance)
    method.begin_round()
    torch.testing.assert_close(list(method.target.parameters()), list(online.parameters()), rtol=0, atol=0)
