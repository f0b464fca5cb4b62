"""What a site gives back after a round, what of a method may leave a site, and the check at the server's border."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.errors import UpdateRefused
from fedssl.methods.base import PROTOTYPES, Method


@dataclass(frozen=True)
class Update:
    """One site's answer to one round.

    Attributes:
        site: its name in the federation.
        state: the shared state after local training.
        examples: images that the site trained on, its weight in averages.
        mass: [prototypes] soft number of samples assigned to each prototype, or None.
        usage: [prototypes] number of samples nearest to each prototype, or None.
        metrics: named figures of the round.
    """

    site: str
    state: Mapping[str, Tensor]
    examples: int
    mass: Float[Tensor, " prototypes"] | None
    usage: Float[Tensor, " prototypes"] | None
    metrics: Mapping[str, float]


def shared_state(method: Method) -> dict[str, Tensor]:
    """Copy what may leave a site: the parameters on the method's allow-list, on the CPU. Buffers never leave."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in method.named_parameters()
        if name.startswith(method.shared)
    }


@torch.no_grad()
def load_shared_state(method: Method, state: Mapping[str, Tensor]) -> None:
    """Put a shared state into a method.

    Raises:
        KeyError: a tensor is missing or unknown.
    """
    own = {name: parameter for name, parameter in method.named_parameters() if name.startswith(method.shared)}
    if own.keys() != state.keys():
        raise KeyError(f"state differs in {', '.join(sorted(own.keys() ^ state.keys())[:5])}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def check_update(update: Update, reference: Mapping[str, Tensor]) -> None:
    """Accept only an update that can be averaged.

    Raises:
        UpdateRefused: names the site and the first thing that does not fit the reference.
    """
    for reason in _misfits(update, reference):
        raise UpdateRefused(update.site, reason)


def _misfits(update: Update, reference: Mapping[str, Tensor]) -> Iterator[str]:
    """Give everything about an update that does not fit."""
    if update.examples <= 0:
        yield f"it reports {update.examples} images"
    if not {"loss", "images"} <= update.metrics.keys() or not all(map(math.isfinite, update.metrics.values())):
        yield "its metrics lack loss or images, or are not finite"
    for name in sorted(reference.keys() - update.state.keys()):
        yield f"tensor {name} is missing"
    for name in sorted(update.state.keys() - reference.keys()):
        yield f"tensor {name} is not part of the shared state"
    for name in reference.keys() & update.state.keys():
        found, expected = update.state[name], reference[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            yield f"tensor {name} is {_kind(found)} where {_kind(expected)} was sent"
        elif not bool(torch.isfinite(found).all()):
            yield f"tensor {name} is not finite"
    for name, counts in (("mass", update.mass), ("usage", update.usage)) if PROTOTYPES in reference else ():
        if counts is None or counts.shape != (len(reference[PROTOTYPES]),):
            yield f"prototype {name} is missing or has not {len(reference[PROTOTYPES])} entries"
        elif not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
            yield f"prototype {name} holds a negative or non-finite count"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
