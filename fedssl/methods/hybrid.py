"""Hybrid training (Ghesu et al. 2022): any self-supervised method plus a supervised loss where a site has labels.

L = (1 - w) L_self-supervised + w L_supervised. A batch without labels has the self-supervised loss alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.errors import ConfigError
from fedssl.methods.base import Loss, Method, full_precision


def _refuse_unusable(classes: Sequence[str | int], weight: float) -> None:
    names = list(classes) if not isinstance(classes, str) else []
    texts = {str(name) for name in names if isinstance(name, str | int) and not isinstance(name, bool)}
    if len(names) < 2 or len(texts) != len(names):
        raise ConfigError(
            f"method.classes={classes} must list at least two different labels as they stand in the table; put quotes "
            "around true, false, yes and no: ['true', 'false']."
        )
    if not 0.0 <= weight <= 1.0:
        raise ConfigError(f"method.weight={weight} must lie between 0 (self-supervised) and 1 (supervised).")


class Hybrid(Method):
    """A method, and a linear classifier of the encoder's features.

    Args:
        base: the self-supervised method; its encoder is trained.
        classes: labels to learn, equal at all sites; images with other labels or none have no supervised loss.
        weight: w, from 0 (the base method bit for bit) to 1 (supervised alone where there are labels).
        seed: of the initial classifier.
    """

    couples = "it learns from labels of single images, for which there is no private form here"

    def __init__(self, base: Method, *, classes: Sequence[str | int], weight: float, seed: int = 0) -> None:
        super().__init__(base.encoder)
        _refuse_unusable(classes, weight)
        if base.num_prototypes:
            self.prototypes = base.prototypes
        self.base = base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self.classifier = nn.Linear(feature_width(base.encoder), len(classes))
        self.classes = tuple(str(name) for name in classes)
        self.weight = weight
        self.shared = (*base.shared, *(f"base.{name}" for name in base.shared), "classifier.")
        self.terms = (*base.terms, "supervised")
        self.num_blocks, self.weighs_contrast = base.num_blocks, base.weighs_contrast
        self.epsilon, self.equipartitions = base.epsilon, base.equipartitions

    def begin_round(self) -> None:
        """Let the base method begin."""
        self.base.contrast, self.base.marginal = self.contrast, self.marginal
        self.base.begin_round()

    def begin_step(self, progress: float) -> None:
        """Let the base method get ready."""
        self.base.begin_step(progress)

    def loss(self, batch: ViewBatch) -> Loss:
        """Add the cross-entropy of the first view of the labelled images."""
        plain = self.base.loss(batch)
        labelled = batch.label >= 0
        if self.weight == 0.0 or not bool(labelled.any()):
            return replace(plain, terms={**plain.terms, "supervised": torch.zeros_like(plain.total.detach())})
        logits = self.classifier(self.encoder(batch.views[0][labelled]))
        with full_precision(logits):
            supervised = F.cross_entropy(logits.float(), batch.label[labelled])
        total = (1.0 - self.weight) * plain.total + self.weight * supervised
        return replace(plain, total=total, terms={**plain.terms, "supervised": supervised.detach()})

    def after_step(self) -> None:
        """Let the base method restore what it must."""
        self.base.after_step()

    def prototype_scores(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch prototypes"]:
        """Return the base method's similarity of features to each prototype."""
        return self.base.prototype_scores(features)
