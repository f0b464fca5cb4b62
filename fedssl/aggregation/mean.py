"""Federated averaging (McMahan et al. 2017, algorithm 1): the mean of the sites' states, weighted by their images."""

from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State


class WeightedMean(Aggregator):
    """FedAvg: sum_i n_i w_i / sum_i n_i with n_i the images of site i. Remembers nothing."""

    def start(self) -> RunningSum:
        """Begin with an empty sum."""
        return RunningSum()

    def fold(self, total: RunningSum, state: State, reference: State, *, examples: int, steps: int) -> None:  # noqa: ARG002
        """Add one site's state, weighted by its images."""
        for name, value in state.items():
            total.add(name, value, examples)

    def finish(
        self,
        total: RunningSum,
        reference: State,
        memory: State,  # noqa: ARG002 - FedAvg has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean."""
        return {name: total.mean(name).to(value.dtype) for name, value in reference.items()}, {}
