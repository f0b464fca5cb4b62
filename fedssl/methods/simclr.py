"""SimCLR (Chen et al. 2020): two views of an image attract, all other images of the batch repel.

With ``pairing=patient`` the two views come from two images of a patient: MICLe (Azizi et al. 2021, section 3.2).
"""

import torch
from torch import nn

from fedssl.contrastive import nt_xent
from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.methods.base import Loss, Method, full_precision, project, projector, require


class SimCLR(Method):
    """Encoder and projector.

    Args:
        encoder: maps views to features.
        hidden: width of the projector's hidden layer.
        width: of the projections.
        temperature: T of NT-Xent.
        seed: of the initial head.
    """

    couples = "NT-Xent compares each image with all others of the batch"
    shared = ("encoder.", "projector.")
    terms = ("contrastive",)

    def __init__(self, encoder: nn.Module, *, hidden: int, width: int, temperature: float, seed: int = 0) -> None:
        super().__init__(encoder)
        require(temperature=(temperature, temperature > 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.projector = projector([feature_width(encoder), hidden, width])
        self.temperature = temperature

    def loss(self, batch: ViewBatch) -> Loss:
        """Contrast the first two views."""
        first, second = project(self.encoder, self.projector, batch.views[:2])
        with full_precision(first):
            contrastive = nt_xent(first, second, temperature=self.temperature)
        return Loss(contrastive, {"contrastive": contrastive.detach()})
