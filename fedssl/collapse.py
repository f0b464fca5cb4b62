"""Signs that an encoder has collapsed, and the sentence that says so."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def rank_me(features: Float[Tensor, "samples width"]) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023, eq. 1).

    Features are centred first: after a rectifier their common mean would hide every other direction.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def diagnose(metrics: Mapping[str, float], *, num_prototypes: int, width: int, samples: int) -> list[str]:
    """Return one sentence for each sign of collapse in a site's round metrics; none means healthy.

    Args:
        metrics: ``clustering`` (swapped-prediction loss), ``effective_prototypes`` and ``rankme``, those that exist.
        num_prototypes: K, or those of a block where blocks do not compete.
        width: of the features.
        samples: images behind ``rankme``.
    """
    signs = []
    uniform = math.log(max(num_prototypes, 2))
    if metrics.get("clustering", 0.0) >= 0.99 * uniform:
        signs.append(
            f"the clustering loss {metrics['clustering']:.3f} stands at ln K = {uniform:.3f}: codes carry nothing"
        )
    floor = max(2.0, 0.02 * num_prototypes)
    if metrics.get("effective_prototypes", floor) < floor:
        signs.append(f"{metrics['effective_prototypes']:.1f} of {num_prototypes} prototypes are in use")
    floor = max(2.0, 0.02 * min(width, samples))
    if metrics.get("rankme", floor) < floor:
        signs.append(f"features span {metrics['rankme']:.1f} of {width} dimensions (RankMe)")
    return signs
