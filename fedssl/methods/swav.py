"""SwAV (Caron et al. 2020): predict a view's cluster code from the other views; nothing else keeps features apart.

On the few thousand images of a small consortium others saw it collapse in every setting (docs/experiments.md); for that
reason ``contrastive_clustering`` is the default. The queue is made of patients' images: it never leaves the site and
starts each round empty.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.clustering import POOLED, Equipartition, Memory
from fedssl.data.batches import ViewBatch
from fedssl.data.modality import MODALITIES
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require
from fedssl.prototypes import observe, renormalise, swapped_prediction
from fedssl.queues import Queue


class SwAV(Method):
    """Encoder, projector, K unit-length prototypes, and a queue for each assigning view.

    Args:
        encoder: maps views to features.
        num_prototypes: K.
        hidden: width of the projector's hidden layer.
        width: of the projections and prototypes.
        temperature: tau of the prediction.
        epsilon: entropy of Sinkhorn's codes.
        iterations: of Sinkhorn.
        queue_length: earlier projections that take part in the codes, for batches smaller than K; 0: none.
        frozen: share of the federation's steps, from its start, in which the prototypes do not move.
        modalities: see ``fedssl.clustering.Equipartition``.
        blocks: likewise.
        seed: of the initial head and prototypes.
    """

    couples = "Sinkhorn balances the codes of the whole batch"
    shared = ("encoder.", "projector.", "prototypes")
    terms = ("clustering",)

    def __init__(  # noqa: PLR0913 - the settings of the paper, plain and named
        self,
        encoder: nn.Module,
        *,
        num_prototypes: int,
        hidden: int,
        width: int,
        temperature: float,
        epsilon: float,
        iterations: int,
        queue_length: int = 0,
        frozen: float = 0.0,
        modalities: str = POOLED,
        blocks: Sequence[str] = MODALITIES,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        require(
            num_prototypes=(num_prototypes, num_prototypes >= 2),
            temperature=(temperature, temperature > 0),
            queue_length=(queue_length, queue_length >= 0),
            frozen=(frozen, 0 <= frozen <= 1),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width])
            self.prototypes = nn.Parameter(renormalise(torch.randn(num_prototypes, width)))
        self.temperature = temperature
        self.equipartition = Equipartition(epsilon, iterations, modalities, tuple(blocks))
        self.num_blocks = self.equipartition.num_blocks(num_prototypes)
        self.epsilon, self.equipartitions = epsilon, modalities == POOLED
        self.queues = [Queue(queue_length, width + 1) for _ in range(2)]  # the last column: modality
        self.held = nn.ModuleList(self.queues)
        self.frozen = frozen
        self.progress = 1.0

    def begin_round(self) -> None:
        """Empty the queues: their projections come from other weights."""
        for queue in self.queues:
            queue.clear()

    def begin_step(self, progress: float) -> None:
        """Remember whether the prototypes are still frozen."""
        self.progress = progress

    def loss(self, batch: ViewBatch) -> Loss:
        """Swap the codes of the first two views among all; then queue their projections."""
        projections = project(self.encoder, self.projector, batch.views)
        with full_precision(projections[0]):
            points = [F.normalize(projection, dim=1) for projection in projections]
            prototypes = self.prototypes.detach() if self.progress < self.frozen else self.prototypes
            scores = [point @ prototypes.T for point in points]
            memory = [self._recall(place) for place in range(2)]
            codes, allowed = self.equipartition(scores[:2], batch.modality, memory, self.marginal)
            clustering = swapped_prediction(scores, codes, temperature=self.temperature, allowed=allowed)
        for place, point in enumerate(points[:2]):
            self._remember(place, point.detach(), batch.modality[place])
        return Loss(
            clustering,
            {"clustering": clustering.detach()},
            observe(scores[:2], codes, temperature=self.temperature, allowed=allowed),
        )

    @torch.no_grad()
    def _recall(self, place: int) -> Memory:
        held = self.queues[place].held()
        return Memory(held[:, :-1] @ self.prototypes.T, held[:, -1].long())

    def _remember(self, place: int, points: Float[Tensor, "batch width"], modality: Int[Tensor, " batch"]) -> None:
        self.queues[place].add(torch.cat([points, modality[:, None].to(points.dtype)], 1))

    def prototype_scores(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch prototypes"]:
        """Return the cosine between the projections of features and each prototype."""
        return F.normalize(self.projector(features), dim=1) @ self.prototypes.T

    def after_step(self) -> None:
        """Put the prototypes back on the unit sphere."""
        self.prototypes.data.copy_(renormalise(self.prototypes.data))
