"""What every engine does: one patient's vote, and the sum of the patients' clipped gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.mechanism import clipped

Unit = Sequence[Float[Tensor, "_images channels _rows _columns"]]
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Gradients:
    """What the drawn patients add up to.

    Attributes:
        total: sum of the clipped gradients in float64, a tensor a trained parameter.
        losses: [patients] loss of each; not finite where a patient's images make none.
    """

    total: list[Tensor]
    losses: Float[Tensor, " patients"]


class Engine(ABC):
    """Works on the drawn patients of one step: ``see``, then ``votes``, then ``gradients``.

    Args:
        method: whose parameters are trained.
        autocast: makes autocast contexts for the network.
    """

    def __init__(self, method: SeparableMethod, autocast: Autocast) -> None:
        self.method = method
        self.autocast = autocast
        self.units: Sequence[Unit] = []
        self.trained = {name: value for name, value in method.named_parameters() if value.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of ``Gradients.total``."""
        return list(self.trained.values())

    def see(self, units: Sequence[Unit]) -> None:
        """Take the views of each drawn patient: a tensor a view, a row an image."""
        self.units = units

    def votes(self) -> Float[Tensor, " votes"]:
        """Sum of the patients' votes, each clipped to the bound: one that is not finite adds nothing."""
        method, device = self.method, self.parameters[0].device
        total = torch.zeros(method.num_votes, dtype=torch.float64, device=device)
        for points in self.points():
            total += clipped(method.vote(points, present(points)).double(), method.vote_bound)
        return total

    def points(self) -> Iterator[list[Tensor]]:
        """Points of each patient's views."""
        for unit in self.units:
            with torch.no_grad(), self.autocast():
                points = self.method.embed(unit)
            yield points

    @abstractmethod
    def gradients(self, clip: float) -> Gradients:
        """Sum of the gradients of each patient's loss, each clipped to an L2 norm of ``clip`` over all parameters."""

    def zeros(self) -> list[Tensor]:
        """The sum where nobody was drawn, in float64: in float32 what is added late is rounded by what came before."""
        return [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self.parameters]


def present(points: Sequence[Tensor]) -> Tensor:
    """All rows are images."""
    return torch.ones(len(points[0]), dtype=torch.bool, device=points[0].device)
