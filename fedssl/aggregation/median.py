"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, algorithm 1, option I).

Less than half of the sites, whatever they send, cannot move a weight beyond what the others sent. All sites count the
same: a number of images is a claim.
"""

from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import State
from fedssl.aggregation.spool import Gathering, Spool


class Median(Gathering):
    """The middle value of each weight; of an even number of sites the mean of the middle two. Remembers nothing."""

    least_sites = 3  # of two, one moves the median as it likes

    def finish(
        self,
        total: Spool,
        reference: State,
        memory: State,  # noqa: ARG002 - a median has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the median.

        Raises:
            FederationError: fewer than three sites answered.
        """
        self.require(total, "a median that holds off one hostile site", "Add sites, or choose aggregation=mean.")
        return total.combine(median, reference), {}


def median(block: Float[Tensor, "sites columns"]) -> Float[Tensor, " columns"]:
    """Return the middle value of each column, or the mean of the middle two."""
    sites = len(block)
    ordered = block.sort(0).values  # nan is last, so that it counts as the largest
    low, high = ordered[(sites - 1) // 2], ordered[sites // 2]
    return (low / 2 + high / 2).clamp(low, high)  # half of each: their sum may overflow
