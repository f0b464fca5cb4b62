"""Barlow Twins (Zbontar et al. 2021): equal features in both views, and no two features that say the same."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require


def cross_correlation(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"]
) -> Float[Tensor, "width width"]:
    """C = BN(first)^T BN(second) / N without affine weights (equation 2; BatchNorm's epsilon is 1e-5)."""
    normalised = [F.batch_norm(view, None, None, training=True) for view in (first, second)]
    return normalised[0].T @ normalised[1] / len(first)


def invariance(correlation: Float[Tensor, "width width"]) -> Float[Tensor, ""]:
    """sum_i (1 - C_ii)^2, the first term of equation 1."""
    return (1.0 - correlation.diagonal()).square().sum()


def redundancy(correlation: Float[Tensor, "width width"]) -> Float[Tensor, ""]:
    """sum_{i != j} C_ij^2, the second term of equation 1 before its weight."""
    return correlation.square().sum() - correlation.diagonal().square().sum()


class BarlowTwins(Method):
    """Encoder and a wide projector of three layers.

    Args:
        encoder: maps views to features.
        hidden: width of the projector's two hidden layers.
        width: of the projections; wide is better (section 4.4).
        redundancy_weight: lambda.
        seed: of the initial head.
    """

    couples = "its correlation matrix is made of the whole batch"
    shared = ("encoder.", "projector.")
    terms = ("invariance", "redundancy")

    def __init__(self, encoder: nn.Module, *, hidden: int, width: int, redundancy_weight: float, seed: int = 0) -> None:
        super().__init__(encoder)
        require(redundancy_weight=(redundancy_weight, redundancy_weight >= 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, hidden, width])
        self.redundancy_weight = redundancy_weight

    def loss(self, batch: ViewBatch) -> Loss:
        """Compare the first two views."""
        first, second = project(self.encoder, self.projector, batch.views[:2])
        with full_precision(first):
            correlation = cross_correlation(first, second)
            same, other = invariance(correlation), redundancy(correlation)
        terms = {"invariance": same.detach(), "redundancy": other.detach()}
        return Loss(same + self.redundancy_weight * other, terms)
