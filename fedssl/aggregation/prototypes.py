"""Prototypes of several sites become one set: by index, weighted by assignment mass, renormalised.

All sites start a round from the same prototypes, so index k means the same cluster everywhere. A site that has no
images of cluster k moves prototype k by noise only: weighting by the mass n_{site,k} that the site assigned keeps this
noise out. A prototype without mass stays as it was.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_NOTHING = 1e-6  # the length of a mean that has no direction


@dataclass
class PrototypeSum:
    """Mass-weighted sum of the sites' prototypes so far, [prototypes, width] and [prototypes], in float64."""

    weighted: Float[Tensor, "prototypes width"] | None = None
    mass: Float[Tensor, " prototypes"] | None = None


def fold(
    total: PrototypeSum, prototypes: Float[Tensor, "prototypes width"], mass: Float[Tensor, " prototypes"]
) -> None:
    """Add one site's prototypes."""
    term = F.normalize(prototypes.double(), dim=1) * mass.double()[:, None]
    total.weighted = term if total.weighted is None else total.weighted.add_(term)
    total.mass = mass.double().clone() if total.mass is None else total.mass.add_(mass.double())


def finish(
    total: PrototypeSum, previous: Float[Tensor, "prototypes width"]
) -> tuple[Float[Tensor, "prototypes width"], float | None]:
    """Return the new unit-length prototypes and the mass-weighted mean length before renormalising.

    A length near 1 says that the sites agree on their clusters; below about 0.7 they drift apart. It is None where no
    prototype has mass.
    """
    assert total.weighted is not None
    assert total.mass is not None
    mean = total.weighted / total.mass.clamp_min(1e-300)[:, None]
    lengths = mean.norm(dim=1)
    alive = (total.mass > 0) & (lengths > _NOTHING)
    agreement = float((lengths * total.mass).sum() / total.mass.sum()) if bool(alive.any()) else None
    kept = F.normalize(previous.double(), dim=1)
    return torch.where(alive[:, None], F.normalize(mean, dim=1), kept).to(previous.dtype), agreement
