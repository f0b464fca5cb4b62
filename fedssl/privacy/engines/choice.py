"""Which engine is fastest here: measured on noise images, so that no patient's image decides anything."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fedssl import progress
from fedssl.augment import Views
from fedssl.errors import ConfigError
from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.base import Autocast, Engine, Unit
from fedssl.privacy.engines.ghost import Ghost
from fedssl.privacy.engines.loop import Loop
from fedssl.privacy.engines.vectorised import Vectorised

ENGINES: Mapping[str, type[Engine]] = {"loop": Loop, "vmap": Vectorised, "ghost": Ghost}
AUTO = "auto"
_PATIENTS = 8
_CLIP, _AGREEMENT = 0.1, 1e-3


def choose_engine(
    name: str, method: SeparableMethod, views: Views, autocast: Autocast, *, images: int, in_chans: int
) -> Engine:
    """Make the engine of this name; ``auto`` measures a step of each on noise images and says what it found.

    Args:
        name: ``auto``, ``loop``, ``vmap`` or ``ghost``.
        method: whose gradients are computed.
        views: of the run, for their number and sizes.
        autocast: makes autocast contexts for the network.
        images: of a patient.
        in_chans: channels of an image.

    Raises:
        ConfigError: the engine does not exist, or does not fit the encoder.
    """
    if name == "ghost" and not Ghost.fits(method):
        raise ConfigError(
            "privacy.engine=ghost does not know a layer of this encoder. Use privacy.engine=auto, loop or vmap."
        )
    if name not in {AUTO, *ENGINES}:
        raise ConfigError(f"privacy.engine={name} does not exist; there are auto, {', '.join(ENGINES)}.")
    noise = _noise_patients(views, images, in_chans, next(method.parameters()).device)
    if name in ENGINES:
        truth = _sum(ENGINES["loop"](method, nullcontext), noise)
        if name != "loop" and not _agrees(ENGINES[name](method, nullcontext), noise, truth):
            raise ConfigError(
                f"privacy.engine={name} does not give the loop's gradients of this encoder; use auto or loop."
            )
        return ENGINES[name](method, autocast)
    speeds = {name: _patients_a_second(engine, noise) for name, engine in _fitting(method, autocast, noise)}
    best = max(speeds, key=lambda name: speeds[name])
    figures = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    text = f"Private gradients: engine {best}, the fastest here (patients a second on noise images: {figures})."
    progress.publish(progress.Note(text))
    return ENGINES[best](method, autocast)


def _fitting(method: SeparableMethod, autocast: Autocast, noise: Sequence[Unit]) -> list[tuple[str, Engine]]:
    """Engines that give the loop's sum on noise: whatever a layer does that they do not know shows there."""
    names = [name for name in ENGINES if name != "ghost" or Ghost.fits(method)]
    truth = _sum(ENGINES["loop"](method, nullcontext), noise)
    return [
        (name, ENGINES[name](method, autocast))
        for name in names
        if name == "loop" or _agrees(ENGINES[name](method, nullcontext), noise, truth)
    ]


def _sum(engine: Engine, units: Sequence[Unit]) -> Tensor:
    """Clipped sum of patients with one and two images, as one vector."""
    engine.see([[view[: 1 + number % 2] for view in unit] for number, unit in enumerate(units[:3])])
    total = engine.gradients(_CLIP).total
    engine.see([])
    return torch.cat([part.flatten() for part in total])


def _agrees(engine: Engine, units: Sequence[Unit], truth: Tensor) -> bool:
    try:
        return bool((_sum(engine, units) - truth).norm() <= _AGREEMENT * truth.norm())
    except (RuntimeError, NotImplementedError):  # a layer that torch.func cannot batch, or want of memory
        return False


def _noise_patients(views: Views, images: int, in_chans: int, device: torch.device) -> list[Unit]:
    sizes = [scale.edge for scale in views.scales for _ in range(scale.count)]
    return [[torch.randn(images, in_chans, edge, edge, device=device) for edge in sizes] for _ in range(_PATIENTS)]


def _patients_a_second(engine: Engine, units: Sequence[Unit]) -> float:
    """Speed of votes and gradients."""
    device = engine.parameters[0].device
    for attempt in range(2):  # the first one warms up
        begin = time.perf_counter()
        engine.see(units[: _PATIENTS if attempt else 1])
        if engine.method.num_votes:
            engine.votes()
        engine.gradients(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    engine.see([])
    return _PATIENTS / (time.perf_counter() - begin)
