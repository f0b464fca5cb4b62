"""FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): a pull back to the weights that the server sent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedssl.errors import ConfigError
from fedssl.local.base import LocalRule


class Proximal(LocalRule):
    """Adds the gradient of (mu / 2) ||w - w_received||^2, over the shared parameters.

    Args:
        mu: weight of the term; 0 is plain training.
    """

    def __init__(self, mu: float) -> None:
        if not 0.0 <= mu < float("inf"):
            raise ConfigError(f"local.mu={mu} must be 0 or above; .001 to 1 is usual.")
        self.mu = mu

    @torch.no_grad()
    def correct(self, parameters: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Add mu (w - w_received) to each gradient; a parameter without one is not trained and stays."""
        for parameter, start in zip(parameters, received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)
