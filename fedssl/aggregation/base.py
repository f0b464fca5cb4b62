"""What every rule of aggregation is: a fold over the sites' states, and what it remembers from round to round."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


class Aggregator(ABC):
    """Combines the states of one round. A rule keeps nothing in itself: its ``memory`` is a value, saved and resumed.

    Attributes:
        robust: whether hostile sites are held off. Then prototypes are combined like every other tensor, because the
            counts that would weigh them are claims of the sites.
        least_sites: fewer good answers than this cannot be combined.
    """

    robust: bool = False
    least_sites: int = 1

    def start(self) -> Any:  # noqa: ANN401 - a rule may have a running total of its own
        """Make the empty running total of a round: a sum, weighted by images."""
        return RunningSum()

    def fold(self, total: Any, state: State, reference: State, *, examples: int, steps: int) -> None:  # noqa: ANN401, ARG002
        """Add one site's state to ``total``; afterwards the state can be dropped.

        Args:
            total: made by ``start``; changed in place.
            state: of the site after its local training.
            reference: the state that the site started from.
            examples: images that the site trained on.
            steps: optimiser steps that the site took.
        """
        for name, value in state.items():
            total.add(name, value, examples)

    @abstractmethod
    def finish(self, total: Any, reference: State, memory: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # noqa: ANN401
        """Return the new state and the new memory; keys, shapes and dtypes of the state are those of ``reference``.

        Args:
            total: of all sites of the round.
            reference: the state that the sites started from.
            memory: what ``finish`` returned in the last round; empty in the first.
        """


@dataclass
class RunningSum:
    """Weighted sum of states so far, in float64, and the weight so far, by name of the tensor."""

    state: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """Add one tensor with a weight; the sum is changed in place."""
        term = value.double() * weight
        self.state[name] = self.state[name].add_(term) if name in self.state else term
        self.weight[name] = self.weight.get(name, 0.0) + weight

    def mean(self, name: str) -> Tensor:
        """Return the weighted mean of one tensor, in float64."""
        return self.state[name] / self.weight[name]
