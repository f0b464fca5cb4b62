"""Adaptive server optimisers, FedAdam and FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    d = sum_i n_i w_i / sum_i n_i - w        the sites' mean move
    m = beta1 m + (1 - beta1) d
    v = beta2 v + (1 - beta2) d^2                        Adam
    v = v - (1 - beta2) d^2 sign(v - d^2)                Yogi
    w = w + rate m / (sqrt(v) + tau)

At the start m = 0 and v = tau^2. There is no bias correction, as in the paper.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import Aggregator, RunningSum, State
from fedssl.errors import ConfigError

_FIRST, _SECOND = "first/", "second/"


class _Adaptive(Aggregator):
    """What Adam and Yogi share. Remembers ``first/<name>`` and ``second/<name>``, the moments, in float64.

    Args:
        rate: of the server's step; the paper's best lie between 10^-2 and 10^-1.5 at tau 10^-3.
        beta1: share of the first moment that the next round keeps, 0 up to but not 1.
        beta2: share of the second moment that the next round keeps, 0 up to but not 1.
        tau: how large a typical move is; far smaller ones are not scaled up.

    Raises:
        ConfigError: a value makes no sense.
    """

    def __init__(self, rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        for key, value in (("rate", rate), ("tau", tau)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"aggregation.{key}={value} must be above 0.")
        for key, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ConfigError(f"aggregation.{key}={value} must be at least 0 and below 1.")
        self.rate = rate
        self.beta1 = beta1
        self.beta2 = beta2
        self.tau = tau

    @abstractmethod
    def second_moment(self, second: Float[Tensor, "*shape"], move: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return v after a round from v before it and the round's move d."""

    def finish(self, total: RunningSum, reference: State, memory: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the server's step; the memory is both moments after it."""
        state: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, value in reference.items():
            before = value.double()
            move = total.mean(name) - before
            first = memory.get(_FIRST + name, torch.zeros_like(before))
            first = self.beta1 * first + (1 - self.beta1) * move
            second = memory.get(_SECOND + name, torch.full_like(before, self.tau**2))
            second = self.second_moment(second, move)
            state[name] = adaptive_step(before, first, second, self.rate, self.tau).to(value.dtype)
            moments |= {_FIRST + name: first, _SECOND + name: second}
        return state, moments


class ServerAdam(_Adaptive):
    """FedAdam: the second moment forgets old rounds at one pace."""

    def second_moment(self, second: Float[Tensor, "*shape"], move: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return beta2 v + (1 - beta2) d^2."""
        return self.beta2 * second + (1 - self.beta2) * move.square()


class ServerYogi(_Adaptive):
    """FedYogi: the second moment falls slowly after a round of large moves, so steps do not jump."""

    def second_moment(self, second: Float[Tensor, "*shape"], move: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return v - (1 - beta2) d^2 sign(v - d^2)."""
        square = move.square()
        return second - (1 - self.beta2) * square * torch.sign(second - square)


def adaptive_step(
    before: Float[Tensor, "*shape"],
    first: Float[Tensor, "*shape"],
    second: Float[Tensor, "*shape"],
    rate: float,
    tau: float,
) -> Float[Tensor, "*shape"]:
    """Return w + rate m / (sqrt(v) + tau)."""
    return before + rate * first / (second.sqrt() + tau)
