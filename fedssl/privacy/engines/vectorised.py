"""Gradients of several patients at once by ``torch.func`` (vmap of grad); patients are filled up to equal size.

In full precision, so that who else is in a chunk does not round a patient's gradient.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.base import Engine, Gradients, Unit
from fedssl.privacy.mechanism import clip_factor

_CHUNK = 8
_ROUNDING = 1e-6  # of a clipped gradient in float32


class _PatientLoss(nn.Module):
    """The loss of one patient's views as a module, whose parameters can be given."""

    def __init__(self, method: SeparableMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: Sequence[Tensor], there: Tensor) -> Tensor:
        return self.method.patient_loss(self.method.embed(views), there)


class Vectorised(Engine):
    """Runs ``_CHUNK`` patients at once and holds a gradient for each."""

    def gradients(self, clip: float) -> Gradients:
        """Compute the chunks' gradients, clip each patient's, add."""
        total, losses = self.zeros(), [self.parameters[0].new_zeros(0)]
        gradients_of = self._gradients_of()
        trained = {f"method.{name}": value.detach() for name, value in self.trained.items()}
        for start in range(0, len(self.units), _CHUNK):
            views, there = stacked(self.units[start : start + _CHUNK])
            found, loss = gradients_of(trained, views, there)
            squares = torch.stack([part.double().flatten(1).square().sum(1) for part in found.values()]).sum(0)
            norms = ((1.0 + _ROUNDING) * squares.sqrt()).tolist()
            factors = squares.new_tensor([clip_factor(norm, clip) for norm in norms])
            for own, part in zip(total, found.values(), strict=True):
                add_weighted(own, part, factors)
            losses.append(loss.detach())
        return Gradients(total, torch.cat(losses))

    def _gradients_of(self) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
        module = _PatientLoss(self.method)
        fixed = {f"method.{name}": value for name, value in self._fixed().items()}

        def loss(trained: Mapping[str, Tensor], views: list[Tensor], there: Tensor) -> Tensor:
            return functional_call(module, {**fixed, **trained}, (views, there))

        return vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")

    def _fixed(self) -> dict[str, Tensor]:
        rest = {name: value.detach() for name, value in self.method.named_parameters() if name not in self.trained}
        return rest | dict(self.method.named_buffers())


def stacked(units: Sequence[Unit]) -> tuple[list[Tensor], Tensor]:
    """Stack the views of patients, filled up with empty images; also gives which are images [patients, images]."""
    most = max(len(unit[0]) for unit in units)
    there = torch.tensor([[number < len(unit[0]) for number in range(most)] for unit in units])
    views = []
    for number in range(len(units[0])):
        filled = units[0][number].new_zeros(len(units), most, *units[0][number].shape[1:])
        for place, unit in enumerate(units):
            filled[place, : len(unit[number])] = unit[number]
        views.append(filled)
    return views, there.to(views[0].device)


def add_weighted(total: Tensor, parts: Tensor, factors: Tensor) -> None:
    """Add the patients' parts [patients, ...] times their factors; a factor of 0 leaves out what is not finite."""
    used = factors > 0
    for factor, part in zip(factors[used].tolist(), parts[used], strict=True):
        total.add_(part, alpha=factor)
