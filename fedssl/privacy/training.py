"""One round of private training. What it returns is made of noised sums and public constants, and nothing else.

A step (docs/design/0008): draw patients by coin; release the noised sum of their votes and move the potentials; with
these, release the noised sum of their clipped gradients and let the optimiser step; release the noised sum of their
losses. An empty draw is a step, too.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.augment import Views
from fedssl.data.batches import ImageBatch
from fedssl.errors import FederationError
from fedssl.local.base import Correction
from fedssl.optim import set_rate
from fedssl.privacy.cohort import Cohort
from fedssl.privacy.engines.base import Engine, Unit
from fedssl.privacy.mechanism import Mechanism, released
from fedssl.privacy.randomness import seed
from fedssl.prototypes import perplexity
from fedssl.training import Round, Trained

_NOTICE_EVERY_S = 0.5


def train_private_round(
    engine: Engine,
    optimizer: Optimizer,
    cohort: Cohort,
    views: Views,
    place: Round,
    mechanism: Mechanism,
    *,
    pairing: str = "image",
    correction: Correction | None = None,
) -> Trained:
    """Train the engine's method in place.

    Args:
        engine: computes votes and clipped gradients; holds the method.
        optimizer: of the method's parameters.
        cohort: the site's patients.
        views: makes augmented views.
        place: where in the federation this round stands.
        mechanism: noise, clip and rate.
        pairing: ``image``, or ``patient``: two views from two images of a patient.
        correction: of the noised gradients, against drift.

    Raises:
        FederationError: the weights are no longer finite.
    """
    method = engine.method
    method.train()
    method.begin_round()
    told = _Told(mechanism, method.highest_loss, torch.zeros(method.num_prototypes))
    drawn = cohort.steps(mechanism.steps, rate=mechanism.rate, most=mechanism.images, pairing=pairing)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else the others round a patient's gradient
        for step, batches in enumerate(drawn, start=1):
            overall = (place.number - 1 + (step - 1) / mechanism.steps) / place.rounds
            set_rate(optimizer, place.schedule(overall))
            method.begin_step(overall)
            engine.see(_units(batches, views, engine))
            _release_votes(engine, mechanism, told)
            _release_gradients(engine, mechanism, told)
            if correction is not None:
                correction.apply()
            optimizer.step()
            method.after_step()
            told.notice(place, step)
    engine.see([])  # no patient's views stay in memory
    if not all(bool(torch.isfinite(parameter).all()) for parameter in method.parameters()):
        raise FederationError("its weights are no longer finite after private training. Lower optim.lr")
    return told.trained()


@dataclass
class _Told:
    """What may be told beside the weights: made of noised sums and public constants.

    Attributes:
        mechanism: of the steps.
        highest: loss of the method.
        votes: sum of the noised votes on prototypes so far.
        losses: sum of the noised losses so far, as shares of half the range from its middle, over the expected batch.
        began: when the round began, by ``time.monotonic``.
        noticed: when a notice was last given.
    """

    mechanism: Mechanism
    highest: float
    votes: Float[Tensor, " votes"]
    losses: float = 0.0
    began: float = field(default_factory=time.monotonic)
    noticed: float = field(default_factory=time.monotonic)

    def loss(self, steps: int) -> float:
        """Mean loss of the steps so far."""
        return self.highest * min(max(0.5 * (1.0 + self.losses / steps), 0.0), 1.0)

    def notice(self, place: Round, step: int) -> None:
        """Say, at most every half second, how far the round is."""
        if time.monotonic() - self.noticed < _NOTICE_EVERY_S and step < self.mechanism.steps:
            return
        self.noticed = time.monotonic()
        speed = step * self.mechanism.batch / max(self.noticed - self.began, 1e-9)
        where = (place.site, place.number, place.rounds, step, self.mechanism.steps)
        progress.publish(progress.Step(*where, self.loss(step), speed, 0.0))

    def trained(self) -> Trained:
        """Give the figures of the whole round."""
        mechanism, votes = self.mechanism, self.votes
        images = mechanism.steps * mechanism.batch
        metrics = {"loss": self.loss(mechanism.steps), "images": images, "steps": float(mechanism.steps)}
        if not len(votes):
            return Trained(metrics, mechanism.steps)
        mass = (images / len(votes) + votes).clamp_min(0.0)
        mass = mass * (images / mass.sum().clamp_min(1e-9))
        metrics["effective_prototypes"] = perplexity(mass)
        return Trained(metrics, mechanism.steps, mass, mass, _supported(votes, mechanism))


def _release_votes(engine: Engine, mechanism: Mechanism, told: _Told) -> None:
    """Move the potentials by the noised votes, before any loss is computed."""
    method = engine.method
    if method.num_votes:
        noised = released(engine.votes(), bound=method.vote_bound, sigma=mechanism.vote_sigma)
        method.take_votes(noised / mechanism.batch)
        told.votes += noised[: len(told.votes)].cpu()


def _release_gradients(engine: Engine, mechanism: Mechanism, told: _Told) -> None:
    """Set the parameters' gradients to the noised sum over the expected batch, and add the noised loss."""
    gradients = engine.gradients(mechanism.clip)
    for parameter, total in zip(engine.parameters, gradients.total, strict=True):
        noised = released(total, bound=mechanism.clip, sigma=mechanism.gradient_sigma)
        parameter.grad = noised.div_(mechanism.batch).to(parameter.dtype)
    shares = (2.0 * gradients.losses.double() / told.highest - 1.0).clamp(-1.0, 1.0).nan_to_num(0.0)
    told.losses += float(released(shares.sum()[None], bound=1.0, sigma=mechanism.loss_sigma)) / mechanism.batch


def _units(batches: Sequence[ImageBatch], views: Views, engine: Engine) -> list[Unit]:
    """Make each patient's views from a seed of its own: no other patient changes them."""
    device = engine.parameters[0].device
    with torch.no_grad():
        return [views(batch.to(device), torch.Generator(device).manual_seed(seed())).views for batch in batches]


def _supported(votes: Float[Tensor, " votes"], mechanism: Mechanism) -> Int[Tensor, " votes"]:
    """Patients behind each prototype, in whole patients' votes and two standard deviations of the noise below them."""
    seen = mechanism.steps * mechanism.batch / len(votes) + votes
    noise = 2.0 * mechanism.vote_sigma * mechanism.steps**0.5
    return ((seen - noise) / (mechanism.rate * mechanism.steps)).clamp_min(0.0).long()
