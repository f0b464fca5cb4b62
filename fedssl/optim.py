"""Optimisers and schedules. A schedule is a pure function of the progress of the whole federation, from 0 to 1."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lars
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fedssl.errors import ConfigError


def adamw(module: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) without weight decay on biases, norms and prototypes.

    The initial rate is kept in each group as ``base_lr``; ``set_rate`` scales it.
    """
    return AdamW(_groups(module, lr=lr, plain_lr=lr, weight_decay=weight_decay), lr=lr)


def sgd(module: nn.Module, *, lr: float, weight_decay: float, momentum: float, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent with momentum, without weight decay on biases, norms and prototypes."""
    groups = _groups(module, lr=lr, plain_lr=lr, weight_decay=weight_decay)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def lars(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    trust: float = 0.001,
    plain_lr: float | None = None,
) -> Optimizer:
    """LARS (You et al. 2017, equation 6): each weight's step is a share of its length. timm's implementation.

    Args:
        module: what to train.
        lr: of weights, for the batch size at hand.
        weight_decay: of weights.
        momentum: of all.
        trust: largest step as a share of a weight's length, at lr = 1.
        plain_lr: of biases, norms and prototypes, which LARS does not adapt; None: ``lr``.
    """
    groups = _groups(module, lr=lr, plain_lr=lr if plain_lr is None else plain_lr, weight_decay=weight_decay)
    groups[0]["always_adapt"] = True
    return Lars(groups, lr=lr, momentum=momentum, trust_coeff=trust)


def _groups(module: nn.Module, *, lr: float, plain_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weights, then biases, norms and prototypes, of what takes gradients."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and name != "prototypes"]
    plain = [p for name, p in trained if p.ndim <= 1 or name == "prototypes"]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr": lr, "base_lr": lr},
        {"params": plain, "weight_decay": 0.0, "lr": plain_lr, "base_lr": plain_lr},
    ]


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (SGDR, Loshchilov & Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - progress


def constant(progress: float) -> float:  # noqa: ARG001 - a schedule takes the progress
    """Always 1."""
    return 1.0


SHAPES: Mapping[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate over the whole federation: linear to 1 during the warm-up, then a shape.

    Attributes:
        shape: ``cosine``, ``linear`` or ``constant``.
        warmup: share of the federation spent warming up.
    """

    shape: str = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if self.shape not in SHAPES or not 0.0 <= self.warmup <= 1.0:
            raise ConfigError(
                f"optim.schedule={self.shape} with optim.warmup={self.warmup} is no schedule. Choose "
                f"{', '.join(SHAPES)} and a warm-up between 0 and 1."
            )

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``, the share of the federation's steps that is done, 0 to 1."""
        if progress < self.warmup:
            return progress / self.warmup
        return SHAPES[self.shape]((progress - self.warmup) / max(1.0 - self.warmup, 1e-12))


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimiser's state to named tensors: ``<parameter number>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, entry in state.items()
        for name, value in entry.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    snapshot = optimizer.state_dict()
    snapshot["state"] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        snapshot["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(snapshot)
