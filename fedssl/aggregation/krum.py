"""Krum and multi-Krum (Blanchard et al. 2017, "Machine learning with adversaries", section 4).

Of n sites at most f are hostile. The score of a site is the sum of its squared distances to its n - f - 2 nearest
others; a hostile state far from the honest ones has a high score, however many hostile ones lie beside it. Krum takes
the state with the lowest score, multi-Krum the mean of the m lowest. All sites count the same.
"""

import functools
import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import State
from fedssl.aggregation.spool import Gathering, Spool
from fedssl.errors import ConfigError


class Krum(Gathering):
    """Takes the states that lie among the others. Remembers nothing.

    Args:
        hostile: f, sites to hold off; 2 f + 3 must answer.
        keep: m, states to average; f + 2 more must answer. 1 is Krum.

    Raises:
        ConfigError: a value is no whole number above 0.
    """

    def __init__(self, hostile: int = 1, keep: int = 1) -> None:
        for key, value in (("hostile", hostile), ("keep", keep)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"aggregation.{key}={value} must be a whole number of at least 1.")
        self.hostile = hostile
        self.keep = keep
        self.least_sites = max(2 * hostile + 3, hostile + 2 + keep)

    def finish(
        self,
        total: Spool,
        reference: State,
        memory: State,  # noqa: ARG002 - Krum has none
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean of the chosen states.

        Raises:
            FederationError: too few sites answered.
        """
        what = f"Krum with aggregation.hostile={self.hostile} and aggregation.keep={self.keep}"
        self.require(total, what, "Lower aggregation.hostile or aggregation.keep, or add sites.")
        distances = torch.zeros(total.sites, total.sites, dtype=torch.float64)
        for block in total.blocks():
            distances += squared_distances(block)
        chosen = _ranked(scores(distances, self.hostile), total)[: self.keep]
        return total.combine(_mean, reference, chosen), {}


def squared_distances(block: Float[Tensor, "sites columns"]) -> Float[Tensor, "sites sites"]:
    """Return the squared distance of each pair of rows; what cannot be computed is infinitely far."""
    distances = torch.zeros(len(block), len(block), dtype=torch.float64)
    for one, other in itertools.combinations(range(len(block)), 2):
        square = (block[one] - block[other]).square().sum()
        distances[one, other] = distances[other, one] = math.inf if square.isnan() else square
    return distances


def scores(distances: Float[Tensor, "sites sites"], hostile: int) -> list[float]:
    """Return each site's sum of squared distances to its n - f - 2 nearest others; low is central."""
    nearest = len(distances) - hostile - 2
    rows = ([*row[:site], *row[site + 1 :]] for site, row in enumerate(distances.tolist()))
    return [sum(sorted(row)[:nearest]) for row in rows]


def _ranked(score: list[float], spool: Spool) -> list[int]:
    """Sort sites by score; of equal ones that with the smaller value at the first weight that differs comes first.

    Without this rule the order of the sites would decide.
    """

    def compare(one: int, other: int) -> int:
        if score[one] != score[other]:
            return -1 if score[one] < score[other] else 1
        for first, second in spool.blocks([one, other]):
            differ = (first != second).nonzero()
            if len(differ):
                return -1 if first[differ[0]] < second[differ[0]] else 1
        return 0

    return sorted(range(len(score)), key=functools.cmp_to_key(compare))


def _mean(block: Float[Tensor, "sites columns"]) -> Float[Tensor, " columns"]:
    return (block / len(block)).sum(0)
