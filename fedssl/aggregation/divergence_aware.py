"""Divergence-aware averaging by layer, L-DAWA (Rehman et al. 2023, arXiv 2307.07393).

A site's layer that has turned away from the shared one counts less in the mean of that layer:

    c_il = max(0, cos(w_il, w_l))            w_il: layer l of site i, w_l: the layer that the site started from
    w_l = sum_i n_i c_il w_il / sum_i n_i c_il

Deviations: the authors' code does not divide by the sum of the weights, which shrinks the layers each round; a layer
here is all tensors of a module (weight and bias together), theirs is a single tensor; an opposed layer counts nothing
instead of being subtracted.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State


class DivergenceAwareMean(Aggregator):
    """L-DAWA. A layer that starts at zero has no direction and is averaged by images alone. Remembers nothing."""

    def start(self) -> RunningSum:
        """Begin with an empty sum."""
        return RunningSum()

    def fold(self, total: RunningSum, state: State, reference: State, *, examples: int, steps: int) -> None:  # noqa: ARG002
        """Add one site's layers, each weighted by images and agreement."""
        for names in layers(reference):
            weight = examples * agreement(flatten(state, names), flatten(reference, names))
            for name in names:
                total.add(name, state[name], weight)

    def finish(
        self,
        total: RunningSum,
        reference: State,
        memory: State,  # noqa: ARG002 - L-DAWA has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean of each layer; one that all sites have turned against stays as it was."""
        return {
            name: total.mean(name).to(value.dtype) if total.weight[name] > 0 else value.clone()
            for name, value in reference.items()
        }, {}


def layers(names: Iterable[str]) -> list[list[str]]:
    """Group names of tensors by their module: the name without its last dotted part."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return list(modules.values())


def flatten(state: State, names: Iterable[str]) -> Float[Tensor, " weights"]:
    """Join tensors to one vector in float64."""
    return torch.cat([state[name].double().flatten() for name in names])


def agreement(layer: Float[Tensor, " weights"], start: Float[Tensor, " weights"]) -> float:
    """Cosine of a site's layer to the one it started from, 0 where they oppose, 1 where the start is zero."""
    if not start.any():
        return 1.0
    if not layer.any():
        return 0.0
    layer, start = layer / layer.abs().max(), start / start.abs().max()  # squares of large weights overflow
    return max(0.0, float(layer @ start / (layer.norm() * start.norm())))
