"""FedEMA (Zhuang et al. 2022, arXiv 2204.04385, equations 1 to 3): a site keeps a share of its own last weights.

w = mu w_own + (1 - mu) w_received with mu = min(lambda ||w_received - w_own||, 1): the further the site is from the
others, the more it stays itself. lambda = tau / ||w_received - w_own||, measured once, the second time that the site
takes part. The distance is that of the encoders. Prototypes are always the server's: index k means one cluster.
"""

import torch

from fedssl.errors import ConfigError
from fedssl.local.base import LocalRule, State

_ENCODER, _PROTOTYPES = "encoder.", "prototypes"
_NEAR = 1e-5  # a distance, in norms of the weights, that is none


class FedEMA(LocalRule):
    """Divergence-aware moving average of the site's own weights.

    Args:
        tau: mu of the round in which lambda is measured; the paper's .7.
    """

    remembers = True

    def __init__(self, tau: float) -> None:
        if not 0.0 <= tau <= 1.0:
            raise ConfigError(f"local.tau={tau} must lie between 0 (plain) and 1 (keep the site's own weights).")
        self.tau = tau

    @torch.no_grad()
    def begin(self, received: State, own: State | None, scale: float | None) -> tuple[State, float | None]:
        """Mix own and received weights; ``scale`` is lambda."""
        if own is None:
            return received, None
        distance = _distance(received, own)
        if scale is None and distance <= _NEAR * _distance(received, {}):
            return received, None  # nobody else took part: lambda would be without bounds
        scale = self.tau / distance if scale is None else scale
        share = min(scale * distance, 1.0)
        return {
            name: value if name == _PROTOTYPES else share * own[name] + (1.0 - share) * value
            for name, value in received.items()
        }, scale


def _distance(received: State, own: State) -> float:
    """||w_received - w_own|| over the encoder; what ``own`` lacks counts as 0."""
    squares = [
        float((value.double() - own[name].double() if name in own else value.double()).square().sum())
        for name, value in received.items()
        if name.startswith(_ENCODER)
    ]
    return sum(squares) ** 0.5
