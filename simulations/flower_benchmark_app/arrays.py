"""The arrays that travel, what a site changes in them, and what must come out at the end."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

_STAGES = ((1, 3), (2, 4), (4, 6), (8, 3))  # ResNet-50: factor of the width, number of blocks
_PROTOTYPES, _HEADS = (256, 128), 34


def make_state(megabytes: float) -> dict[str, Tensor]:
    """Make 300 named float32 tensors of ``megabytes`` (10^6 bytes) in all, shaped like a ResNet-50 with heads."""
    total = round(megabytes * 1e6 / 4) - prod(_PROTOTYPES)
    width = next(width for width in range(512, 0, -1) if _size(width) <= 0.95 * total)
    shapes = dict(_resnet50(width))
    bounds = [(total - _size(width)) * head // _HEADS for head in range(_HEADS + 1)]
    shapes |= {f"heads.{head}.weight": (end - start,) for head, (start, end) in enumerate(pairwise(bounds))}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    state["prototypes"] = F.normalize(torch.randn(_PROTOTYPES, generator=generator), dim=1)
    return state


def _size(width: int) -> int:
    return sum(prod(shape) for _, shape in _resnet50(width))


def _resnet50(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv("stem", 3, width, 7)
    entering = width
    for stage, (factor, blocks) in enumerate(_STAGES, start=1):
        inner, leaving = factor * width, 4 * factor * width
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield from _conv(f"{name}.1", entering, inner, 1)
            yield from _conv(f"{name}.2", inner, inner, 3)
            yield from _conv(f"{name}.3", inner, leaving, 1)
            if block == 0:
                yield from _conv(f"{name}.downsample", entering, leaving, 1)
            entering = leaving


def _conv(name: str, entering: int, leaving: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv.weight", (leaving, entering, kernel, kernel)
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.norm.{part}", (leaving,)


def change(site: int) -> float:
    """What site 1, 2, ... adds to every value in a round."""
    return 0.01 * site


def examples(site: int) -> int:
    """Images that site 1, 2, ... says it has trained on."""
    return 10 * site


def mean_change(sites: int) -> float:
    """What a round adds to every value: sum_i n_i d_i / sum_i n_i."""
    numbers = range(1, sites + 1)
    return sum(examples(i) * change(i) for i in numbers) / sum(map(examples, numbers))


def expected_state(start: Mapping[str, Tensor], sites: int, rounds: int, *, spherical: bool) -> dict[str, Tensor]:
    """Compute the state after some rounds.

    Args:
        start: what the first round began with.
        sites: sites 1 to ``sites`` answered every round.
        rounds: number of rounds.
        spherical: prototypes are averaged on the sphere, as fedssl does; else like every other tensor.
    """
    state = {name: (value.double() + rounds * mean_change(sites)).float() for name, value in start.items()}
    if spherical:
        centres = start["prototypes"].double()
        for _ in range(rounds):
            moved = [examples(i) * F.normalize(centres + change(i), dim=1) for i in range(1, sites + 1)]
            centres = F.normalize(torch.stack(moved).sum(0), dim=1)
        state["prototypes"] = centres.float()
    return state
