"""Equipartition over all sites: how much of each prototype a site's own images should fill.

A site that holds some of the clusters and equipartitions its batches over all prototypes must put much of its mass on
prototypes for which it has no image. Here each site c gets a marginal r_c with sum_c (n_c / N) r_c = 1 / K: together
the sites fill all prototypes equally, each with what it has. It is the column target of Sinkhorn-Knopp at the site.

Two ways to it. ``balance`` needs only the mass that each site assigned in its last round (Sinkhorn on the table of
sites and prototypes). Federated Sinkhorn is exact: the sites exchange K column sums an iteration, and every site ends
with its rows of the codes that one Sinkhorn over all images would give (Cuturi 2013; only sums over images travel).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SITE_MARGINALS, FEDERATED_SINKHORN = "site-marginals", "federated-sinkhorn"  # of federation.equipartition
_SMOOTHING = 0.1  # share of equal marginals mixed in, so that a prototype can come (back) to a site
_LEAST = 1e-6  # of an equal share: a prototype whose logarithm stays finite
_BALANCING = 200


@torch.no_grad()
def column_log_sums(
    scores: Float[Tensor, "images prototypes"], potentials: Float[Tensor, " prototypes"] | None, *, epsilon: float
) -> Float[Tensor, " prototypes"]:
    """Log of the mean of each column of a site's codes before the next column step: all that leaves the site.

    Args:
        scores: of the site's images, in float64.
        potentials: of the columns so far; None before the first step, when rows are not normalised yet.
        epsilon: entropy of the codes.
    """
    log_q = scores / epsilon if potentials is None else F.log_softmax(scores / epsilon + potentials, dim=1)
    return log_q.logsumexp(0) - torch.log(torch.tensor(float(len(scores)), dtype=log_q.dtype))


@torch.no_grad()
def column_step(
    potentials: Float[Tensor, " prototypes"] | None,
    log_means: Sequence[Float[Tensor, " prototypes"]],
    images: Sequence[int],
) -> Float[Tensor, " prototypes"]:
    """Make all columns equal over all sites: new potentials from the sites' ``column_log_sums``.

    Args:
        potentials: so far; None before the first step.
        log_means: of each site.
        images: of each site, its weight.
    """
    weights = torch.tensor([float(count) for count in images], dtype=log_means[0].dtype).log()
    total = (torch.stack(list(log_means)) + weights[:, None]).logsumexp(0)
    changed = -total if potentials is None else potentials - total
    return changed - changed.max()  # a common factor drops out with the rows


@torch.no_grad()
def site_marginal(
    scores: Float[Tensor, "images prototypes"], potentials: Float[Tensor, " prototypes"], *, epsilon: float
) -> Float[Tensor, " prototypes"]:
    """Return r_c: the mean of a site's rows of the codes, above 0, sum 1."""
    return _positive(F.softmax(scores / epsilon + potentials, dim=1).mean(0))


@torch.no_grad()
def balance(
    mass: Mapping[str, Float[Tensor, " prototypes"]], images: Mapping[str, int]
) -> dict[str, Float[Tensor, " prototypes"]]:
    """Marginals from the mass that each site assigned to each prototype in its last round, in float64.

    The table of shares [sites, prototypes] is scaled (Sinkhorn) until site c holds n_c / N and every prototype 1 / K; a
    tenth of equal shares is mixed in first. Prototypes that a site withheld count as without mass there.

    Args:
        mass: of each site.
        images: of each site, its weight n_c.
    """
    names = sorted(mass)
    shares = torch.stack([mass[name].double() / mass[name].double().sum().clamp_min(1e-300) for name in names])
    count = shares.shape[1]
    weights = torch.tensor([float(images[name]) for name in names], dtype=torch.float64)
    rows = weights / weights.sum()
    table = rows[:, None] * ((1.0 - _SMOOTHING) * shares + _SMOOTHING / count)
    for _ in range(_BALANCING):
        table = table / table.sum(0) / count
        table = table * (rows / table.sum(1))[:, None]
    return {name: _positive(row / row.sum()) for name, row in zip(names, table, strict=True)}


def _positive(marginal: Float[Tensor, " prototypes"]) -> Float[Tensor, " prototypes"]:
    raised = marginal.clamp_min(_LEAST / len(marginal))
    return raised / raised.sum()
