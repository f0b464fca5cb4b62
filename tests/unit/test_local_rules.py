"""What sites do against drift, by hand and by autograd."""

import pytest
import torch

from fedssl.build import build_local_rule
from fedssl.config import CONFIG_FOLDER, load
from fedssl.errors import ConfigError
from fedssl.local.base import LocalRule
from fedssl.local.ema import FedEMA
from fedssl.local.proximal import Proximal


def test_the_proximal_gradient_is_that_of_the_proximal_term():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    weights = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    data = torch.randn(3, generator=generator)

    def loss():
        return (weights @ data).square().sum()

    (loss() + 0.3 / 2 * (weights - start).square().sum()).backward()
    expected, weights.grad = weights.grad, None
    loss().backward()
    Proximal(0.3).correct([weights], [start])
    torch.testing.assert_close(weights.grad, expected)


def test_a_parameter_that_is_not_trained_is_left_alone():
    frozen = torch.nn.Parameter(torch.ones(2))
    Proximal(1.0).correct([frozen], [torch.zeros(2)])
    assert frozen.grad is None


def test_plain_training_starts_from_what_came_and_changes_no_gradient():
    weights = torch.nn.Parameter(torch.ones(2))
    weights.grad = torch.ones(2)
    received = {"encoder.w": torch.zeros(2)}
    assert LocalRule().begin(received, {"encoder.w": torch.ones(2)}, None) == (received, None)
    LocalRule().correct([weights], [torch.zeros(2)])
    assert weights.grad.tolist() == [1.0, 1.0]


def test_fedema_over_three_rounds_is_what_a_person_computes():
    rule = FedEMA(0.7)
    first = {"encoder.w": torch.tensor([0.0, 0.0]), "prototypes": torch.eye(2)}
    start, scale = rule.begin(first, None, None)
    assert start is first
    assert scale is None
    own = {"encoder.w": torch.tensor([3.0, 4.0]), "prototypes": -torch.eye(2)}
    start, scale = rule.begin(first, own, scale)  # distance 5, so lambda = .7 / 5 and mu = .7
    assert scale == pytest.approx(0.14)
    torch.testing.assert_close(start["encoder.w"], torch.tensor([2.1, 2.8]))
    assert torch.equal(start["prototypes"], torch.eye(2))
    near = {"encoder.w": torch.tensor([1.5, 2.0]), "prototypes": torch.eye(2)}
    start, again = rule.begin(first, near, scale)  # half as far: mu = .35
    assert again == scale
    torch.testing.assert_close(start["encoder.w"], torch.tensor([0.525, 0.7]))
    far = {"encoder.w": torch.tensor([30.0, 40.0]), "prototypes": torch.eye(2)}
    assert torch.equal(rule.begin(first, far, scale)[0]["encoder.w"], far["encoder.w"])  # mu is at most 1


def test_fedema_does_not_measure_lambda_on_a_round_in_which_nobody_else_took_part():
    rule, own = FedEMA(0.7), {"encoder.w": torch.tensor([3.0, 4.0])}
    assert rule.begin(dict(own), own, None)[1] is None
    started, scale = rule.begin({"encoder.w": torch.tensor([3.0, 5.0])}, own, None)
    assert scale == pytest.approx(0.7)
    assert started["encoder.w"][1].item() == pytest.approx(4.3)


def test_fedema_measures_the_encoder_and_mixes_the_heads_too():
    received = {"encoder.w": torch.zeros(1), "projector.w": torch.zeros(1)}
    own = {"encoder.w": torch.ones(1), "projector.w": torch.full((1,), 100.0)}
    start, scale = FedEMA(0.5).begin(received, own, None)
    assert scale == pytest.approx(0.5)
    assert start["projector.w"].item() == pytest.approx(50.0)


@pytest.mark.parametrize(
    "rule", [lambda: FedEMA(1.1), lambda: FedEMA(-0.1), lambda: Proximal(-1), lambda: Proximal(float("inf"))]
)
def test_impossible_settings_are_refused_by_name(rule):
    with pytest.raises(ConfigError, match=r"local\.(tau|mu)="):
        rule()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_FOLDER / "local").glob("*.yaml")))
def test_every_file_of_local_rules_builds(name):
    assert isinstance(build_local_rule(load(["data.root=.", f"local={name}"])), LocalRule)
