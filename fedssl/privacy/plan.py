"""What a private run would cost before anybody trains: noise, epsilon, signal to noise, time and memory."""

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedssl.augment import Views
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.privacy.engines.base import Engine
from fedssl.privacy.mechanism import Mechanism, released

_LOUD = 0.25  # votes: noise of a potential's step, in shares; above it the clusters follow the noise
_FAINT = 5.0  # gradients: signal to noise over the whole run; at 12 it learnt, at .3 nothing (docs/experiments.md)
_FEW = 5000  # patients: below, a public start is needed (docs/privacy.md)
_PATIENTS = 8


@dataclass(frozen=True)
class Outlook:
    """What a site can expect.

    Attributes:
        epsilon: after all planned rounds, of all planned steps.
        epsilon_round: after the first round.
        sigma: noise of a step as one release.
        gradient_noise: length of the noise of a step's gradient, in lengths of the longest signal that a full batch of
            agreeing patients could give.
        signal_to_noise: longest signal of the whole run over its noise: agreeing gradients add up, noise by its root.
        vote_noise: standard deviation of a prototype's noised share, in equal shares of the patients (a K sigma S / B).
        parameters: that are trained.
    """

    epsilon: float
    epsilon_round: float
    sigma: float
    gradient_noise: float
    signal_to_noise: float
    vote_noise: float
    parameters: int


def outlook(mechanism: Mechanism, *, delta: float, steps: int, parameters: int, votes: int, bound: float) -> Outlook:
    """Work out what follows from the public constants alone.

    Args:
        mechanism: of the site's steps.
        delta: at which epsilon is counted.
        steps: planned in all.
        parameters: that are trained.
        votes: prototypes (K); 0 where none vote.
        bound: norm of a vote (S).
    """
    noise = mechanism.gradient_sigma * math.sqrt(parameters) / mechanism.batch
    return Outlook(
        epsilon_of([Spend(mechanism.sigma, mechanism.rate, steps)], delta),
        epsilon_of([mechanism.spend], delta),
        mechanism.sigma,
        noise,
        math.sqrt(steps) / noise,
        votes * mechanism.vote_sigma * bound / mechanism.batch,
        parameters,
    )


def warnings_of(found: Outlook, mechanism: Mechanism, *, patients: int, public_start: bool) -> list[str]:
    """Say in sentences why the run will learn little, if it will."""
    told = []
    if found.signal_to_noise < _FAINT:
        told.append(
            f"Over the whole run the longest signal that gradients could give is {found.signal_to_noise:.2g} times the "
            "noise; of our runs one with 12 learnt and those with 0.3 did not. Expect an encoder no better than its "
            "start. More patients, a larger privacy.batch, a smaller encoder or a higher epsilon help."
        )
    if found.vote_noise > _LOUD:
        told.append(
            f"The noise of a vote is {found.vote_noise:.2f} of a prototype's equal share (at most {_LOUD} is good): "
            "clusters will follow the noise. Lower method.num_prototypes, or raise privacy.vote_share or privacy.batch."
        )
    if patients < _FEW and not public_start:
        told.append(
            f"{patients} patients are few (about {_FEW} and more learn from scratch): start from public weights with "
            "encoder.weights=FILE, which costs no privacy."
        )
    if mechanism.rate > 0.5:
        told.append(
            f"A patient is drawn in {mechanism.rate:.0%} of the steps: sampling hides little, and epsilon grows "
            "faster than with a smaller privacy.batch."
        )
    return told


@dataclass(frozen=True)
class Cost:
    """What a round takes on this machine, measured on noise images.

    Attributes:
        step_s: seconds of a step of the expected batch.
        round_s: seconds of a round.
        memory_gb: largest memory of this process so far, with one step of a few patients.
    """

    step_s: float
    round_s: float
    memory_gb: float


def measure(engine: Engine, views: Views, mechanism: Mechanism, *, in_chans: int) -> Cost:
    """Time votes, gradients and noise of a few patients made of noise, and scale to the expected batch."""
    device = engine.parameters[0].device
    sizes = [scale.edge for scale in views.scales for _ in range(scale.count)]
    units = [
        [torch.randn(mechanism.images, in_chans, edge, edge, device=device) for edge in sizes] for _ in range(_PATIENTS)
    ]
    _step(engine, units, mechanism)
    begin = time.perf_counter()
    noise = _step(engine, units, mechanism)
    whole = time.perf_counter() - begin
    step = (whole - noise) * mechanism.batch / _PATIENTS + noise
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    return Cost(step, step * mechanism.steps, memory)


def _step(engine: Engine, units: Sequence[Sequence[torch.Tensor]], mechanism: Mechanism) -> float:
    """Run one step; returns the seconds that the noise of the gradients took."""
    engine.see(units)
    if engine.method.num_votes:
        engine.votes()
    total = engine.gradients(mechanism.clip).total
    begin = time.perf_counter()
    for part in total:
        released(part, bound=mechanism.clip, sigma=mechanism.gradient_sigma)
    engine.see([])
    return time.perf_counter() - begin
