"""ReLIC (Mitrovic et al. 2021, arXiv 2010.07922): InfoNCE, and similarities to others that do not depend on the view.

The target network is a slow copy that stays at the site and starts each round from the shared weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require
from fedssl.momentum import SlowCopy, rising_momentum


def log_similarity(
    online: Float[Tensor, "batch width"], target: Float[Tensor, "batch width"], *, temperature: float
) -> Float[Tensor, "batch batch"]:
    """Log p_i(j) = log softmax_j(cos(online_i, target_j) / tau)."""
    return F.log_softmax(F.normalize(online, dim=1) @ F.normalize(target, dim=1).T / temperature, dim=1)


def instance_discrimination(
    forward: Float[Tensor, "batch batch"], backward: Float[Tensor, "batch batch"]
) -> Float[Tensor, ""]:
    """Mean of -log p_i(i) over images and both directions."""
    return -(forward.diagonal().mean() + backward.diagonal().mean()) / 2.0


def divergence(log_p: Float[Tensor, "batch batch"], log_q: Float[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    """KL(p || sg q), the mean over rows, from log-probabilities; the gradient goes through p only."""
    return (log_p.exp() * (log_p - log_q.detach())).sum(1).mean()


class ReLIC(Method):
    """Encoder, projector and predictor, and the slow copy of the first two.

    Args:
        encoder: maps views to features.
        hidden: width of the hidden layers of projector and predictor.
        width: of the projections.
        temperature: tau.
        invariance_weight: alpha.
        momentum: of the slow copy at the start; it rises to 1 over the federation.
        seed: of the initial heads.
    """

    couples = "each image is compared with all others of the batch"
    shared = ("encoder.", "projector.", "predictor.")
    terms = ("contrastive", "invariance")

    def __init__(
        self,
        encoder: nn.Module,
        *,
        hidden: int,
        width: int,
        temperature: float,
        invariance_weight: float,
        momentum: float,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        require(
            temperature=(temperature, temperature > 0),
            momentum=(momentum, 0 <= momentum <= 1),
            invariance_weight=(invariance_weight, invariance_weight >= 0),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width])
            self.predictor = projector([width, hidden, width])
        self.target = SlowCopy(encoder, self.projector)
        self.temperature = temperature
        self.invariance_weight = invariance_weight
        self.momentum = momentum

    def begin_round(self) -> None:
        """Start the slow copy from the shared weights."""
        self.target.follow(self.encoder, self.projector, momentum=0.0)

    def begin_step(self, progress: float) -> None:
        """Let the slow copy follow the last step."""
        momentum = rising_momentum(self.momentum, progress)
        self.target.follow(self.encoder, self.projector, momentum=momentum)

    def loss(self, batch: ViewBatch) -> Loss:
        """Tell images apart from either view, with equal probabilities."""
        pair = batch.views[:2]
        first, second = project(self.encoder, nn.Sequential(self.projector, self.predictor), pair)
        with torch.no_grad():
            slow_first, slow_second = project(self.target[0], self.target[1], pair)
        with full_precision(first):
            forward = log_similarity(first, slow_second, temperature=self.temperature)
            backward = log_similarity(second, slow_first, temperature=self.temperature)
            contrastive = instance_discrimination(forward, backward)
            invariance = (divergence(forward, backward) + divergence(backward, forward)) / 2.0
        terms = {"contrastive": contrastive.detach(), "invariance": invariance.detach()}
        return Loss(contrastive + self.invariance_weight * invariance, terms)
