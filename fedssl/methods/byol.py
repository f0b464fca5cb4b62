"""BYOL (Grill et al. 2020): predict what a slow copy of the network makes of the other view; no negatives.

The slow copy stays at the site and starts each round from the shared weights.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, full_precision, project, projector, require
from fedssl.methods.separable import Points, SeparableMethod
from fedssl.momentum import SlowCopy, rising_momentum


def regression(prediction: Float[Tensor, "batch width"], target: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """Mean of 2 - 2 cos(prediction, target), from 0 to 4 (equation 2)."""
    return 2.0 - 2.0 * F.cosine_similarity(prediction, target, dim=1).mean()


class BYOL(SeparableMethod):
    """Encoder, projector, predictor, and the slow copy of the first two.

    Args:
        encoder: maps views to features.
        hidden: width of the hidden layers of projector and predictor.
        width: of the projections.
        momentum: of the slow copy at the start; it rises to 1 over the federation.
        norm: of the heads' hidden layers: ``batch`` as in the paper, or ``layer``, which private training needs.
        seed: of the initial heads.
    """

    shared = ("encoder.", "projector.", "predictor.")
    terms = ("regression",)
    highest_loss = 8.0

    def __init__(
        self, encoder: nn.Module, *, hidden: int, width: int, momentum: float, norm: str = "batch", seed: int = 0
    ) -> None:
        super().__init__(encoder)
        require(momentum=(momentum, 0 <= momentum <= 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width], norm=norm)
            self.predictor = projector([width, hidden, width], norm=norm)
        self.target = SlowCopy(encoder, self.projector)
        self.momentum = momentum

    def begin_round(self) -> None:
        """Start the slow copy from the shared weights."""
        self.target.follow(self.encoder, self.projector, momentum=0.0)

    def begin_step(self, progress: float) -> None:
        """Let the slow copy follow the last step."""
        momentum = rising_momentum(self.momentum, progress)
        self.target.follow(self.encoder, self.projector, momentum=momentum)

    def loss(self, batch: ViewBatch) -> Loss:
        """Predict each of the first two views from the other; the sum of both directions."""
        pair = batch.views[:2]
        first, second = project(self.encoder, nn.Sequential(self.projector, self.predictor), pair)
        with torch.no_grad():
            slow_first, slow_second = project(self.target[0], self.target[1], pair)
        with full_precision(first):
            total = regression(first, slow_second) + regression(second, slow_first)
        return Loss(total, {"regression": total.detach()})

    def points(self, view: Float[Tensor, "rows channels edge edge"]) -> Float[Tensor, "rows width"]:
        """Predictions and the slow copy's projections, side by side."""
        prediction = self.predictor(self.projector(self.encoder(view)))
        with torch.no_grad():
            slow = self.target(view)
        return torch.cat([prediction, slow], dim=1)

    def patient_loss(self, points: Points, present: Bool[Tensor, " images"]) -> Float[Tensor, ""]:
        """Regress the slow projection of each of the first two views from the prediction of the other."""
        with full_precision(points[0]):
            (first, slow_first), (second, slow_second) = (point.float().chunk(2, dim=1) for point in points[:2])
            cosines = F.cosine_similarity(first, slow_second, dim=1) + F.cosine_similarity(second, slow_first, dim=1)
            weights = present.float() / present.float().sum().clamp_min(1.0)
            return (weights * (4.0 - 2.0 * cosines)).sum()
