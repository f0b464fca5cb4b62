"""What a site gives back after a round, what of a method may leave a site, and the check at the server's border."""

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.errors import UpdateRefused
from fedssl.methods.base import PROTOTYPES, Method

MOST_IMAGES = 1e9  # more than any site has: a larger figure is an error or an attack
_ROUNDING = 1.001
_UNSAFE = re.compile(r"[^\w.-]")  # the name of a tensor that nobody asked for is printed
METRICS = frozenset(
    {
        "loss", "effective_prototypes", "code_entropy", "released_prototypes", "modality_nmi", "rankme", "images",
        "steps", "seconds", "images_per_s", "data_wait", "optimizer_restarted", "epsilon", "delta",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Update:
    """One site's answer to one round.

    Attributes:
        site: its name in the federation.
        state: the shared state after local training.
        examples: images that the site trained on, its weight in averages.
        steps: optimiser steps that it took.
        mass: [prototypes] soft number of samples assigned to each prototype, or None.
        usage: [prototypes] number of samples nearest to each prototype, or None.
        metrics: figures of the round, by the names in ``METRICS`` and the method's terms: nothing else may leave a site
            or be recorded.
        ledger: number and hash of the newest entry of the site's privacy ledger; empty without one.
        independent: the site began with its own pretraining, so that its prototypes have an order of their own.
    """

    site: str
    state: Mapping[str, Tensor]
    examples: int
    steps: int
    mass: Float[Tensor, " prototypes"] | None
    usage: Float[Tensor, " prototypes"] | None
    metrics: Mapping[str, float]
    ledger: str = ""
    independent: bool = False


@dataclass(frozen=True)
class Limits:
    """What an update must keep to.

    Attributes:
        terms: names of the terms of the method's loss.
        change: largest norm of the change of the state, in norms of the state that was sent.
        examples: most images that the site can have.
        steps: most optimiser steps that it can have taken.
        batch: most images of a step.
    """

    terms: frozenset[str] = frozenset()
    change: float = 3.0
    examples: float = MOST_IMAGES
    steps: float = MOST_IMAGES
    batch: float = MOST_IMAGES


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


def check_update(update: Update, reference: Mapping[str, Tensor], limits: Limits) -> float:
    """Accept only an update that can be averaged.

    Args:
        update: of a site.
        reference: the state that the site was sent.
        limits: what it must keep to.

    Returns:
        The norm of the site's change, in norms of the state that was sent.

    Raises:
        UpdateRefused: names the site and the first thing that does not fit the reference.
    """
    for reason in _misfits(update, reference, limits):
        raise UpdateRefused(update.site, reason)
    change = change_of(update.state, reference)
    if not change <= limits.change:
        raise UpdateRefused(
            update.site,
            f"it changed the weights by {change:.3g} times their norm, more than the {limits.change:.3g} that are "
            "allowed here (federation.largest_change, or 100 times the usual change of the last round)",
        )
    return change


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and values of a state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def change_of(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """||state - reference|| / ||reference||, over all tensors, in float64; 0 where both are 0."""
    moved = sum(float((state[name].double() - value.double()).square().sum()) for name, value in reference.items())
    size = sum(float(value.double().square().sum()) for value in reference.values())
    return math.sqrt(moved / size) if size else math.inf * moved if moved else 0.0


def cosine_to(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Cosine between two states as vectors, in float64; 1 is the same direction."""
    inner, own, other = (
        sum(float((first[name].double() * second[name].double()).sum()) for name in reference)
        for first, second in ((state, reference), (state, state), (reference, reference))
    )
    return inner / math.sqrt(own * other) if own * other else 1.0


def _misfits(update: Update, reference: Mapping[str, Tensor], limits: Limits) -> Iterator[str]:
    """Give everything about an update that does not fit."""
    if not 0 < update.examples <= min(limits.examples, MOST_IMAGES):
        yield f"it reports {update.examples:.3g} images"
    if not 1 <= update.steps <= limits.steps:
        yield f"it reports {update.steps:.3g} steps"
    yield from _misfit_metrics(update, METRICS | limits.terms, limits.batch)
    for name in sorted(update.state.keys() - reference.keys()):
        yield f"tensor {_UNSAFE.sub('?', name)[:64]} is not part of the shared state"
    for name, expected in reference.items():
        yield from _misfit_tensor(f"tensor {name}", update.state.get(name), expected)
    yield from _misfit_prototypes(update, reference)


def _misfit_metrics(update: Update, names: Collection[str], batch: float) -> Iterator[str]:
    if not {"loss", "images"} <= update.metrics.keys() or not update.metrics.keys() <= set(names):
        yield "its metrics lack loss or images, or have a name that is not on the list"
    elif not all(math.isfinite(value) and abs(value) < MOST_IMAGES for value in update.metrics.values()):
        yield "its metrics are not finite or absurdly large"
    elif not update.steps <= update.metrics["images"] <= update.steps * batch:
        yield f"it trained on {update.metrics['images']:.3g} images in {update.steps} steps"


def _misfit_prototypes(update: Update, reference: Mapping[str, Tensor]) -> Iterator[str]:
    if PROTOTYPES in reference:
        trained = update.metrics.get("images", 0.0)
        yield from _misfit_counts("prototype mass", update.mass, len(reference[PROTOTYPES]), trained)
        yield from _misfit_counts("prototype usage", update.usage, len(reference[PROTOTYPES]), trained)
    elif update.mass is not None or update.usage is not None:
        yield "it counts prototypes where the method has none"


def _misfit_counts(name: str, counts: Tensor | None, prototypes: int, trained: float) -> Iterator[str]:
    yield from _misfit_tensor(name, counts, torch.zeros(prototypes))
    if counts is not None and bool((counts < 0).any()):
        yield f"{name} holds a negative count"
    elif counts is not None and float(counts.sum()) > _ROUNDING * trained:
        yield f"{name} counts {float(counts.sum()):.3g} images where it trained on {trained:.3g}"


def _misfit_tensor(name: str, found: Tensor | None, expected: Tensor) -> Iterator[str]:
    if found is None:
        yield f"{name} is missing"
    elif found.shape != expected.shape or found.dtype != expected.dtype:
        yield f"{name} is {_kind(found)} where {_kind(expected)} is expected"
    elif not bool(torch.isfinite(found).all()):
        yield f"{name} is not finite"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
