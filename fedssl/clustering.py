"""Online clustering of several modalities: who competes for which prototypes.

Equipartition over a mixed batch may spend its clusters on telling modalities apart. Beside the plain form there are two
others (Ghesu et al. 2022 train with single- and multi-modality clustering): equipartition inside each modality, and a
block of prototypes for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedssl.data.modality import MODALITIES
from fedssl.errors import ConfigError
from fedssl.prototypes import sinkhorn

POOLED, PER_MODALITY, PARTITIONED = _MODES = "pooled", "per-modality", "partitioned"
Scores = Float[Tensor, "batch prototypes"]


@dataclass(frozen=True)
class Memory:
    """Earlier images of one assigning view, which take part in the equipartition only."""

    scores: Float[Tensor, "held prototypes"]
    modality: Int[Tensor, " held"]


@dataclass(frozen=True)
class Equipartition:
    """Sinkhorn codes (SwAV, Caron et al. 2020, section 3) for one or several modalities.

    Attributes:
        epsilon: entropy of the codes.
        iterations: of Sinkhorn.
        modalities: ``pooled`` (one equipartition), ``per-modality`` (one inside each modality, over all prototypes, so
            that no cluster can stand for a modality) or ``partitioned`` (each modality has prototypes of its own).
        blocks: the modalities that own a block, in order, where ``partitioned``; images of others are not clustered.
    """

    epsilon: float
    iterations: int
    modalities: str = POOLED
    blocks: Sequence[str] = MODALITIES

    def __post_init__(self) -> None:
        """Refuse modes and modalities that do not exist."""
        if self.modalities not in _MODES:
            raise ConfigError(f"method.modalities={self.modalities} does not exist; there are {', '.join(_MODES)}.")
        if not self.blocks or len(set(self.blocks)) != len(self.blocks) or not set(self.blocks) <= set(MODALITIES):
            raise ConfigError(f"method.blocks must name some of {', '.join(MODALITIES)}, each once.")
        if self.epsilon <= 0 or self.iterations < 1:
            raise ConfigError("method.epsilon must be above 0 and method.iterations at least 1.")

    def num_blocks(self, prototypes: int) -> int:
        """Count the groups of prototypes that do not compete.

        Raises:
            ConfigError: there are fewer than two prototypes for each.
        """
        count = len(self.blocks) if self.modalities == PARTITIONED else 1
        if prototypes < 2 * count:
            raise ConfigError(f"{prototypes} prototypes are too few for {count} blocks. Raise heads.num_prototypes.")
        return count

    def __call__(
        self,
        scores: Sequence[Scores],
        modality: Int[Tensor, "2 batch"],
        memory: Sequence[Memory] = (),
        marginal: Float[Tensor, " prototypes"] | None = None,
    ) -> tuple[list[Scores], list[Bool[Tensor, "batch prototypes"]] | None]:
        """Assign one batch.

        Args:
            scores: cosine of the projection of both assigning views to each prototype.
            modality: group of the image behind each of them, a position in ``MODALITIES``.
            memory: one for each assigning view, or none.
            marginal: share of the samples that each prototype shall hold (``pooled`` only); None: equal shares.

        Returns:
            The codes of each assigning view, without gradient, and the prototypes that its images may belong to (None:
            all).
        """
        codes = [
            self.codes(view, groups, memory[place] if memory else None, marginal)
            for place, (view, groups) in enumerate(zip(scores, modality, strict=True))
        ]
        allowed = [self.allowed(groups, scores[0].shape[1]) for groups in modality]
        return codes, allowed if self.modalities == PARTITIONED else None

    def allowed(self, modality: Int[Tensor, " batch"], prototypes: int) -> Bool[Tensor, "batch prototypes"]:
        """Mark which prototypes each image may belong to."""
        if self.modalities != PARTITIONED:
            return torch.ones(len(modality), prototypes, dtype=torch.bool, device=modality.device)
        block_of = torch.full((len(MODALITIES),), -1, device=modality.device)
        for number, name in enumerate(self.blocks):
            block_of[MODALITIES.index(name)] = number
        owner = torch.arange(prototypes, device=modality.device) * len(self.blocks) // prototypes
        return block_of[modality][:, None] == owner[None]

    @torch.no_grad()
    def codes(
        self,
        scores: Scores,
        modality: Int[Tensor, " batch"],
        memory: Memory | None = None,
        marginal: Float[Tensor, " prototypes"] | None = None,
    ) -> Scores:
        """Assign one view: rows sum to one, or to zero where an image may belong to no prototype or is alone.

        The only image of its modality in the batch would get a uniform code, which teaches that it is like nothing.
        """
        every, groups = scores, modality
        if memory is not None:
            every, groups = torch.cat([scores, memory.scores]), torch.cat([modality, memory.modality])
        if self.modalities == POOLED:
            codes = sinkhorn(every, epsilon=self.epsilon, iterations=self.iterations, marginal=marginal)
            return codes[: len(scores)]
        allowed = self.allowed(groups, scores.shape[1])
        codes = torch.zeros_like(every, dtype=torch.promote_types(every.dtype, torch.float32))
        for group in groups.unique():
            rows = (groups == group).nonzero()[:, 0]
            columns = allowed[rows[0]].nonzero()[:, 0]
            if len(columns) and len(rows) > 1:
                part = every[rows[:, None], columns[None]]
                own = sinkhorn(part, epsilon=self.epsilon, iterations=self.iterations)
                codes[rows[:, None], columns[None]] = own.to(codes.dtype)
        return codes[: len(scores)]


@torch.no_grad()
def cluster_information(counts: Float[Tensor, "groups prototypes"]) -> float | None:
    """Normalised mutual information of cluster and group (modality, site): I / min(H(cluster), H(group)).

    0: clusters say nothing of the group; 1: a cluster tells the group. None where fewer than two groups or clusters
    have samples: there is nothing to tell.

    Args:
        counts: samples of each group nearest to each prototype.
    """
    joint = counts.double() / counts.double().sum().clamp_min(1e-12)
    margins = joint.sum(0), joint.sum(1)
    if min(int(margin.count_nonzero()) for margin in margins) < 2:
        return None
    entropies = [float(-torch.special.xlogy(margin, margin).sum()) for margin in margins]
    both = float(-torch.special.xlogy(joint, joint).sum())
    return min(1.0, max(0.0, (sum(entropies) - both) / min(entropies)))
