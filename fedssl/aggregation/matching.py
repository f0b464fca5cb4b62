"""Prototypes of a site that trained by itself: their order is its own, so they are matched before they are averaged.

Only for such a site. With a shared start index k means the same cluster everywhere, and matching is worse than trusting
the index (docs/experiments.md, shared starts that drift). The assignment is that of Kuhn (1955), the Hungarian method.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from fedssl.methods.base import PROTOTYPES
from fedssl.update import Update

SIMILAR = 0.5  # cosine below which two prototypes are not the same cluster


def match(
    own: Float[Tensor, "prototypes width"],
    reference: Float[Tensor, "prototypes width"],
    *,
    held: Bool[Tensor, " prototypes"] | None = None,
    similar: float = SIMILAR,
) -> tuple[Int[Tensor, " prototypes"], Bool[Tensor, " prototypes"]]:
    """Find the order of ``own`` with the largest sum of cosines to ``reference``.

    Cosines below ``similar`` count as 0: a cluster that only one side has must not push others from their places.

    Args:
        own: prototypes to be put in order.
        reference: whose order counts.
        held: those of ``own`` that count; None: all.
        similar: cosine of one and the same cluster.

    Returns:
        For each reference prototype its partner among ``own``, and whether their cosine is at least ``similar``.
    """
    cosine = F.normalize(reference.double(), dim=1) @ F.normalize(own.double(), dim=1).T
    cosine = cosine if held is None else cosine.where(held, -1.0)
    rows, columns = linear_sum_assignment(cosine.where(cosine >= similar, 0.0).numpy(), maximize=True)
    partner = torch.from_numpy(columns).long()
    return partner, cosine[torch.from_numpy(rows).long(), partner] >= similar


def aligned(update: Update, reference: Float[Tensor, "prototypes width"]) -> Update:
    """Put a site's prototypes, mass and use in the reference's order; one without a partner has no mass and no say.

    A prototype that the site withheld came back as it was sent: it must not take the place of one of its own.
    """
    assert update.mass is not None
    assert update.usage is not None
    partner, similar = match(update.state[PROTOTYPES], reference, held=update.mass > 0)
    prototypes = torch.where(similar[:, None], update.state[PROTOTYPES][partner], reference)
    return replace(
        update,
        state={**update.state, PROTOTYPES: prototypes},
        mass=update.mass[partner] * similar,
        usage=update.usage[partner] * similar,
    )
