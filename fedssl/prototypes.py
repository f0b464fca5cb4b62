"""Prototypes, Sinkhorn-Knopp codes and swapped prediction (SwAV, Caron et al. 2020, section 3; Cuturi 2013)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

_DEAD_SHARE, _RESEED_STEP = 0.1, 0.3
_BARRED = -1e4  # finite, so that a code of 0 times its logarithm is 0


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
    allowed: Sequence[Bool[Tensor, "batch prototypes"]] | None = None,
) -> Float[Tensor, ""]:
    """Predict the code of each assigning view from every other view (SwAV, equation 2 with multi-crop).

    L_a = 1 / (V - 1) sum_{v != a} mean_b -sum_k codes_a log softmax(scores_v / temperature); the mean over a.

    Args:
        scores: one per view; the first ``len(codes)`` views are those that assign.
        codes: one per assigning view, without gradient.
        temperature: tau.
        allowed: for each assigning view, the prototypes that its images may belong to; None: all.
    """
    open_ = [F.log_softmax(view / temperature, dim=1) for view in scores] if allowed is None else []
    losses = []
    for assigner, code in enumerate(codes):
        log_p = open_
        if allowed is not None:
            log_p = [F.log_softmax(bar(view, allowed[assigner]) / temperature, dim=1) for view in scores]
        losses += [-(code * log_p[other]).sum(1).mean() for other in range(len(scores)) if other != assigner]
    return torch.stack(losses).mean()


def bar(
    scores: Float[Tensor, "batch prototypes"], allowed: Bool[Tensor, "batch prototypes"]
) -> Float[Tensor, "batch prototypes"]:
    """Give prototypes that an image may not belong to a score that none reaches, and no gradient."""
    return scores.masked_fill(~allowed, _BARRED)


@torch.no_grad()
def assignment_mass(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    *,
    temperature: float,
    allowed: Sequence[Bool[Tensor, "batch prototypes"]] | None = None,
) -> Float[Tensor, " prototypes"]:
    """Soft number of samples assigned to each prototype: sum_b softmax(scores_b / temperature), the mean over views.

    A sample that may belong to no prototype (``allowed``, as above) counts for none.
    """
    if allowed is None:
        return torch.stack([F.softmax(view / temperature, dim=1).sum(0) for view in scores]).mean(0)
    shares = [
        F.softmax(bar(view, mask) / temperature, dim=1) * mask for view, mask in zip(scores, allowed, strict=True)
    ]
    return torch.stack([share.sum(0) for share in shares]).mean(0)


@torch.no_grad()
def nearest_counts(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    groups: Int[Tensor, "views batch"],
    *,
    num_groups: int,
    allowed: Sequence[Bool[Tensor, "batch prototypes"]] | None = None,
) -> Float[Tensor, "groups prototypes"]:
    """Count, for each group of samples, those nearest to each prototype; the mean over the views.

    A sample that may belong to no prototype (``allowed``, as above) is not counted.
    """
    prototypes, counts = scores[0].shape[1], []
    for place, (view, group) in enumerate(zip(scores, groups, strict=True)):
        mask = torch.ones_like(view, dtype=torch.bool) if allowed is None else allowed[place]
        cell = group * prototypes + bar(view, mask).argmax(1)
        counts.append(torch.bincount(cell[mask.any(1)], minlength=num_groups * prototypes))
    return torch.stack(counts).float().mean(0).reshape(num_groups, prototypes)


@torch.no_grad()
def perplexity(mass: Float[Tensor, " prototypes"]) -> float:
    """Effective number of prototypes: exp of the entropy of their share of the samples (1 to K)."""
    share = mass.double() / mass.double().sum().clamp_min(1e-12)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


@torch.no_grad()
def reseed(
    prototypes: Float[Tensor, "prototypes width"],
    shares: Float[Tensor, "sites prototypes"],
    generator: Generator,
    *,
    blocks: int = 1,
) -> tuple[Float[Tensor, "prototypes width"], int]:
    """Start dead prototypes again beside busy ones, as Lloyd's algorithm splits clusters.

    Dead is who has, at every site, less than a tenth of an equal share of the samples: what a small hospital alone uses
    is alive. Each takes the place of the busiest one (of its block), moved by a random step of 0.3 (an angle of about
    17 degrees) and put back on the sphere; that one then counts as half as busy.

    Args:
        prototypes: of unit length.
        shares: of each site's samples that are nearest to each prototype.
        generator: decides the steps.
        blocks: groups of prototypes, in order, that do not compete.

    Returns:
        The prototypes, and how many start again.
    """
    count = len(prototypes)
    changed, busy = prototypes.clone(), shares.mean(0)
    block = torch.arange(count) * blocks // count
    dead = torch.nonzero(shares.amax(0) < _DEAD_SHARE / count)[:, 0].tolist()
    for number in dead:
        place = int(busy.masked_fill(block != block[number], -1.0).argmax())
        if busy[place] <= 0.0:
            continue  # nobody has images for this block
        step = F.normalize(torch.randn(prototypes.shape[1], generator=generator), dim=0)
        changed[number] = F.normalize(prototypes[place] + _RESEED_STEP * step.to(prototypes.dtype), dim=0)
        busy[place] /= 2.0
    return changed, int((changed != prototypes).any(1).sum())


@torch.no_grad()
def renormalise(prototypes: Float[Tensor, "prototypes width"]) -> Float[Tensor, "prototypes width"]:
    """Scale every prototype to length one."""
    return F.normalize(prototypes, dim=1)
