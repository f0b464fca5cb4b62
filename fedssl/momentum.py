"""Targets that follow an online network slowly (He et al. 2020, equation 2; Grill et al. 2020, equation 1).

A target is a copy kept at the site: it never leaves, and every round starts it again from the shared weights.
"""

import copy
import math

import torch
from torch import nn


class SlowCopy(nn.Sequential):
    """Copies of an encoder and its head, without gradient, that follow them.

    Args:
        online: the networks to follow, one after the other.
    """

    def __init__(self, *online: nn.Module) -> None:
        super().__init__(*(copy.deepcopy(network) for network in online))
        self.requires_grad_(requires_grad=False)

    def follow(self, *online: nn.Module, momentum: float) -> None:
        """Move towards the networks that were copied; a momentum of 0 copies them anew."""
        for own, other in zip(self, online, strict=True):
            follow(own, other, momentum=momentum)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """Move every weight of the target: target <- momentum target + (1 - momentum) online. 0 copies."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1.0 - momentum) if momentum else slow.copy_(fast)


def rising_momentum(base: float, progress: float) -> float:
    """Momentum from ``base`` to 1 by half a cosine over the whole federation (Grill et al. 2020, section 3.2).

    Args:
        base: at the start.
        progress: share of the federation's steps that is done, 0 to 1.
    """
    return 1.0 - (1.0 - base) * (math.cos(math.pi * progress) + 1.0) / 2.0
