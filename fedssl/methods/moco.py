"""MoCo v2 (He et al. 2020; Chen, Fan et al. 2020): negatives from a queue of keys made by a slow copy of the network.

Keys are made of patients' images: the queue never leaves the site and starts each round empty. Until it holds keys,
the other images of the batch are the negatives.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require
from fedssl.momentum import SlowCopy
from fedssl.queues import Queue


def info_nce(
    queries: Float[Tensor, "batch width"],
    keys: Float[Tensor, "batch width"],
    negatives: Float[Tensor, "negatives width"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean of -log exp(q.k+ / T) / (exp(q.k+ / T) + sum_negatives exp(q.k- / T)) (He et al., equation 1).

    Args:
        queries: of unit length.
        keys: the positive of each query, of unit length.
        negatives: of unit length; without any, the keys of the other queries.
        temperature: T.
    """
    if len(negatives) == 0:
        return F.cross_entropy(queries @ keys.T / temperature, torch.arange(len(queries), device=queries.device))
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))


class MoCo(Method):
    """Encoder and projector, their slow copy, and the queue.

    Args:
        encoder: maps views to features.
        hidden: width of the projector's hidden layer, which has no BatchNorm.
        width: of the projections.
        temperature: T.
        queue_length: keys kept.
        momentum: of the slow copy.
        seed: of the initial head.
    """

    couples = "each image is compared with a queue of embeddings of other patients, which carry no noise"
    shared = ("encoder.", "projector.")
    terms = ("contrastive",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        hidden: int,
        width: int,
        temperature: float,
        queue_length: int,
        momentum: float,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        require(
            temperature=(temperature, temperature > 0),
            momentum=(momentum, 0 <= momentum <= 1),
            queue_length=(queue_length, queue_length >= 0),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width], norm="none")
        self.target = SlowCopy(encoder, self.projector)
        self.queue = Queue(queue_length, width)
        self.temperature = temperature
        self.momentum = momentum

    def begin_round(self) -> None:
        """Start the slow copy from the shared weights and empty the queue."""
        self.target.follow(self.encoder, self.projector, momentum=0.0)
        self.queue.clear()

    def begin_step(self, progress: float) -> None:  # noqa: ARG002 - the momentum does not change
        """Let the slow copy follow before it makes keys."""
        self.target.follow(self.encoder, self.projector, momentum=self.momentum)

    def loss(self, batch: ViewBatch) -> Loss:
        """Match the first view (query) with the second (key); then queue the keys."""
        (queries,) = project(self.encoder, self.projector, batch.views[:1])
        with torch.no_grad():
            (keys,) = project(self.target[0], self.target[1], batch.views[1:2])
        with full_precision(queries):
            queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
            contrastive = info_nce(queries, keys, self.queue.held(), temperature=self.temperature)
        self.queue.add(keys)
        return Loss(contrastive, {"contrastive": contrastive.detach()})
