"""One round's answers become one state: folded one by one, so that memory does not grow with the sites."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from fedssl.aggregation import prototypes
from fedssl.aggregation.base import Aggregator
from fedssl.aggregation.matching import aligned
from fedssl.aggregation.prototypes import PrototypeSum
from fedssl.methods.base import PROTOTYPES
from fedssl.update import Update


class Combination:
    """The running total of a round.

    Args:
        aggregator: combines the states; prototypes too if it is robust, else they are weighted by their mass.
        master: the state before the round, unrounded.
        received: the state as the sites got it. At half precision it differs from ``master``: the sites' changes are
            added to the latter, or moves smaller than its rounding would be lost for ever.
    """

    def __init__(self, aggregator: Aggregator, master: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
        self.aggregator = aggregator
        self.master = master
        self.received = received
        self.total = aggregator.start()
        self.centres = PrototypeSum()

    def add(self, update: Update) -> Update:
        """Fold one answer; returns it with prototypes, mass and use in the federation's order."""
        if update.independent and PROTOTYPES in self.received:
            update = aligned(update, self.received[PROTOTYPES])
        self.aggregator.fold(
            self.total, self._ruled(update.state), self._ruled(self.received), examples=update.examples,
            steps=update.steps,
        )  # fmt: skip
        if update.mass is not None:
            # A site weighs by its images, however often it passed over them.
            mass = update.mass.double() * (update.examples / update.metrics["images"])
            prototypes.fold(self.centres, self._unrounded(PROTOTYPES, update.state[PROTOTYPES]), mass)
            update = replace(update, mass=mass)
        return update

    def finish(self, memory: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], float | None]:
        """Return the new state, the aggregator's new memory, and the agreement of the prototypes.

        Args:
            memory: of the aggregator.
        """
        state, memory = self.aggregator.finish(self.total, self._ruled(self.received), memory)
        state = {name: self._unrounded(name, value) for name, value in state.items()}
        agreement = None
        if PROTOTYPES in self.master:
            centres, agreement = prototypes.finish(self.centres, self.master[PROTOTYPES])
            state[PROTOTYPES] = F.normalize(state[PROTOTYPES], dim=1) if self.aggregator.robust else centres
        return {name: state[name] for name in self.master}, memory, agreement

    def _unrounded(self, name: str, value: Tensor) -> Tensor:
        """Move what was reached from the rounded state to where it would be from the unrounded one."""
        if self.received[name] is self.master[name]:
            return value
        return value + (self.master[name] - self.received[name])

    def _ruled(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the tensors that the aggregator combines."""
        return {name: value for name, value in state.items() if name != PROTOTYPES or self.aggregator.robust}
