"""Plain local training (FedAvg, McMahan et al. 2017), and the places where other rules differ from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

State = Mapping[str, Tensor]


class LocalRule:
    """Start from what the server sent and follow the gradient of the loss. Values in, values out; nothing is kept here.

    Attributes:
        remembers: whether ``begin`` needs the state with which the site ended its last round.
    """

    remembers: bool = False

    def begin(self, received: State, own: State | None, scale: float | None) -> tuple[State, float | None]:  # noqa: ARG002
        """Choose the weights to start from.

        Args:
            received: the shared state.
            own: the state with which the site ended the last round that it took part in; None the first time.
            scale: what ``begin`` returned in that round, or None.

        Returns:
            The weights, and a number to remember.
        """
        return received, scale

    def correct(self, parameters: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Change the gradients of the shared ``parameters`` before the optimiser's step."""


@dataclass(frozen=True)
class Correction:
    """A rule against drift at work: what it needs to change gradients.

    Attributes:
        rule: of local training.
        parameters: the shared ones.
        received: their values as the server sent them.
    """

    rule: LocalRule
    parameters: Sequence[Tensor]
    received: Sequence[Tensor]

    def apply(self) -> None:
        """Change the gradients."""
        self.rule.correct(self.parameters, self.received)
