"""Federated averaging (McMahan et al. 2017, algorithm 1): the mean of the sites' states, weighted by their images."""

from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State


class WeightedMean(Aggregator):
    """FedAvg: sum_i n_i w_i / sum_i n_i with n_i the images of site i. Remembers nothing."""

    def finish(
        self,
        total: RunningSum,
        reference: State,
        memory: State,  # noqa: ARG002 - FedAvg has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean."""
        return {name: total.mean(name).to(value.dtype) for name, value in reference.items()}, {}
