"""NT-Xent, the loss of SimCLR (Chen et al. 2020, equation 1)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def nt_xent(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"], *, temperature: float
) -> Float[Tensor, ""]:
    """Mean over 2N anchors of -log exp(s_ij / T) / sum_{k != i} exp(s_ik / T), s the cosine similarity.

    Args:
        first: projections of one view of each image.
        second: projections of another view of the same images, in the same order.
        temperature: T.
    """
    batch = len(first)
    points = F.normalize(torch.cat([first, second]), dim=1)
    similarity = points @ points.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    partner = torch.arange(2 * batch, device=first.device).roll(batch)
    return F.cross_entropy(similarity, partner)
