"""What private steps cost: epsilon by the PRV accountant (Gopi et al. 2021, arXiv 2106.02848), as Opacus implements it.

Adjacency is adding or removing one patient. Each step draws every patient with the same probability, independently.
"""

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from fedssl.errors import ConfigError, PrivacyError

_BEYOND = 100.0  # of epsilon: nothing is promised any more, and PRV would want minutes and gigabytes; RDP bounds it
_PRECISION, _STRIDE = 1e-3, 0.05  # of the logarithm of the noise
_LEAST_SIGMA, _LARGEST_SIGMA = 0.25, 1e4  # less noise promises nothing and makes the accountant slow

_HOPELESS = (
    "privacy.epsilon={epsilon:g} cannot be kept over {steps} steps at rate {rate:g} with useful noise. Raise it, or "
    "lower federation.rounds, privacy.steps or privacy.batch."
)


@dataclass(frozen=True)
class Spend:
    """Some equal steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        sigma: standard deviation of the noise, in units of what one patient can change (the joint one of all releases).
        rate: probability that a patient is drawn in a step.
        steps: how many.
    """

    sigma: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse what has no meaning, wherever it was read.

        Raises:
            PrivacyError: names it.
        """
        if not (0.0 < self.sigma < math.inf and 0.0 < self.rate < 1.0 and self.steps >= 0):
            raise PrivacyError(
                f"A spend of {self.steps} steps at noise {self.sigma:g} and rate {self.rate:g} has no meaning: noise "
                "must be above 0 and the rate between 0 and 1."
            )


def joint_sigma(sigmas: Iterable[float]) -> float:
    """Noise of several Gaussian releases of the same sample, taken as one: (sum_i sigma_i^-2)^(-1/2).

    A later release may depend on an earlier one (adaptive composition of Gaussian mechanisms, Dong et al. 2022,
    corollary 3.3). Entered into an accountant one by one, each with a sample of its own, they would cost too little.
    """
    return sum(sigma**-2 for sigma in sigmas) ** -0.5


def shared_out(sigma: float, shares: Iterable[float]) -> list[float]:
    """Noise of each release, where ``sigma`` is that of all and release i has the share f_i: sigma / sqrt(f_i)."""
    return [sigma / math.sqrt(share) for share in shares]


def merged(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Add up equal steps: the accountant slows down with the number of different ones."""
    steps: dict[tuple[float, float], int] = {}
    for spend in spends:
        steps[spend.sigma, spend.rate] = steps.get((spend.sigma, spend.rate), 0) + spend.steps
    return tuple(Spend(sigma, rate, count) for (sigma, rate), count in sorted(steps.items()) if count)


def epsilon_of(spends: Iterable[Spend], delta: float) -> float:
    """Upper bound of epsilon for all spends together at ``delta``; 0 where nothing was spent."""
    return _epsilon(merged(spends), delta)


@functools.lru_cache(maxsize=1024)
def _epsilon(spends: tuple[Spend, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    if not spends:
        return 0.0
    history = [(spend.sigma, spend.rate, spend.steps) for spend in spends]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms in a branch that is not taken
        loose = RDPAccountant()
        loose.history = history
        bound = float(loose.get_epsilon(delta))
        if not bound < _BEYOND:
            return bound
        accountant = PRVAccountant()
        accountant.history = history
        try:
            return float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise PrivacyError(
                f"The accountant cannot count {sum(spend.steps for spend in spends)} steps at delta {delta:g} "
                f"({type(error).__name__}). Use a larger privacy.delta or fewer steps; nothing was spent."
            ) from error


@functools.lru_cache(maxsize=256)
def planned_sigma(*, epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Smallest noise, to about .1 %, with which ``steps`` steps stay within (``epsilon``, ``delta``).

    Raises:
        ConfigError: no usable noise does.
    """
    from scipy.optimize import brentq

    def excess(log_sigma: float) -> float:
        return math.log(_epsilon((Spend(math.exp(log_sigma), rate, steps),), delta) / epsilon)

    low = high = _guess(epsilon, delta, rate, steps)
    if high > math.log(_LARGEST_SIGMA):
        raise ConfigError(_HOPELESS.format(epsilon=epsilon, steps=steps, rate=rate))
    while excess(high) > 0.0:
        low, high = high, high + _STRIDE
        if high > math.log(_LARGEST_SIGMA):
            raise ConfigError(_HOPELESS.format(epsilon=epsilon, steps=steps, rate=rate))
    while low > math.log(_LEAST_SIGMA) and excess(low) <= 0.0:
        low, high = max(low - _STRIDE, math.log(_LEAST_SIGMA)), low
    found = high if excess(low) <= 0.0 else brentq(excess, low, high, xtol=_PRECISION)
    while excess(found) > 0.0:
        found += 0.2 * _PRECISION
    return math.exp(found)


def _guess(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Logarithm of about the noise that is needed, by the central limit (Bu et al. 2020, arXiv 1911.11607, theorem 5).

    mu = rate sqrt(steps (exp(sigma^-2) - 1)); delta(epsilon) = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2).
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    def gap(log_mu: float) -> float:
        mu = math.exp(log_mu)
        far = norm.logcdf(-epsilon / mu - mu / 2.0) + epsilon
        return float(norm.cdf(-epsilon / mu + mu / 2.0) - math.exp(far)) - delta

    mu = math.exp(brentq(gap, math.log(1e-4 * epsilon), math.log(epsilon + 40.0)))
    sigma = math.log1p(mu**2 / (rate**2 * steps)) ** -0.5
    return math.log(max(sigma, _LEAST_SIGMA))
