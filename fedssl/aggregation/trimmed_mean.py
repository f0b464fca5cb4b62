"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, algorithm 1, option II).

Of each weight the ``hostile`` largest and smallest values are dropped and the others averaged, so that as many hostile
sites, whatever they send, cannot move it beyond what the others sent. All sites count the same: a number of images is
a claim.
"""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import State
from fedssl.aggregation.spool import Gathering, Spool
from fedssl.errors import ConfigError


class TrimmedMean(Gathering):
    """The mean without the extremes. Remembers nothing.

    Args:
        hostile: sites to hold off; more than twice as many must answer.

    Raises:
        ConfigError: ``hostile`` is no whole number above 0.
    """

    def __init__(self, hostile: int = 1) -> None:
        if type(hostile) is not int or hostile < 1:
            raise ConfigError(
                f"aggregation.hostile={hostile} must be a whole number of at least 1; "
                "to hold off no site choose aggregation=mean."
            )
        self.hostile = hostile
        self.least_sites = 2 * hostile + 1

    def finish(
        self,
        total: Spool,
        reference: State,
        memory: State,  # noqa: ARG002 - a trimmed mean has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the trimmed mean.

        Raises:
            FederationError: too few sites answered.
        """
        what = f"a trimmed mean with aggregation.hostile={self.hostile}"
        self.require(total, what, "Lower aggregation.hostile, or add sites.")
        return total.combine(partial(trimmed_mean, hostile=self.hostile), reference), {}


def trimmed_mean(block: Float[Tensor, "sites columns"], hostile: int) -> Float[Tensor, " columns"]:
    """Return the mean of each column without its ``hostile`` largest and smallest values."""
    kept = block.sort(0).values[hostile : len(block) - hostile]  # nan is last, so that it counts as the largest
    return (kept / len(kept)).sum(0).clamp(kept[0], kept[-1])  # rounding must not leave the range of the kept
