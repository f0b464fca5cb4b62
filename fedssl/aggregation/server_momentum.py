"""Server momentum, FedAvgM (Hsu et al. 2019, arXiv 1909.06335): the sites' mean is a gradient, the server does SGD.

    d = w - sum_i n_i w_i / sum_i n_i        the pseudo-gradient of the round
    v = momentum v + d
    w = w - rate v                           Nesterov: w = w - rate (d + momentum v)

As in torch.optim.SGD. Momentum 0 and rate 1 give FedAvg. Moves that agree over many rounds grow to
rate / (1 - momentum) times those of FedAvg.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State
from fedssl.errors import ConfigError

_VELOCITY = "momentum/"


class ServerMomentum(Aggregator):
    """FedAvgM. Remembers ``momentum/<name>``, the velocity of each tensor, in float64.

    Args:
        momentum: share of the velocity that the next round keeps, 0 up to but not 1.
        rate: of the server's step.
        nesterov: look one step ahead.

    Raises:
        ConfigError: a value makes no sense.
    """

    def __init__(self, momentum: float = 0.9, rate: float = 1.0, *, nesterov: bool = False) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"aggregation.momentum={momentum} must be at least 0 and below 1.")
        if not 0 < rate < float("inf"):
            raise ConfigError(f"aggregation.rate={rate} must be above 0.")
        self.momentum = momentum
        self.rate = rate
        self.nesterov = nesterov

    def finish(self, total: RunningSum, reference: State, memory: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the server's step; the memory is the velocity after it."""
        state, velocities = {}, {}
        for name, value in reference.items():
            before = value.double()
            velocity = memory.get(_VELOCITY + name, torch.zeros_like(before))
            after, velocities[_VELOCITY + name] = momentum_step(
                before, total.mean(name), velocity, self.momentum, self.rate, nesterov=self.nesterov
            )
            state[name] = after.to(value.dtype)
        return state, velocities


def momentum_step(
    before: Float[Tensor, "*shape"],
    mean: Float[Tensor, "*shape"],
    velocity: Float[Tensor, "*shape"],
    momentum: float,
    rate: float,
    *,
    nesterov: bool,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the weights and the velocity after one step of the server, from those before it and the sites' mean."""
    gradient = before - mean
    velocity = momentum * velocity + gradient
    direction = gradient + momentum * velocity if nesterov else velocity
    return before - rate * direction, velocity
