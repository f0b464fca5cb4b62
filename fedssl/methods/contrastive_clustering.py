"""Contrastive learning with online clustering: NT-Xent over the global views + swapped prediction over all views.

Ghesu et al. 2022 (arXiv 2201.01283) cluster online with trainable prototypes and Sinkhorn-Knopp as SwAV does; the
NT-Xent term (Chen et al. 2020) keeps features from collapsing on the few thousand images of a small consortium, where
clustering alone failed in every setting tried.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.clustering import POOLED, Equipartition
from fedssl.contrastive import nt_xent
from fedssl.data.batches import ViewBatch
from fedssl.data.modality import MODALITIES
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require
from fedssl.prototypes import observe, renormalise, swapped_prediction


class ContrastiveClustering(Method):
    """Encoder, projector and K unit-length prototypes.

    Args:
        encoder: maps views to features.
        num_prototypes: K.
        hidden: width of the projector's hidden layer.
        width: of the projections and prototypes.
        contrastive_temperature: T of NT-Xent.
        clustering_temperature: tau of swapped prediction.
        epsilon: entropy of Sinkhorn's codes.
        iterations: of Sinkhorn.
        contrastive_weight: weight of NT-Xent in the sum.
        clustering_weight: weight of swapped prediction in the sum.
        modalities: see ``fedssl.clustering.Equipartition``.
        blocks: likewise.
        seed: of the initial head and prototypes.
    """

    couples = "NT-Xent compares each image with all others of the batch, and Sinkhorn balances the whole batch"
    shared = ("encoder.", "projector.", "prototypes")
    terms = ("contrastive", "clustering")
    weighs_contrast = True

    def __init__(  # noqa: PLR0913 - the settings of the paper, plain and named
        self,
        encoder: nn.Module,
        *,
        num_prototypes: int,
        hidden: int,
        width: int,
        contrastive_temperature: float,
        clustering_temperature: float,
        epsilon: float,
        iterations: int,
        contrastive_weight: float = 1.0,
        clustering_weight: float = 1.0,
        modalities: str = POOLED,
        blocks: Sequence[str] = MODALITIES,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        require(
            num_prototypes=(num_prototypes, num_prototypes >= 2),
            contrastive_temperature=(contrastive_temperature, contrastive_temperature > 0),
            clustering_temperature=(clustering_temperature, clustering_temperature > 0),
            contrastive_weight=(contrastive_weight, contrastive_weight >= 0),
            clustering_weight=(clustering_weight, clustering_weight >= 0),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width])
            self.prototypes = nn.Parameter(renormalise(torch.randn(num_prototypes, width)))
        self.contrastive_temperature = contrastive_temperature
        self.clustering_temperature = clustering_temperature
        self.equipartition = Equipartition(epsilon, iterations, modalities, tuple(blocks))
        self.num_blocks = self.equipartition.num_blocks(num_prototypes)
        self.epsilon, self.equipartitions = epsilon, modalities == POOLED
        self.contrastive_weight = contrastive_weight
        self.clustering_weight = clustering_weight

    def loss(self, batch: ViewBatch) -> Loss:
        """Contrast the first two views, swap the codes of these two among all."""
        projections = project(self.encoder, self.projector, batch.views)
        with full_precision(projections[0]):
            points = [F.normalize(projection, dim=1) for projection in projections]
            scores = [point @ self.prototypes.T for point in points]
            contrastive = nt_xent(points[0], points[1], temperature=self.contrastive_temperature)
            codes, allowed = self.equipartition(scores[:2], batch.modality, marginal=self.marginal)
            tau = self.clustering_temperature
            clustering = swapped_prediction(scores, codes, temperature=tau, allowed=allowed)
        return Loss(
            self.contrast * self.contrastive_weight * contrastive + self.clustering_weight * clustering,
            {"contrastive": contrastive.detach(), "clustering": clustering.detach()},
            observe(scores[:2], codes, temperature=tau, allowed=allowed),
        )

    def prototype_scores(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch prototypes"]:
        """Return the cosine between the projections of features and each prototype."""
        return F.normalize(self.projector(features), dim=1) @ self.prototypes.T

    def after_step(self) -> None:
        """Put the prototypes back on the unit sphere."""
        self.prototypes.data.copy_(renormalise(self.prototypes.data))
