"""Optimisers against loops over their papers, and schedules over the whole federation."""

import math

import pytest
import torch
from torch import nn

from fedssl.build import build_method, optimizer_maker
from fedssl.config import CONFIG_FOLDER, load
from fedssl.data.batches import ViewBatch
from fedssl.errors import ConfigError
from fedssl.optim import SHAPES, Schedule, lars, load_optimizer_tensors, optimizer_tensors, set_rate, sgd


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.prototypes = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.target = nn.Parameter(torch.ones(2, 2, dtype=torch.float64), requires_grad=False)

    def loss(self, step):
        x = torch.full((4,), 1.0 + 0.1 * step, dtype=torch.float64)
        return (self.weight @ x + self.bias).square().sum() + (self.prototypes @ x).square().sum()


def _steps(net, optimizer, count):
    for step in range(count):
        optimizer.zero_grad()
        net.loss(step).backward()
        optimizer.step()


def test_lars_takes_steps_whose_length_is_a_share_of_the_weights():
    net, mirror = _Net(), _Net()
    _steps(net, lars(net, lr=0.5, weight_decay=0.01, momentum=0.9, trust=0.02, plain_lr=0.001), 3)
    speed = {name: torch.zeros_like(p) for name, p in mirror.named_parameters()}
    for step in range(3):
        mirror.zero_grad()
        mirror.loss(step).backward()
        with torch.no_grad():
            for name, p in mirror.named_parameters():
                if name == "target":
                    continue
                gradient, rate = p.grad.clone(), 0.001
                if name == "weight":  # You et al. 2017, equation 6
                    length = 0.02 * p.norm() / (p.grad.norm() + 0.01 * p.norm() + 1e-8)
                    gradient, rate = (p.grad + 0.01 * p) * length, 0.5
                speed[name] = 0.9 * speed[name] + gradient
                p -= rate * speed[name]
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, dict(mirror.named_parameters())[name], rtol=1e-9, atol=1e-12, msg=name)


def test_sgd_decays_weights_but_no_biases_or_prototypes_and_leaves_slow_copies_alone():
    net = _Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = sgd(net, lr=0.1, weight_decay=0.5, momentum=0.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(net.named_parameters())
    torch.testing.assert_close(after["weight"].detach(), before["weight"] * 0.95)
    for name in ("bias", "prototypes", "target"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_FOLDER / "optim").glob("*.yaml")))
def test_every_optimiser_file_trains_and_goes_on_from_its_saved_tensors_as_if_never_stopped(name):
    config = load(["data.root=.", "encoder=tiny", "heads.num_prototypes=8", f"optim={name}"])
    batches = [_batch(seed) for seed in range(4)]
    whole, first, second = (build_method(config) for _ in range(3))
    _train(whole, optimizer_maker(config)(whole), batches)
    optimizer = optimizer_maker(config)(first)
    _train(first, optimizer, batches[:2])
    second.load_state_dict(first.state_dict())
    resumed = optimizer_maker(config)(second)
    load_optimizer_tensors(resumed, optimizer_tensors(optimizer))
    _train(second, resumed, batches[2:])
    for key, value in whole.named_parameters():
        assert torch.isfinite(value).all()
        assert torch.equal(value, dict(second.named_parameters())[key]), key


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(8, 1, 32, 32, generator=generator) for _ in range(2)]
    return ViewBatch(views, torch.zeros(2, 8, dtype=torch.long), torch.full((8,), -1))


def _train(method, optimizer, batches):
    for batch in batches:
        set_rate(optimizer, 0.5)
        optimizer.zero_grad()
        method.loss(batch).total.backward()
        optimizer.step()
        method.after_step()


@pytest.mark.parametrize(("shape", "expected"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_a_schedule_rises_in_its_warmup_and_then_follows_its_shape(shape, expected):
    schedule = Schedule(shape, warmup=0.2)
    assert schedule(0.0) == 0.0
    assert schedule(0.1) == pytest.approx(0.5)
    assert schedule(0.2) == pytest.approx(1.0)
    assert schedule(0.6) == pytest.approx(expected)
    assert schedule(0.4) == pytest.approx(
        {"cosine": (1 + math.cos(math.pi / 4)) / 2, "linear": 0.75, "constant": 1.0}[shape]
    )


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_schedule_runs_over_the_federation_and_is_not_started_again_each_round(shape):
    schedule, rounds, steps = Schedule(shape, warmup=0.1), 10, 7
    by_round = [schedule((number + step / steps) / rounds) for number in range(rounds) for step in range(steps)]
    at_once = [schedule(step / (rounds * steps)) for step in range(rounds * steps)]
    assert by_round == pytest.approx(at_once)


def test_an_unknown_schedule_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="cosine, linear, constant"):
        Schedule("step")
