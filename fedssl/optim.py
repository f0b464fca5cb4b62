"""Optimisers and schedules. A schedule is a pure function of the progress of the whole federation, from 0 to 1."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(module: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) without weight decay on biases, norms and prototypes.

    The initial rate is kept in each group as ``base_lr``; ``set_rate`` scales it.
    """
    decayed = [p for name, p in module.named_parameters() if p.ndim > 1 and name != "prototypes"]
    plain = [p for name, p in module.named_parameters() if p.ndim <= 1 or name == "prototypes"]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([{**group, "base_lr": lr} for group in groups], lr=lr)


def warmup_cosine(progress: float, *, warmup: float) -> float:
    """Factor of the learning rate: linear to 1 during ``warmup``, then half a cosine to 0 (SGDR, eq. 5).

    Args:
        progress: share of the federation's steps that is done, 0 to 1.
        warmup: share of the federation spent warming up.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-12)))


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimiser's state to named tensors: ``<parameter number>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, entry in state.items() for name, value in entry.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    snapshot = optimizer.state_dict()
    snapshot["state"] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        snapshot["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(snapshot)
