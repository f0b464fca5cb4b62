"""What the batches of a round say together of the clusters: mass, use, and how many patients stand behind each."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedssl.data.batches import ViewBatch
from fedssl.data.modality import MODALITIES
from fedssl.prototypes import Clusters, counts_by_group

_MOST_PAIRS = 256  # batches; then each pair is kept once


@dataclass
class ClusterSums:
    """Running sums on the device; nothing here leaves the site but what the agent picks.

    Attributes:
        mass: [prototypes] soft number of samples assigned to each.
        usage: [modalities, prototypes] samples of each modality nearest to each.
        entropy: sum of the batches' mean code entropy.
        batches: how many were added.
        pairs: patient x prototypes + prototype, of each batch, for every sample whose patient is known.
    """

    mass: Float[Tensor, " prototypes"] | None = None
    usage: Float[Tensor, "modalities prototypes"] | None = None
    entropy: Tensor | None = None
    batches: int = 0
    pairs: list[Tensor] = field(default_factory=list)

    def add(self, clusters: Clusters, batch: ViewBatch) -> None:
        """Add one batch, without waiting for the device."""
        count = len(clusters.mass)
        usage = counts_by_group(clusters.nearest, batch.modality, num_groups=len(MODALITIES), num_prototypes=count)
        self.mass = clusters.mass if self.mass is None else self.mass + clusters.mass
        self.usage = usage if self.usage is None else self.usage + usage
        self.entropy = clusters.code_entropy if self.entropy is None else self.entropy + clusters.code_entropy
        self.batches += 1
        if batch.patient is not None:
            self.pairs.append((batch.patient * count + clusters.nearest)[clusters.nearest >= 0])
            if len(self.pairs) > _MOST_PAIRS:
                self.pairs = [torch.cat(self.pairs).unique()]

    def support(self) -> Int[Tensor, " prototypes"]:
        """Count, on the CPU, the patients with a sample nearest to each prototype."""
        assert self.mass is not None
        count = len(self.mass)
        pairs = torch.cat(self.pairs) if self.pairs else self.mass.new_empty(0).long()
        return count_patients(pairs % count, pairs // count, count)


def count_patients(
    nearest: Int[Tensor, " samples"], patient: Int[Tensor, " samples"], prototypes: int
) -> Int[Tensor, " prototypes"]:
    """Count, on the CPU, the patients with a sample nearest to each prototype."""
    return torch.bincount((patient * prototypes + nearest).unique() % prototypes, minlength=prototypes).cpu()
