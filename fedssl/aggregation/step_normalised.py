"""Step-normalised averaging, FedNova (Wang et al. 2020, arXiv 2007.07481), for plain SGD at the sites.

With equal local epochs a site with more images takes more steps and pulls the mean towards its own optimum. FedNova
averages the sites' moves for each step, and then takes the mean number of steps:

    d_i = (w - w_i) / t_i                    t_i: optimiser steps of site i
    p_i = n_i / sum_j n_j
    w = w - (sum_i p_i t_i) sum_i p_i d_i

Equal steps everywhere give FedAvg. With momentum or AdamW at the sites, t_i stands in for the paper's norm of a_i.
"""

from dataclasses import dataclass, field

from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State


@dataclass
class StepSum:
    """The sites' moves for each step so far, weighted by images; their images, and their steps times images."""

    moves: RunningSum = field(default_factory=RunningSum)
    images: int = 0
    steps: int = 0


class StepNormalisedMean(Aggregator):
    """FedNova. Remembers nothing."""

    def start(self) -> StepSum:
        """Begin with empty sums."""
        return StepSum()

    def fold(self, total: StepSum, state: State, reference: State, *, examples: int, steps: int) -> None:
        """Add one site's move for each of its steps, weighted by its images; no step counts as one."""
        steps = max(steps, 1)
        for name, value in state.items():
            total.moves.add(name, (reference[name].double() - value.double()) / steps, examples)
        total.images += examples
        total.steps += examples * steps

    def finish(
        self,
        total: StepSum,
        reference: State,
        memory: State,  # noqa: ARG002 - FedNova has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the mean number of steps in the mean direction."""
        steps = total.steps / total.images
        return {
            name: (value.double() - steps * total.moves.mean(name)).to(value.dtype) for name, value in reference.items()
        }, {}
