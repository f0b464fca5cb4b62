"""SwAV and clustering of several modalities against lightly, POT, scikit-learn and loops."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import same_losses as shared
import torch
from lightly.loss import NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from fedssl.clustering import Equipartition, Memory, cluster_information
from fedssl.data.modality import CT, MODALITIES, MR, ULTRASOUND
from fedssl.methods.contrastive_clustering import ContrastiveClustering
from fedssl.methods.swav import SwAV
from fedssl.prototypes import counts_by_group, observe, swapped_prediction

BLOCKS = {CT: [0, 1, 2], MR: [3, 4], ULTRASOUND: [5, 6]}  # of seven prototypes; the other modalities own none


def _points(method, views):
    return [nn.functional.normalize(rows) for rows in shared.project_by_hand(method.encoder, method.projector, views)]


def _scores(seed, *rows, dtype=torch.float64):
    return [drawn.clamp(-1, 1) for drawn in shared.draw(seed, *((count, 7) for count in rows), dtype=dtype)]


def _codes(scores, modality, blocks=None):
    """lightly's Sinkhorn on the rows of each modality, over its block of prototypes or over all."""
    codes = torch.zeros_like(scores)
    for group in range(len(MODALITIES)):
        rows = [number for number, own in enumerate(modality.tolist()) if own == group]
        columns = list(range(7)) if blocks is None else blocks.get(group, [])
        if len(rows) > 1 and columns:
            part = lightly_sinkhorn(scores[rows][:, columns], iterations=3, epsilon=0.05)
            codes[np.ix_(rows, columns)] = part
    return codes


def _equipartition(modalities, **changed):
    return Equipartition(**({"epsilon": 0.05, "iterations": 3, "modalities": modalities} | changed))


def _clustered(equipartition, views, modality, memory=()):
    """Loss, mass and usage of one batch, as the methods put them together."""
    codes, allowed = equipartition(views[:2], modality, memory)
    seen = observe(views[:2], codes, temperature=0.1, allowed=allowed)
    count = views[0].shape[1]
    return SimpleNamespace(
        loss=swapped_prediction(views, codes, temperature=0.1, allowed=allowed),
        mass=seen.mass,
        usage=counts_by_group(seen.nearest, modality, num_groups=len(MODALITIES), num_prototypes=count),
    )


@shared.in_both_precisions
@pytest.mark.parametrize("held", [0, 15])
def test_pooled_clustering_and_its_gradient_equal_lightly_with_and_without_a_queue(dtype, tolerance, held):
    modality, queues = shared.make_batch(9, dtype, batch=12).modality, _scores(9, held, held, dtype=dtype)
    memory = [Memory(rows, torch.full((held,), MR)) for rows in queues]
    shared.assert_same(
        lambda *views: _clustered(_equipartition("pooled"), views, modality, memory if held else ()).loss,
        lambda *views: SwaVLoss()(views[:2], views[2:], queues if held else None).squeeze(),
        _scores(10, 12, 12, 12, dtype=dtype),
        tolerance,
    )


def _swav(dtype, **changed):
    sizes = {"num_prototypes": 7, "hidden": 16, "width": 8}
    return SwAV(shared.small_encoder(), temperature=0.1, epsilon=0.05, iterations=3, **(sizes | changed)).to(dtype)


@shared.in_both_precisions
@pytest.mark.parametrize("queue_length", [0, 6])
def test_swav_equals_lightly_while_its_queue_fills_and_after_a_round_begins(dtype, tolerance, queue_length):
    method = _swav(dtype, queue_length=queue_length)
    for step in range(6):
        if step % 3 == 0:
            method.begin_round()
            memory = [deque(maxlen=queue_length) for _ in range(2)]
        batch = shared.make_batch(step, dtype, local_views=1)
        points = _points(method, batch.views)
        scores = [rows @ method.prototypes.T for rows in points]
        queues = [torch.stack(list(rows)) @ method.prototypes.T for rows in memory] if memory[0] else None
        reference = SwaVLoss()(scores[:2], scores[2:], queues).squeeze()  # tau .1, epsilon .05, 3 iterations
        shared.assert_same_training(method, method.loss(batch).total, reference, tolerance)
        for rows, new in zip(memory, points[:2], strict=True):
            rows.extend(new.detach())


@shared.in_both_precisions
def test_swav_remembers_the_modality_of_what_it_queues(dtype, tolerance):
    method = _swav(dtype, queue_length=20, modalities="per-modality")
    earlier, batch = (shared.make_batch(seed, dtype, batch=8) for seed in (5, 6))
    method.loss(earlier)
    held, scores = ([rows @ method.prototypes.T for rows in _points(method, part.views)] for part in (earlier, batch))
    total = 0.0
    for a in range(2):
        modality = torch.cat([batch.modality[a], earlier.modality[a]])
        codes = _codes(torch.cat([scores[a], held[a]]).detach(), modality)[:8]
        total = total + SwaVLoss().subloss(scores[1 - a], codes) / 2
    shared.assert_same_training(method, method.loss(batch).total, total, tolerance)


def test_frozen_prototypes_take_no_gradient_and_change_nothing_else():
    method, batch = _swav(torch.float64, frozen=0.5), shared.make_batch(7, torch.float64)
    gradients = []
    for progress in (0.49, 0.5):
        method.begin_step(progress)
        method.zero_grad()
        method.loss(batch).total.backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    frozen, free = gradients
    assert free.pop("prototypes").abs().max() > 0
    torch.testing.assert_close(frozen, free, rtol=0, atol=1e-12)


@shared.in_both_precisions
@pytest.mark.parametrize(("modalities", "blocks"), [("per-modality", None), ("partitioned", BLOCKS)])
def test_codes_of_each_modality_equal_lightly_with_and_without_a_queue(dtype, tolerance, modalities, blocks):
    (scores, held), modality = _scores(8, 20, 9, dtype=dtype), shared.make_batch(8, dtype, batch=29).modality[0]
    clustering = _equipartition(modalities, blocks=("ct", "mr", "ultrasound"))
    alone, queued = (clustering.codes(scores, modality[:20], m) for m in (None, Memory(held, modality[20:])))
    torch.testing.assert_close(alone, _codes(scores, modality[:20], blocks), rtol=0, atol=tolerance)
    torch.testing.assert_close(queued, _codes(torch.cat([scores, held]), modality, blocks)[:20], rtol=0, atol=tolerance)


@pytest.mark.parametrize("modalities", ["per-modality", "partitioned"])
def test_with_one_modality_every_form_is_the_pooled_one(modalities):
    scores, modality = _scores(9, 8, 8, 8), torch.full((2, 8), MR)
    ours, pooled = (
        _clustered(_equipartition(form, blocks=("mr",)), scores, modality) for form in (modalities, "pooled")
    )
    torch.testing.assert_close(vars(ours), vars(pooled), rtol=0, atol=1e-12)  # loss, mass and usage


def _partitioned(scores, modality):
    """Loss, mass and usage, image by image."""
    loss, mass, usage = 0.0, torch.zeros(7).double(), torch.zeros(len(MODALITIES), 7)
    for a in range(2):
        codes = _codes(scores[a].detach(), modality[a], BLOCKS)
        for image, group in enumerate(modality[a].tolist()):
            block = BLOCKS.get(group, [])
            for v, view in enumerate(scores if block else ()):
                shares = torch.exp(view[image, block] / 0.1) / torch.exp(view[image, block] / 0.1).sum()
                if v == a:
                    mass[block] += shares.detach() / 2
                    usage[group, block[int(shares.argmax())]] += 0.5
                else:
                    loss = loss - (codes[image, block] * torch.log(shares)).sum() / (2 * (len(scores) - 1) * len(view))
    return loss, mass, usage


@shared.in_both_precisions
def test_partitioned_clustering_and_its_gradient_equal_a_loop_over_images(dtype, tolerance):
    scores, modality = _scores(10, 12, 12, 12, dtype=dtype), shared.make_batch(10, dtype, batch=12).modality
    equipartition = _equipartition("partitioned", blocks=("ct", "mr", "ultrasound"))
    functions = (
        lambda *views: _clustered(equipartition, views, modality).loss,
        lambda *views: _partitioned(views, modality)[0],
    )
    shared.assert_same(*functions, scores, tolerance)
    ours, (_, mass, usage) = _clustered(equipartition, scores, modality), _partitioned(scores, modality)
    torch.testing.assert_close(ours.mass.double(), mass, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.usage, usage, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_codes_of_each_modality_at_convergence_are_the_optimal_transport_plan_of_pot(seed):
    modality, (scores,) = shared.make_batch(seed, torch.float64, batch=25).modality[0], _scores(seed, 25)
    ours = _equipartition("per-modality", epsilon=0.2, iterations=3000).codes(scores, modality).numpy()
    for group in modality.unique():
        rows = (modality == group).numpy()
        if rows.sum() == 1:  # alone: no code
            continue
        plan = ot.sinkhorn([], [], -scores.numpy()[rows], reg=0.2, stopThr=1e-14, numItermax=20000)  # uniform marginals
        np.testing.assert_allclose(ours[rows] / rows.sum(), plan, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_cluster_information_is_the_normalised_mutual_information_of_scikit_learn(seed):
    counts = np.random.default_rng(seed).integers(0, 6, (5, 9)) * (np.arange(5)[:, None] != seed)
    modality, cluster = (np.repeat(numbers.ravel(), counts.ravel()) for numbers in np.indices(counts.shape))
    expected = normalized_mutual_info_score(modality, cluster, average_method="min")
    assert cluster_information(torch.tensor(counts).float()) == pytest.approx(expected, abs=1e-10)


def test_images_of_one_modality_have_no_modality_to_tell():
    assert cluster_information(torch.ones(1, 6)) is None


@shared.in_both_precisions
def test_the_default_method_is_nt_xent_of_the_pair_plus_swapped_prediction_of_all_views(dtype, tolerance):
    method = ContrastiveClustering(
        shared.small_encoder(), num_prototypes=7, hidden=16, width=8, contrastive_temperature=0.2,
        clustering_temperature=0.1, epsilon=0.05, iterations=3, contrastive_weight=0.7, clustering_weight=1.3,
    ).to(dtype)  # fmt: skip
    batch = shared.make_batch(11, dtype, local_views=2)
    points = _points(method, batch.views)
    scores = [rows @ method.prototypes.T for rows in points]
    reference = 0.7 * NTXentLoss(temperature=0.2)(*points[:2]) + 1.3 * SwaVLoss()(scores[:2], scores[2:]).squeeze()
    shared.assert_same_training(method, method.loss(batch).total, reference, tolerance)
