"""Test 1 of the design: what one patient changes is bounded, whatever the patient is; couplings are found."""

import math

import pytest
import torch
from private_parts import alone, byol, clustering, gradient_of, patients
from torch.nn import functional as F

from fedssl.config import load
from fedssl.contrastive import nt_xent
from fedssl.errors import ConfigError
from fedssl.methods.base import projector
from fedssl.methods.separable import SeparableMethod, require_separable
from fedssl.methods.simclr import SimCLR
from fedssl.privacy.engines import loop
from fedssl.privacy.engines.ghost import Ghost
from fedssl.privacy.engines.loop import Loop
from fedssl.privacy.engines.vectorised import Vectorised
from fedssl.privacy.mechanism import gradient_norm
from fedssl.prototypes import sinkhorn, swapped_prediction

CLIP = 0.3
STRANGE = {
    "huge": lambda unit: [view * 1e6 for view in unit],
    "overflowing": lambda unit: [view * 1e30 for view in unit],
    "zero": lambda unit: [view * 0.0 for view in unit],
    "not a number": lambda unit: [view * torch.nan for view in unit],
    "many images": lambda unit: [view.repeat(40, 1, 1, 1) for view in unit],
}


def flat(parts):
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("engine", [Loop, Vectorised, Ghost])
@pytest.mark.parametrize("strange", STRANGE)
def test_a_patient_who_is_anything_moves_the_sums_by_no_more_than_the_bounds(engine, strange):
    method = clustering()
    others = patients([1, 2, 1])
    without_votes, without = gradient_of(engine, method, others, CLIP)
    units = [*others, STRANGE[strange](patients([1], seed=9)[0])]
    votes, found = gradient_of(engine, method, units, CLIP)
    assert (flat(found.total) - flat(without.total)).norm() <= CLIP * (1 + 1e-4)
    assert (votes - without_votes).norm() <= method.vote_bound * (1 + 1e-5)
    assert torch.isfinite(flat(found.total)).all()
    assert torch.isfinite(votes).all()


@pytest.mark.parametrize("make", [clustering, byol])
@pytest.mark.parametrize("strange", STRANGE)
def test_the_gradients_of_the_others_stay_the_same_to_the_bit(make, strange, monkeypatch):
    method, units, seen = make(), patients([1, 2, 3]), []
    monkeypatch.setattr(loop, "gradient_norm", lambda parts: seen.append(flat(parts)) or gradient_norm(parts))
    gradient_of(Loop, method, units, CLIP)
    gradient_of(Loop, method, [units[0], STRANGE[strange](units[1]), units[2]], CLIP)
    gradient_of(Loop, method, [units[0], units[2]], CLIP)
    (first, _, third), (first_again, _, third_again), (first_without, third_without) = seen[:3], seen[3:6], seen[6:]
    assert torch.equal(first, first_again)
    assert torch.equal(third, third_again)
    assert torch.equal(first, first_without)
    assert torch.equal(third, third_without)


def test_a_patient_alone_never_exceeds_the_clip_and_a_small_gradient_is_left_as_it_is():
    method = clustering()
    unit = patients([2])[0]
    assert alone(method, unit, 1e-3).norm() == pytest.approx(1e-3, rel=1e-4)
    assert alone(method, unit, 1e-3).norm() <= 1e-3 * (1 + 1e-6)
    free = alone(method, unit, 1e9)
    assert torch.equal(alone(method, unit, 2e9), free)


def test_views_and_images_of_a_patient_are_clipped_as_one():
    """Clipped row by row, a patient with many images would move the sum by more than the clip."""
    method = clustering()
    unit = [view.repeat(20, 1, 1, 1) for view in patients([1])[0]]
    rows = [alone(method, [view[row : row + 1] for view in unit], CLIP) for row in range(20)]
    assert torch.stack(rows).sum(0).norm() > 10 * CLIP  # the broken variant
    assert alone(method, unit, CLIP).norm() <= CLIP * (1 + 1e-6)


@pytest.mark.parametrize("prototypes", [2, 8, 32])
def test_a_vote_is_bounded_even_where_every_view_has_one_prototype(prototypes):
    method = clustering(prototypes)
    method.epsilon = 1e-4
    points = [F.normalize(torch.randn(1, 16), dim=1)] * 2
    vote = method.vote(points, torch.ones(1, dtype=torch.bool))
    assert vote[:prototypes].norm() == pytest.approx(math.sqrt(1 - 1 / prototypes), rel=1e-3)
    assert vote.norm() <= method.vote_bound * (1 + 1e-6)


# ---------------------------------------------------------------- negative controls: these couple, and must be seen to


def sensitivity(gradients_of, units, changed, clip):
    """How far the sum of the clipped gradients moves when unit 0 is taken out."""
    whole = sum(clipped(part, clip) for part in gradients_of(units))
    rest = sum(clipped(part, clip) for part in gradients_of(changed))
    return float((whole - rest).norm()) / clip


def clipped(gradient, clip):
    return gradient * min(1.0, clip / float(gradient.norm()))


def rows_of_a_coupled_loss(loss_of, network):
    """Per-unit gradients of a loss of the whole batch, as per-sample engines see them: through each unit's rows."""

    def gradients(units):
        points = [[network(view.flatten(1)) for view in unit] for unit in units]
        total = loss_of([torch.cat([unit[view] for unit in points]) for view in (0, 1)])
        tops = torch.autograd.grad(total, [point for unit in points for point in unit], retain_graph=True)
        found = []
        for number, unit in enumerate(points):
            parts = torch.autograd.grad(
                unit, list(network.parameters()), tops[2 * number : 2 * number + 2], retain_graph=True
            )
            found.append(torch.cat([part.flatten() for part in parts]))
        return found

    return gradients


def near_duplicates(count):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 1, 8, 8, generator=generator)
    outlier = torch.randn(1, 1, 8, 8, generator=generator)
    units = [[base + 0.05 * torch.randn(1, 1, 8, 8, generator=generator) for _ in range(2)] for _ in range(count)]
    return [[outlier, outlier.clone()], *units]


CONTROLS = {
    "NT-Xent": lambda points: 16 * nt_xent(*(F.normalize(point, dim=1) for point in points), temperature=0.1),
    "in-batch Sinkhorn": lambda points: _sinkhorn_loss(points),
}


def _sinkhorn_loss(points):
    centres = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    scores = [F.normalize(point, dim=1) @ centres.T for point in points]
    codes = [sinkhorn(view.detach(), epsilon=0.05, iterations=3) for view in scores]
    return len(points[0]) * swapped_prediction(scores, codes, temperature=0.1)


def _network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))


@pytest.mark.parametrize("control", CONTROLS)
def test_coupled_losses_move_by_more_than_the_clip_and_change_the_others(control):
    units = near_duplicates(15)
    gradients = rows_of_a_coupled_loss(CONTROLS[control], _network())
    before, after = gradients(units)[1:], gradients(units[1:])
    assert any(not torch.allclose(old, new, rtol=1e-3) for old, new in zip(before, after, strict=True))
    assert sensitivity(gradients, units, units[1:], clip=1e-3) > 1.05


def test_batch_norm_without_parameters_couples_too():
    """Even where codes are given and the loss is a sum: each row is normalised by the others."""
    rows = torch.cat([unit[0] for unit in near_duplicates(15)]).flatten(1)
    network, norm = _network(), torch.nn.BatchNorm1d(16, affine=False, track_running_stats=False)

    def gradients(images, layer):
        before = network[0](images)
        predicted = F.log_softmax(network[2](network[1](layer(before))), dim=1)
        (tops,) = torch.autograd.grad(-predicted[:, 0].sum(), before)
        return torch.einsum("bo,bi->boi", tops, images).flatten(1)

    assert torch.allclose(gradients(rows, torch.nn.Identity())[1:], gradients(rows[1:], torch.nn.Identity()))
    assert not torch.allclose(gradients(rows, norm)[1:], gradients(rows[1:], norm), rtol=0.1)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["contrastive_clustering", "simclr", "swav", "moco", "barlow", "relic", "hybrid"])
def test_a_method_that_couples_is_refused_with_reason_and_alternatives(name):
    from fedssl.build import check_settings
    from fedssl.build_privacy import check_privacy

    extra = ["method.classes=[a, b]"] if name == "hybrid" else []
    config = load(["data.root=.", "encoder=tiny", "privacy=patient", f"method={name}", *extra])
    with pytest.raises(ConfigError, match=r"private_clustering.*byol") as refusal:
        check_privacy(config, check_settings(config))
    assert "not written as a sum" not in str(refusal.value)


def test_a_new_method_is_refused_until_it_says_how_it_is_a_sum():
    class New(SimCLR):
        couples = SimCLR.__mro__[1].couples

    method = New(clustering().encoder, hidden=8, width=8, temperature=0.2)
    with pytest.raises(ConfigError, match="not written as a sum over patients"):
        require_separable(method, in_chans=1, edge=32)


def test_byol_with_batch_norm_is_refused_by_class_and_told_how_to_do_without():
    from fedssl.build import check_settings
    from fedssl.build_privacy import check_privacy

    config = load(["data.root=.", "encoder=tiny", "privacy=patient", "method=byol"])
    with pytest.raises(ConfigError, match=r"BatchNorm1d.*method\.norm=layer"):
        check_privacy(config, check_settings(config))
    config = load(["data.root=.", "encoder=tiny", "privacy=patient", "method=byol", "method.norm=layer"])
    check_privacy(config, check_settings(config))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_refused_wherever_it_is(affine):
    method = clustering()
    method.projector[1] = torch.nn.BatchNorm1d(32, affine=affine, track_running_stats=False)
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        require_separable(method, in_chans=1, edge=32)


def test_a_layer_of_another_name_that_looks_at_the_other_rows_is_found_out():
    class Mean(torch.nn.Module):
        def forward(self, rows):
            return rows - rows.mean(0)

    method = clustering()
    method.projector[1] = Mean()
    with pytest.raises(ConfigError, match="depends on the other images"):
        require_separable(method, in_chans=1, edge=32)


def test_a_layer_that_looks_at_the_other_rows_only_in_training_is_found_out():
    class Sly(torch.nn.Module):
        def forward(self, rows):
            return rows - rows.mean(0) if self.training else rows

    method = clustering()
    method.projector[1] = Sly()
    with pytest.raises(ConfigError, match="depends on the other images"):
        require_separable(method, in_chans=1, edge=32)


@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
def test_dropout_is_refused_because_its_mask_couples_the_batch(option):
    from fedssl.build import check_settings
    from fedssl.build_privacy import check_privacy

    config = load(["data.root=.", "encoder=vit_small_patch16_224", f"encoder.options.{option}=0.1", "privacy=patient"])
    with pytest.raises(ConfigError, match="mask follows a seed"):
        check_privacy(config, check_settings(config))


def test_sound_methods_pass():
    for make in (clustering, byol):
        assert isinstance(require_separable(make(), in_chans=1, edge=32), SeparableMethod)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_heads_without_batch_norm_have_none(norm):
    assert not any("BatchNorm" in type(layer).__name__ for layer in projector([4, 8, 2], norm=norm))
