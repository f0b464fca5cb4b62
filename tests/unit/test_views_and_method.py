"""Views, encoders, the default method, and what of it may leave a site."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedssl import augment
from fedssl.augment import Views
from fedssl.collapse import diagnose, rank_me
from fedssl.data.batches import ImageBatch
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError, UpdateRefused
from fedssl.methods.contrastive_clustering import ContrastiveClustering
from fedssl.optim import adamw, load_optimizer_tensors, optimizer_tensors
from fedssl.update import Update, check_update, load_shared_state, shared_state


def _method(prototypes=8, **changed):
    encoder = build_encoder("test_resnet", norm_groups=16, seed=0)
    settings = {
        "hidden": 16, "width": 8, "contrastive_temperature": 0.2, "clustering_temperature": 0.1,
        "epsilon": 0.05, "iterations": 3,
    }  # fmt: skip
    return ContrastiveClustering(encoder, num_prototypes=prototypes, **(settings | changed))


def _views(**changed):
    plain = {
        "global_count": 2, "global_edge": 32, "global_area": (0.3, 1.0), "local_count": 1, "local_edge": 16,
        "local_area": (0.1, 0.3),
        "rotation": 15.0, "flip": True, "gamma": 0.4, "contrast": 0.4, "brightness": 0.1, "noise": 0.05,
    }  # fmt: skip
    return Views(**(plain | changed))


def _batch(images, low=0.0, high=1.0, hounsfield=None):
    limits = [torch.full((len(images), 1, 1, 1), value) for value in (low, high)]
    return ImageBatch(images, *limits, hounsfield)


def _images(batch=4, edge=40, seed=0):
    return torch.rand(batch, 1, edge, edge, generator=torch.Generator().manual_seed(seed))


def test_a_crop_of_the_whole_image_without_rotation_or_flip_is_the_image():
    images = F.interpolate(_images(edge=8), size=32, mode="bilinear")
    whole = augment.random_crops(images, torch.Generator(), edge=32, area=(1.0, 1.0), rotation=0.0, flip=False)
    inner = (
        slice(None),
        slice(None),
        slice(8, 24),
        slice(8, 24),
    )  # the aspect ratio squeezes one side by up to a tenth
    same = torch.corrcoef(torch.stack([whole[inner].flatten(), images[inner].flatten()]))[0, 1]
    other = torch.corrcoef(torch.stack([whole[inner].flatten(), images.flip(0)[inner].flatten()]))[0, 1]
    assert same > 0.7
    assert abs(other) < 0.3


def test_a_crop_shows_the_part_of_the_image_that_its_place_says():
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64).contiguous()
    crops = augment.random_crops(
        ramp, torch.Generator().manual_seed(0), edge=16, area=(0.1, 0.1), rotation=0.0, flip=False
    )
    assert (crops.diff(dim=3) >= -1e-6).all()
    assert crops.min() >= 0
    span = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    expected = math.sqrt(0.1) * torch.tensor([math.sqrt(3 / 4), math.sqrt(4 / 3)]) * 15 / 16
    assert span.min() > expected[0] - 0.03
    assert span.max() < expected[1] + 0.03


def test_a_flip_mirrors_half_of_the_images():
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 32, 32).contiguous()
    crops = augment.random_crops(
        ramp, torch.Generator().manual_seed(1), edge=8, area=(0.5, 0.5), rotation=0.0, flip=True
    )
    mirrored = (crops.diff(dim=3).mean((1, 2, 3)) < 0).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, g: augment.gamma(x, g, strength=0.0),
        lambda x, g: augment.linear_intensity(x, g, contrast=0.0, brightness=0.0),
        lambda x, g: augment.noise(x, g, sigma=0.0),
    ],
)
def test_an_intensity_change_of_strength_zero_is_the_identity(change):
    images = _images().clamp(1e-4, 1)
    torch.testing.assert_close(change(images, torch.Generator()), images, rtol=0, atol=1e-6)


def test_ct_is_shown_through_its_own_window_when_no_other_is_drawn():
    units = torch.linspace(-1024, 1024, 64).expand(4, 1, 64, 64)
    batch = _batch((units + 1024) / 4096, low=(-160 + 1024) / 4096, high=(240 + 1024) / 4096, hounsfield=_all_ct(4))
    shown = augment.clinical_window(batch, torch.Generator().manual_seed(0), probability=0.0)
    torch.testing.assert_close(shown, ((units + 160) / 400).clamp(0, 1), atol=1e-4, rtol=0)


def test_a_drawn_window_is_one_of_the_clinical_ones_and_leaves_other_images_alone():
    units = torch.linspace(-1024, 3071, 256).reshape(1, 1, 16, 16).expand(64, 1, 16, 16)
    is_ct = torch.arange(64)[:, None, None, None] % 2 == 0
    values = torch.where(is_ct, (units + 1024) / 4096, torch.rand(64, 1, 16, 16))
    shown = augment.clinical_window(_batch(values, hounsfield=is_ct), torch.Generator().manual_seed(0), probability=1.0)
    torch.testing.assert_close(shown[1::2], values[1::2])
    expected = torch.stack([((units[0] - (c - w / 2)) / w).clamp(0, 1) for c, w in augment.CT_WINDOWS])
    distance = (shown[::2, None] - expected[None]).abs().amax((2, 3, 4))
    assert (distance.min(1).values < 1e-3).all()
    assert len(set(distance.argmin(1).tolist())) == len(augment.CT_WINDOWS)


def _all_ct(count):
    return torch.ones(count, 1, 1, 1, dtype=torch.bool)


def test_a_constant_image_stays_finite_through_all_views():
    for value in (0.0, 0.5, 1.0):
        for view in _views()(_batch(torch.full((3, 1, 40, 40), value)), torch.Generator().manual_seed(0)):
            assert torch.isfinite(view).all()


def test_views_are_equal_for_a_seed_and_have_the_sizes_asked_for():
    first, second = (_views()(_batch(_images()), torch.Generator().manual_seed(7)) for _ in range(2))
    assert [view.shape[-1] for view in first] == [32, 32, 16]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_views_of_an_image_do_not_depend_on_its_neighbours_in_the_batch():
    images = _images()
    changed = images.clone()
    changed[1:] = 0
    first, second = (_views()(_batch(batch), torch.Generator().manual_seed(7)) for batch in (images, changed))
    torch.testing.assert_close(first[0][0], second[0][0])


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
    views = _views()(_batch(_images(8)), torch.Generator().manual_seed(0))
    loss = _method(contrastive_weight=0.5, clustering_weight=2.0).loss(views)
    expected = 0.5 * loss.terms["contrastive"] + 2.0 * loss.terms["clustering"]
    torch.testing.assert_close(loss.total.detach(), expected)
    assert loss.mass.sum().item() == pytest.approx(8, abs=1e-4)
    assert loss.usage.sum().item() == 8


def test_prototypes_have_length_one_after_every_step():
    method = _method()
    optimizer = adamw(method, lr=0.1, weight_decay=0.1)
    method.loss(_views()(_batch(_images(8)), torch.Generator().manual_seed(0))).total.backward()
    optimizer.step()
    assert not torch.allclose(method.prototypes.norm(dim=1), torch.ones(8), atol=1e-4)
    method.after_step()
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(8))


def test_an_optimiser_goes_on_from_its_saved_tensors_as_if_never_stopped():
    def steps(method, optimizer, count, start):
        for step in range(start, start + count):
            optimizer.zero_grad()
            method.loss(_views()(_batch(_images(8, seed=step)), torch.Generator().manual_seed(step))).total.backward()
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


def test_rank_me_is_the_number_of_equal_directions():
    basis = torch.cat([torch.eye(6, 20), -torch.eye(6, 20)]).repeat(30, 1)
    assert rank_me(basis) == pytest.approx(6, rel=1e-2)
    line = torch.linspace(-1, 1, 50)[:, None] @ torch.ones(1, 20)
    assert rank_me(line + 100.0) == pytest.approx(1, rel=1e-2)


def test_each_sign_of_collapse_is_named_and_a_healthy_run_has_none():
    healthy = {"clustering": 2.0, "effective_prototypes": 40.0, "rankme": 30.0}
    facts = {"num_prototypes": 64, "width": 96, "samples": 512}
    assert diagnose(healthy, **facts) == []
    assert "ln K" in diagnose(healthy | {"clustering": math.log(64)}, **facts)[0]
    assert "prototypes are in use" in diagnose(healthy | {"effective_prototypes": 1.2}, **facts)[0]
    assert "RankMe" in diagnose(healthy | {"rankme": 1.0}, **facts)[0]


def _update(**changed):
    state = {"w": torch.zeros(2), "prototypes": torch.eye(3)}
    plain = {
        "site": "A",
        "state": state,
        "examples": 5,
        "mass": torch.ones(3),
        "usage": torch.ones(3),
        "metrics": {"loss": 1.0, "images": 4.0},
    }
    return Update(**(plain | changed))


_REFERENCE = {"w": torch.zeros(2), "prototypes": torch.eye(3)}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"state": {"w": torch.zeros(2)}}, "prototypes is missing"),
        ({"state": _REFERENCE | {"queue": torch.zeros(1)}}, "queue is not part"),
        ({"state": _REFERENCE | {"w": torch.zeros(3)}}, r"float32\[3\] where float32\[2\]"),
        ({"state": _REFERENCE | {"w": torch.zeros(2).double()}}, "float64"),
        ({"state": _REFERENCE | {"w": torch.tensor([0.0, float("nan")])}}, "w is not finite"),
        ({"mass": None}, "mass is missing"),
        ({"usage": -torch.ones(3)}, "negative"),
        ({"examples": 0}, "0 images"),
        ({"metrics": {"loss": float("inf"), "images": 1.0}}, "not finite"),
        ({"metrics": {"images": 1.0}}, "lack loss"),
    ],
)
def test_an_update_that_cannot_be_averaged_is_refused_and_the_site_named(changed, reason):
    with pytest.raises(UpdateRefused, match=reason) as refused:
        check_update(_update(**changed), _REFERENCE)
    assert refused.value.site == "A"


def test_a_good_update_passes():
    check_update(_update(), _REFERENCE)


def test_mixed_precision_gives_finite_losses_on_the_cpu():
    method = _method()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(_views()(_batch(_images(8)), torch.Generator().manual_seed(0)))
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())
    assert np.isfinite(loss.total.item())
