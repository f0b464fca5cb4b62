"""Federated averaging (McMahan et al. 2017, algorithm 1): the mean of the sites' states, weighted by their images.

Pure functions over a running sum: each update is folded in and can be dropped, so memory does not grow with the sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class RunningSum:
    """Weighted sum of the states so far, in float64, and the weight so far."""

    state: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0


class WeightedMean:
    """FedAvg: sum_i n_i w_i / sum_i n_i with n_i the images of site i."""

    def fold(self, total: RunningSum, state: Mapping[str, Tensor], examples: int) -> None:
        """Add one site's state."""
        for name, value in state.items():
            term = value.double() * examples
            total.state[name] = total.state[name].add_(term) if name in total.state else term
        total.weight += examples

    def finish(self, total: RunningSum, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean in the dtypes of ``reference``; keys, shapes and dtypes are kept."""
        return {name: (total.state[name] / total.weight).to(value.dtype) for name, value in reference.items()}
