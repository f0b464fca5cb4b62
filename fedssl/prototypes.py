"""Prototypes, Sinkhorn-Knopp codes and swapped prediction (SwAV, Caron et al. 2020, section 3; Cuturi 2013)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

_DEAD_SHARE, _RESEED_STEP = 0.1, 0.3
_BARRED = -1e4  # finite, so that a code of 0 times its logarithm is 0


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "batch prototypes"],
    *,
    epsilon: float,
    iterations: int,
    marginal: Float[Tensor, " prototypes"] | None = None,
) -> Float[Tensor, "batch prototypes"]:
    """Soft codes Q whose rows sum to one and whose columns tend to batch / prototypes (equipartition).

    Computed in float32 or better from log-values: exp(1 / 0.05) overflows half precision.

    Args:
        scores: similarity of each sample to each prototype.
        epsilon: entropy of the transport plan; smaller is harder.
        iterations: three do not equipartition, a hundred do.
        marginal: share of the samples that each column shall hold, above 0; None: 1 / prototypes each.
    """
    log_q = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
    # A factor common to all columns drops out with the rows, so equal shares are exactly the plain form.
    wanted = 0.0 if marginal is None else (marginal.log() - marginal.log().max()).to(log_q.dtype)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) + wanted
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
def nearest(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    *,
    allowed: Sequence[Bool[Tensor, "batch prototypes"]] | None = None,
) -> Int[Tensor, "views batch"]:
    """Number of the prototype nearest to each sample, view by view; -1 where it may belong to none (``allowed``)."""
    if allowed is None:
        return torch.stack([view.argmax(1) for view in scores])
    found = [bar(view, mask).argmax(1).where(mask.any(1), -1) for view, mask in zip(scores, allowed, strict=True)]
    return torch.stack(found)


@torch.no_grad()
def counts_by_group(
    numbers: Int[Tensor, "views batch"], groups: Int[Tensor, "views batch"], *, num_groups: int, num_prototypes: int
) -> Float[Tensor, "groups prototypes"]:
    """Count, for each group of samples, those nearest to each prototype; the mean over the views.

    Args:
        numbers: as ``nearest`` gives them; -1 is not counted.
        groups: of each sample.
        num_groups: rows of the table.
        num_prototypes: columns of the table.
    """
    cells = (groups * num_prototypes + numbers)[numbers >= 0]
    counts = torch.bincount(cells, minlength=num_groups * num_prototypes).float()
    return (counts / len(numbers)).reshape(num_groups, num_prototypes)


@dataclass(frozen=True)
class Clusters:
    """What a batch says of the clusters, beside the loss.

    Attributes:
        mass: soft number of samples assigned to each prototype.
        nearest: prototype nearest to each sample of both assigning views, -1: none.
        code_entropy: mean entropy of the codes, in nats; 0: each sample has one prototype, ln K: codes carry nothing.
    """

    mass: Float[Tensor, " prototypes"]
    nearest: Int[Tensor, "views batch"]
    code_entropy: Float[Tensor, ""]


@torch.no_grad()
def observe(
    scores: Sequence[Float[Tensor, "batch prototypes"]],
    codes: Sequence[Float[Tensor, "batch prototypes"]],
    *,
    temperature: float,
    allowed: Sequence[Bool[Tensor, "batch prototypes"]] | None = None,
) -> Clusters:
    """Take the figures of one batch from the scores and codes of its assigning views."""
    entropy = -torch.stack([torch.special.xlogy(code, code).sum(1).mean() for code in codes]).mean()
    mass = assignment_mass(scores, temperature=temperature, allowed=allowed)
    return Clusters(mass, nearest(scores, allowed=allowed), entropy)


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
