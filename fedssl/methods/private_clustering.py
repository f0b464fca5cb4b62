"""Clustering that can be trained with differential privacy: swapped prediction with potentials in place of Sinkhorn.

In-batch Sinkhorn couples all patients of a batch. Its column step needs only the sum of the codes: patients vote with
their mean code, the noised sum moves one potential a prototype (a step on the semi-dual of optimal transport, Genevay
et al. 2016, arXiv 1605.08527), and codes are softmax((score + potential) / epsilon) of released values. The codes of
a step use the votes of the same step. Without BatchNorm the projections drift to one point and codes carry nothing:
patients also vote on the centre that is subtracted from all (as DINO does with its outputs, Caron et al. 2021, section
3.1). docs/design/0008 has the measurements. Without noise it is an ordinary method.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, full_precision, projector, require
from fedssl.methods.separable import Points, SeparableMethod
from fedssl.prototypes import observe, renormalise, swapped_prediction

_LEAST_SHARE, _LARGEST_POTENTIAL = 0.1, 1.0


class PrivateClustering(SeparableMethod):
    """Encoder, projector with LayerNorm, K unit-length prototypes, their potentials, and the centre of the points.

    Args:
        encoder: maps views to features.
        num_prototypes: K.
        hidden: width of the projector's hidden layer.
        width: of the projections and prototypes.
        temperature: tau of swapped prediction.
        epsilon: entropy of the codes.
        rate: of the potentials (a).
        centring: share of the way that the centre goes in a step; 0: it stays at the origin.
        seed: of the initial head and prototypes.
    """

    shared = ("encoder.", "projector.", "prototypes", "potentials", "centre")
    terms = ("clustering",)

    def __init__(  # noqa: PLR0913 - the settings of the method, plain and named
        self,
        encoder: nn.Module,
        *,
        num_prototypes: int,
        hidden: int,
        width: int,
        temperature: float,
        epsilon: float,
        rate: float,
        centring: float,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        require(
            num_prototypes=(num_prototypes, num_prototypes >= 2),
            temperature=(temperature, temperature > 0),
            epsilon=(epsilon, epsilon > 0),
            rate=(rate, 0 <= rate <= 2),
            centring=(centring, 0 <= centring <= 1),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width], norm="layer")
            self.prototypes = nn.Parameter(renormalise(torch.randn(num_prototypes, width)))
        self.potentials = nn.Parameter(torch.zeros(num_prototypes), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.temperature, self.epsilon, self.rate, self.centring = temperature, epsilon, rate, centring
        self.num_votes, self.vote_bound = num_prototypes + width, math.sqrt(2.0 - 1.0 / num_prototypes)
        self.highest_loss = 2.0 * math.log(num_prototypes)

    def points(self, view: Float[Tensor, "rows channels edge edge"]) -> Float[Tensor, "rows width"]:
        """Project each row to the unit sphere."""
        projected = self.projector(self.encoder(view))
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)

    def scores(self, points: Points) -> list[Float[Tensor, "images prototypes"]]:
        """Cosine of each centred point to each prototype, by view."""
        return [F.normalize(point - self.centre, dim=1) @ self.prototypes.T for point in points]

    def codes(self, scores: Float[Tensor, "images prototypes"]) -> Float[Tensor, "images prototypes"]:
        """Soft codes softmax((score + potential) / epsilon), without gradient."""
        return F.softmax((scores.detach() + self.potentials) / self.epsilon, dim=1)

    def vote(self, points: Points, present: Bool[Tensor, " images"]) -> Float[Tensor, " votes"]:
        """Mean code of the patient's assigning views less an equal share, and the way from the centre to their mean.

        The norm of the first is at most sqrt(1 - 1 / K), the second is clipped to 1.
        """
        with torch.no_grad(), full_precision(points[0]):
            code = torch.stack([self.codes(scores) for scores in self.scores(points[:2])]).mean(0)
            way = _weights(present) @ torch.stack(list(points[:2])).mean(0) - self.centre
            way = way / torch.linalg.vector_norm(way).clamp_min(1.0)
            return torch.cat([_weights(present) @ code - 1.0 / len(self.potentials), way])

    @torch.no_grad()
    def take_votes(self, mean: Float[Tensor, " votes"]) -> None:
        """Move potentials and centre.

        One damped column step of Sinkhorn, v <- v - a epsilon log(K max(1/K + mean, .1/K)), centred; and a share of the
        way to the mean point. At rest the sum of the ways is 0, however many patients there really are.
        """
        count = len(self.potentials)
        share = (1.0 / count + mean[:count]).clamp_min(_LEAST_SHARE / count)
        moved = self.potentials - self.rate * self.epsilon * torch.log(count * share)
        self.potentials.copy_((moved - moved.mean()).clamp(-_LARGEST_POTENTIAL, _LARGEST_POTENTIAL))
        self.centre.add_(mean[count:], alpha=self.centring)

    def patient_loss(self, points: Points, present: Bool[Tensor, " images"]) -> Float[Tensor, ""]:
        """Swapped prediction of the first two views' codes from all other views."""
        with full_precision(points[0]):
            scores = self.scores(points)
            shares = (len(present) * _weights(present))[:, None]
            codes = [shares * self.codes(view) for view in scores[:2]]
            return swapped_prediction(scores, codes, temperature=self.temperature)

    def loss(self, batch: ViewBatch) -> Loss:
        """The same without noise, on a batch of any images: votes first, then the loss."""
        points = self.embed(batch.views)
        present = torch.ones(len(points[0]), dtype=torch.bool, device=points[0].device)
        self.take_votes(self.vote(points, present))
        total = self.patient_loss(points, present)
        with torch.no_grad(), full_precision(points[0]):
            scores = self.scores(points[:2])
            codes, assigned = [self.codes(view) for view in scores], [view + self.potentials for view in scores]
            clusters = observe(assigned, codes, temperature=self.temperature)
        return Loss(total, {"clustering": total.detach()}, clusters)

    def prototype_scores(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch prototypes"]:
        """Return the cosine between the projections of features and each prototype."""
        return self.scores([F.normalize(self.projector(features), dim=1)])[0]

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "rows channels edge edge"]) -> None:
        """Centre and scale the projector's outputs on public images: untrained ones all point the same way."""
        last = self.projector[-1]
        assert isinstance(last, nn.Linear)
        outputs = self.projector(self.encoder(images.to(last.weight.device)))
        scale = outputs.std(0).clamp_min(1e-6)
        last.weight.div_(scale[:, None])
        last.bias.copy_((last.bias - outputs.mean(0)) / scale)

    def after_step(self) -> None:
        """Put the prototypes back on the unit sphere."""
        self.prototypes.data.copy_(renormalise(self.prototypes.data))


def _weights(present: Bool[Tensor, " images"]) -> Float[Tensor, " images"]:
    """Weight of each row in a mean over the images that are there."""
    return present.float() / present.float().sum().clamp_min(1.0)
