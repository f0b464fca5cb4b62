"""Probabilities that mean what they say: temperature scaling, reliability, and cutoffs of a given specificity.

Fine-tuning weighs classes as if they were equally frequent. So a logit is evidence for a class, which the temperature
tempers, and ``prior`` gives its frequency back: softmax(logits / temperature + prior).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax

from fedssl.evaluation.finetune import balance
from fedssl.evaluation.metrics import SPECIFICITY
from fedssl.evaluation.targets import Targets

LOWEST, HIGHEST = 0.05, 20.0  # temperatures
_NEVER = 1e-12  # probabilities below count as this one


@dataclass(frozen=True)
class Bin:
    """Images whose score lies above ``low`` and up to ``high``: their mean score, and the share that is positive."""

    low: float
    high: float
    images: int
    score: float
    positive: float


def prior_of(targets: Targets) -> Float[np.ndarray, " outputs"]:
    """Log of what balanced training took away: its weight of each output, undone (Elkan 2001, theorem 2).

    Zero for classes or findings that are equally frequent, and for findings that only one value is known of. A class
    without images has a number as if it had one image, which says nothing.
    """
    return -np.log(balance(targets))


def probabilities(
    logits: Float[np.ndarray, "images outputs"],
    temperature: float,
    *,
    exclusive: bool,
    prior: Float[np.ndarray, " outputs"] | None = None,
) -> Float[np.ndarray, "images outputs"]:
    """Softmax (classes) or sigmoid (findings) of logits / temperature + prior (default 0), in double precision."""
    tempered = _tempered(logits, temperature, prior)
    return softmax(tempered, axis=1) if exclusive else expit(tempered)


def with_prior(
    scores: Float[np.ndarray, "images outputs"], prior: Float[np.ndarray, " outputs"], *, exclusive: bool
) -> Float[np.ndarray, "images outputs"]:
    """Give probabilities of balanced training the frequencies back: softmax(log p + prior), sigmoid(logit p + prior).

    A class of probability 0 keeps it: the labelled images lack it, and ``prior_of`` is then an arbitrary number.

    Args:
        scores: probabilities.
        prior: see ``prior_of``.
        exclusive: of classes, else of findings.
    """
    inside = scores.astype(np.float64).clip(_NEVER, 1 - _NEVER)
    if not exclusive:
        return expit(logit(inside) + prior)
    return softmax(np.where(scores > 0, np.log(inside) + prior, -np.inf), axis=1)


def _tempered(
    logits: Float[np.ndarray, "images outputs"], temperature: float, prior: Float[np.ndarray, " outputs"] | None
) -> Float[np.ndarray, "images outputs"]:
    return logits.astype(np.float64) / temperature + (0.0 if prior is None else prior)


def negative_log_likelihood(
    logits: Float[np.ndarray, "images outputs"],
    targets: Targets,
    temperature: float,
    prior: Float[np.ndarray, " outputs"] | None = None,
) -> float:
    """Mean negative log-likelihood in nats; of findings over the values that are known. NaN where none is."""
    tempered = _tempered(logits, temperature, prior)
    if targets.exclusive:
        return float(-log_softmax(tempered, axis=1)[np.arange(len(tempered)), targets.classes].mean())
    known = ~np.isnan(targets.values)
    truth, tempered = targets.values[known], tempered[known]
    return float((np.logaddexp(0.0, tempered) - truth * tempered).mean()) if len(truth) else math.nan


def fit_temperature(
    logits: Float[np.ndarray, "images outputs"],
    targets: Targets,
    prior: Float[np.ndarray, " outputs"] | None = None,
) -> float:
    """Fit the one temperature that makes the labels most likely (Guo et al. 2017, section 4.2).

    The order of two images by a finding, or by one of two classes, does not depend on it; without a prior the likeliest
    class does not either.

    Args:
        logits: of images that the model was not trained on.
        targets: of the same images.
        prior: see ``prior_of``.

    Returns:
        A number from 0.05 to 20, never worse than 1; 1 where no value is known.
    """
    if np.isnan(targets.values).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, targets, math.exp(log_temperature), prior)

    found = minimize_scalar(loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def reliability(scores: Float[np.ndarray, "images outputs"], targets: Targets, bins: int = 10) -> list[Bin]:
    """Compare scores with what is true, in bins of equal width over all scored outputs together; empty ones left out.

    Args:
        scores: probabilities.
        targets: of the same images.
        bins: how many.
    """
    columns = targets.scored
    truth, score = targets.values[:, columns].ravel(), scores[:, columns].ravel()
    known = ~np.isnan(truth)
    truth, score = truth[known], score[known]
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.digitize(score, edges[1:-1], right=True)
    found = []
    for number in np.unique(place):
        here = place == number
        low, high = float(edges[number]), float(edges[number + 1])
        found.append(Bin(low, high, int(here.sum()), float(score[here].mean()), float(truth[here].mean())))
    return found


def cutoffs(scores: Float[np.ndarray, "images outputs"], targets: Targets) -> list[float]:
    """Find the lowest cutoff of each scored output above which at most 5 % of its negative images lie.

    "Positive" is what lies above, so that sensitivity is that of ``metrics.sensitivity_at_95_specificity``; one half
    where no negative image is known.
    """
    found = []
    for output in targets.scored:
        negative = np.sort(scores[targets.values[:, output] == 0, output])[::-1]
        allowed = math.floor((1 - SPECIFICITY) * len(negative) + 1e-9)
        found.append(float(negative[allowed]) if len(negative) else 0.5)
    return found


def as_written(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Round to nine significant digits, so that a number read from a file compares as it did here."""
    return np.array([float(f"{value:.9g}") for value in values.ravel()]).reshape(values.shape)


def decide(
    scores: Float[np.ndarray, "images outputs"], names: Sequence[str], limits: Mapping[str, float], *, exclusive: bool
) -> dict[str, list[str]]:
    """Turn probabilities into words, by column: ``decision``, or ``NAME decision`` of each finding.

    Args:
        scores: probabilities.
        names: of the outputs.
        limits: cutoff by name, see ``cutoffs``.
        exclusive: classes (of two, the second above its cutoff; of more, the likeliest); else findings (1 or 0).
    """
    if not exclusive:
        above = {name: scores[:, column] > limits[name] for column, name in enumerate(names)}
        return {f"{name} decision": mask.astype(int).astype(str).tolist() for name, mask in above.items()}
    place = (scores[:, 1] > limits[names[1]]).astype(int) if len(names) == 2 else scores.argmax(1)
    return {"decision": [names[number] for number in place]}
