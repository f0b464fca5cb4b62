"""Encoders, the default method, and what of it may leave a site."""

import math

import numpy as np
import pytest
import torch

from fedssl.data.batches import ViewBatch
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError
from fedssl.methods.contrastive_clustering import ContrastiveClustering
from fedssl.optim import adamw, load_optimizer_tensors, optimizer_tensors
from fedssl.update import load_shared_state, shared_state


def _method(prototypes=8, **changed):
    encoder = build_encoder("test_resnet", norm_groups=16, seed=0)
    settings = {
        "hidden": 16, "width": 8, "contrastive_temperature": 0.2, "clustering_temperature": 0.1,
        "epsilon": 0.05, "iterations": 3,
    }  # fmt: skip
    return ContrastiveClustering(encoder, num_prototypes=prototypes, **(settings | changed))


def _batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(count, 1, edge, edge, generator=generator) for edge in (32, 32, 24)]
    nothing = torch.zeros(2, count, dtype=torch.long)
    return ViewBatch(views, nothing, nothing[0] - 1)


def test_an_unknown_encoder_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean resnet18"):
        build_encoder("resnet_18")


def test_an_encoder_with_running_statistics_is_refused_because_they_never_leave_a_site():
    with pytest.raises(ConfigError, match="BatchNorm running statistics"):
        build_encoder("test_resnet", norm="model")


def test_groups_that_do_not_divide_the_widths_are_explained():
    with pytest.raises(ConfigError, match="norm_groups=7"):
        build_encoder("test_resnet", norm_groups=7)


def test_all_sites_start_from_equal_weights_and_the_callers_random_state_is_untouched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = shared_state(_method())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = shared_state(_method())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shared_state_is_encoder_projector_and_prototypes_without_any_buffer():
    method = _method()
    method.register_buffer("queue", torch.zeros(3))
    method.momentum = torch.nn.Linear(2, 2)
    state = shared_state(method)
    assert {name.split(".")[0] for name in state} == {"encoder", "projector", "prototypes"}
    assert not any("running" in name or "num_batches" in name for name in state)
    assert not [name for name, _ in method.named_buffers() if name != "queue"]


def test_shared_state_round_trips():
    source, target = _method(), _method(seed=5)
    load_shared_state(target, shared_state(source))
    images = torch.rand(4, 1, 32, 32)
    source.eval(), target.eval()
    assert torch.equal(source.encoder(images), target.encoder(images))
    assert torch.equal(source.prototypes, target.prototypes)


def test_the_loss_is_the_weighted_sum_of_its_named_terms():
    loss = _method(contrastive_weight=0.5, clustering_weight=2.0).loss(_batch(8))
    expected = 0.5 * loss.terms["contrastive"] + 2.0 * loss.terms["clustering"]
    torch.testing.assert_close(loss.total.detach(), expected)
    assert loss.clusters.mass.sum().item() == pytest.approx(8, abs=1e-4)
    assert loss.clusters.nearest.shape == (2, 8)
    assert 0.0 <= loss.clusters.code_entropy.item() <= math.log(8)


def test_prototypes_have_length_one_after_every_step():
    method = _method()
    optimizer = adamw(method, lr=0.1, weight_decay=0.1)
    method.loss(_batch(8)).total.backward()
    optimizer.step()
    assert not torch.allclose(method.prototypes.norm(dim=1), torch.ones(8), atol=1e-4)
    method.after_step()
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(8))


def test_an_optimiser_goes_on_from_its_saved_tensors_as_if_never_stopped():
    def steps(method, optimizer, count, start):
        for step in range(start, start + count):
            optimizer.zero_grad()
            method.loss(_batch(8, seed=step)).total.backward()
            optimizer.step()

    whole = _method()
    steps(whole, adamw(whole, lr=1e-3, weight_decay=0.1), 4, 0)
    first = _method()
    optimizer = adamw(first, lr=1e-3, weight_decay=0.1)
    steps(first, optimizer, 2, 0)
    second = _method(seed=9)
    load_shared_state(second, shared_state(first))
    resumed = adamw(second, lr=1e-3, weight_decay=0.1)
    load_optimizer_tensors(resumed, optimizer_tensors(optimizer))
    steps(second, resumed, 2, 2)
    for name, value in shared_state(whole).items():
        assert torch.equal(value, shared_state(second)[name]), name


def test_mixed_precision_gives_finite_losses_on_the_cpu():
    method = _method()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(_batch(8))
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())
    assert np.isfinite(loss.total.item())
