"""How a site trains, as the run's configuration and the hospital's own say together."""

from dataclasses import dataclass

from fedssl.local.base import LocalRule
from fedssl.optim import Schedule


@dataclass(frozen=True)
class LocalWork:
    """How a site trains one round.

    Attributes:
        batch_size: images in a batch.
        epochs: passes over the site's images in a round; may be a fraction.
        steps: optimiser steps of a round instead of epochs, or None.
        seconds: time for a round instead of epochs, or None; then nothing is equal bit for bit.
        seed: of the run.
        schedule: of the learning rate over the federation.
        pairing: where the two views of a row come from: ``image``, ``patient`` or ``series``.
        precision: ``auto``, ``bf16`` or ``float32``.
        threads: CPU threads; results on a CPU are equal bit for bit only at equal threads.
        rule: against drift.
        by_patients: the site weighs by its patients in averages, not by its images: private sites tell no images.
        prototype_patients: a prototype leaves only when at least so many patients have images nearest to it.
    """

    batch_size: int
    epochs: float
    steps: int | None
    seconds: float | None
    seed: int
    schedule: Schedule
    pairing: str
    precision: str
    threads: int
    rule: LocalRule
    prototype_patients: int
    by_patients: bool = False
