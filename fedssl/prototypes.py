"""Prototypes, Sinkhorn-Knopp codes and swapped prediction (SwAV, Caron et al. 2020, section 3; Cuturi 2013)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "batch prototypes"], *, epsilon: float, iterations: int
) -> Float[Tensor, "batch prototypes"]:
    """Soft codes Q whose rows sum to one and whose columns tend to batch / prototypes (equipartition).

    Computed in float32 or better from log-values: exp(1 / 0.05) overflows half precision.

    Args:
        scores: similarity of each sample to each prototype.
        epsilon: entropy of the transport plan; smaller is harder.
        iterations: three do not equipartition, a hundred do.
    """
    log_q = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def swapped_prediction(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    codes: Sequence[Float[Tensor, "batch prototypes"]],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Predict the code of each assigning view from every other view (SwAV, equation 2 with multi-crop).

    L_a = 1 / (V - 1) sum_{v != a} mean_b -sum_k codes_a log softmax(scores_v / temperature); the mean over a.

    Args:
        scores: one per view; the first ``len(codes)`` views are those that assign.
        codes: one per assigning view, without gradient.
        temperature: tau.
    """
    log_p = [F.log_softmax(view / temperature, dim=1) for view in scores]
    losses = [
        -(code * log_p[other]).sum(1).mean()
        for assigner, code in enumerate(codes)
        for other in range(len(scores))
        if other != assigner
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def assignment_mass(
    scores: Sequence[Float[Tensor, "batch prototypes"]], *, temperature: float
) -> Float[Tensor, " prototypes"]:
    """Soft number of samples assigned to each prototype: sum_b softmax(scores_b / temperature), the mean over views."""
    return torch.stack([F.softmax(view / temperature, dim=1).sum(0) for view in scores]).mean(0)


@torch.no_grad()
def nearest_counts(scores: Sequence[Float[Tensor, "batch prototypes"]]) -> Float[Tensor, " prototypes"]:
    """Number of samples nearest to each prototype, the mean over the views."""
    prototypes = scores[0].shape[1]
    return torch.stack([torch.bincount(view.argmax(1), minlength=prototypes) for view in scores]).float().mean(0)


@torch.no_grad()
def perplexity(mass: Float[Tensor, " prototypes"]) -> float:
    """Effective number of prototypes: exp of the entropy of their share of the samples (1 to K)."""
    share = mass.double() / mass.double().sum().clamp_min(1e-12)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


@torch.no_grad()
def renormalise(prototypes: Float[Tensor, "prototypes width"]) -> Float[Tensor, "prototypes width"]:
    """Scale every prototype to length one."""
    return F.normalize(prototypes, dim=1)
