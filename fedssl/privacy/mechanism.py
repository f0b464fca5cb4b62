"""One private step: three noised sums over the same sample, which cost as much as one Gaussian release.

Of every drawn patient: its vote on the prototypes (L2 norm at most S), its gradient (clipped to C), its loss (clipped
to one). Each sum gets Gaussian noise; the noise of all three together is that of one release with ``sigma``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.privacy.accounting import Spend, shared_out
from fedssl.privacy.randomness import standard_normal

_ROUNDING = 1e-5  # of a float32 sum of squares over 10^8 numbers, relative


@dataclass(frozen=True)
class Mechanism:
    """Public constants of the private steps: nothing here is computed from the site's patients.

    Attributes:
        sigma: noise of a step as one release, in units of one patient's bound.
        rate: probability that a patient is drawn in a step (q).
        batch: expected patients in a step (B), by which sums are divided.
        steps: of a round.
        clip: L2 norm to which a patient's gradient is clipped (C).
        vote_share: share of the budget that the votes on prototypes take.
        loss_share: share that the loss figure takes.
        images: most images of a patient in a step.
    """

    sigma: float
    rate: float
    batch: float
    steps: int
    clip: float
    vote_share: float
    loss_share: float
    images: int

    def __post_init__(self) -> None:
        """Refuse shares that would leave the gradients too little noise, whoever made them."""
        assert min(self.vote_share, self.loss_share) > 0.0
        assert self.vote_share + self.loss_share < 1.0
        assert min(self.batch, self.steps, self.images, self.clip) > 0

    @property
    def vote_sigma(self) -> float:
        """Noise of the votes, in units of their bound."""
        return shared_out(self.sigma, [self.vote_share])[0]

    @property
    def loss_sigma(self) -> float:
        """Noise of the loss, in units of its bound."""
        return shared_out(self.sigma, [self.loss_share])[0]

    @property
    def gradient_sigma(self) -> float:
        """Noise of the gradients, in units of the clip."""
        return shared_out(self.sigma, [1.0 - self.vote_share - self.loss_share])[0]

    @property
    def spend(self) -> Spend:
        """What a round costs."""
        return Spend(self.sigma, self.rate, self.steps)


def released(total: Float[Tensor, "..."], *, bound: float, sigma: float) -> Float[Tensor, "..."]:
    """Add Gaussian noise of ``sigma`` times ``bound`` to a sum of which one patient changes at most ``bound``.

    Noise is drawn and added in float64 and the result is rounded to float32, far coarser than the grid of the noise:
    what is released does not show on which grid the sum lay (Mironov 2012).

    Args:
        total: the sum over the drawn patients; zeros where none was drawn.
        bound: L2 norm of what one patient adds at most.
        sigma: noise in units of ``bound``.
    """
    noise = standard_normal(total.numel()).reshape(total.shape).mul_(sigma * bound)
    return noise.to(total.device).add_(total).to(torch.float32)


def clipped(value: Float[Tensor, "..."], bound: float) -> Float[Tensor, "..."]:
    """Scale to an L2 norm of at most ``bound``; what is not finite adds nothing."""
    norm = (1.0 + _ROUNDING) * float(torch.linalg.vector_norm(value, dtype=torch.float64))
    return value * clip_factor(norm, bound) if norm < float("inf") else torch.zeros_like(value)


def clip_factor(norm: float, bound: float) -> float:
    """Factor that brings a vector of this L2 norm to ``bound`` if it is longer; 0 where the norm is not finite."""
    if not norm < float("inf"):
        return 0.0
    return min(1.0, bound / norm) if norm > 0.0 else 1.0


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm of all gradients together, never too small: summed by halves in float32, rounded up by what that lacks.

    (``torch.dot`` and ``vector_norm`` add up in one long row: measured 6e-3 too small on a layer of ResNet-18.)
    """
    squares = sum(float(part.float().square().sum()) for part in gradients)
    return (1.0 + _ROUNDING) * squares**0.5
