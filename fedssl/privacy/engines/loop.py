"""One backward pass a patient: any number of images and views, and coupling is impossible by construction."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.base import Autocast, Engine, Gradients, Unit, present
from fedssl.privacy.mechanism import clip_factor, gradient_norm

_KEPT_PIXELS = 4_000_000  # of views whose graphs are kept from votes to gradients: about what a plain batch holds


class Loop(Engine):
    """Runs each patient by itself. Graphs of the votes are kept for the gradients as far as memory allows."""

    def __init__(self, method: SeparableMethod, autocast: Autocast) -> None:
        super().__init__(method, autocast)
        self.kept: list[list[Tensor]] = []

    def see(self, units: Sequence[Unit]) -> None:
        """Forget the last step."""
        super().see(units)
        self.kept = []

    def points(self) -> Iterator[list[Tensor]]:
        """Points of each patient's views, with their graphs while there is room."""
        room = _KEPT_PIXELS
        for unit in self.units:
            room -= sum(view.numel() for view in unit)
            with torch.set_grad_enabled(room > 0), self.autocast():
                points = self.method.embed(unit)
            if room > 0:
                self.kept.append(points)
            yield points

    def gradients(self, clip: float) -> Gradients:
        """Back-propagate each patient's loss, clip, add."""
        total, losses, parameters = self.zeros(), [], self.parameters
        kept = iter(self.kept)
        for unit in self.units:
            points = next(kept, None)
            if points is None:
                with self.autocast():
                    points = self.method.embed(unit)
            loss = self.method.patient_loss(points, present(points))
            gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
            factor = clip_factor(gradient_norm(gradient), clip)
            if factor > 0.0:  # a sum with 0 times infinity would be none
                for own, part in zip(total, gradient, strict=True):
                    own.add_(part, alpha=factor)
            losses.append(loss.detach())
        self.kept = []
        return Gradients(total, torch.stack(losses) if losses else parameters[0].new_zeros(0))
