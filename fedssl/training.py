"""One round of local training: a pure function of the shared state, the site's images and the seed."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.augment import Views, centre_view
from fedssl.clustering import modality_information
from fedssl.collapse import rank_me
from fedssl.data.batches import Batches, ImageBatch, image_batch
from fedssl.errors import FederationError
from fedssl.methods.base import Loss, Method
from fedssl.optim import Schedule, set_rate
from fedssl.prototypes import perplexity

RANKME_SAMPLES = 512
_NOTICE_EVERY_S = 0.5


@dataclass(frozen=True)
class Round:
    """Where in the federation this training stands.

    Attributes:
        site: name of the site.
        number: 1 for the first round.
        rounds: of the whole federation.
        seed: of the run; the site's order and views derive from it, its name and the round.
        schedule: of the learning rate over the federation.
    """

    site: str
    number: int
    rounds: int
    seed: int
    schedule: Schedule

    def derived_seed(self, purpose: str) -> int:
        """Derive a 63-bit seed for one purpose at this site in this round."""
        text = f"{self.seed}/{self.site}/{self.number}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Trained:
    """What local training measured. ``mass`` and ``usage`` are [prototypes] sums over the round, or None."""

    metrics: dict[str, float]
    mass: Float[Tensor, " prototypes"] | None
    usage: Float[Tensor, " prototypes"] | None


class _Clock:
    """Seconds spent waiting for data and seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.noticed = 0.0

    def wait_for(self, batches: Batches) -> Iterator[ImageBatch]:
        """Give the batches and count the time until each one is there."""
        stream = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(stream, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    @property
    def elapsed(self) -> float:
        return max(time.perf_counter() - self.start, 1e-9)

    def due(self) -> bool:
        """Tell, at most every half second, that it is time for a notice."""
        if self.elapsed - self.noticed < _NOTICE_EVERY_S:
            return False
        self.noticed = self.elapsed
        return True


def train_round(
    method: Method,
    optimizer: Optimizer,
    batches: Batches,
    views: Views,
    place: Round,
    *,
    autocast: Callable[[], torch.autocast],
) -> Trained:
    """Train ``method`` in place on every batch of the round.

    Raises:
        FederationError: the loss is not finite.
    """
    device = next(method.parameters()).device
    generator = torch.Generator(device).manual_seed(place.derived_seed("views"))
    method.train()
    method.begin_round()
    sums: dict[str, Tensor] = {}
    clock, steps = _Clock(), len(batches)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(place.derived_seed("dropout"))
        for step, images in enumerate(clock.wait_for(batches)):
            done = (place.number - 1 + step / steps) / place.rounds
            set_rate(optimizer, place.schedule(done))
            method.begin_step(done)
            with torch.no_grad():
                crops = views(images.to(device), generator)
            with autocast():
                loss = method.loss(crops)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            optimizer.step()
            method.after_step()
            _add(sums, loss)
            if clock.due() or step == steps - 1:
                _notice(place, step + 1, steps, loss, clock, batches.size)
    return _measure(method, sums, batches, views, place, clock)


def _add(sums: dict[str, Tensor], loss: Loss) -> None:
    """Add a step's figures to the running sums, without waiting for the device."""
    for name, value in {"loss": loss.total.detach(), **loss.terms, "mass": loss.mass, "usage": loss.usage}.items():
        if value is not None:
            sums[name] = sums[name] + value if name in sums else value


def _notice(place: Round, step: int, steps: int, loss: Loss, clock: _Clock, batch: int) -> None:
    value = loss.total.item()
    if not math.isfinite(value):
        raise FederationError(
            f"Site {place.site}: the loss is not finite in round {place.number}, step {step}. Lower optim.lr or use "
            "training.precision=float32."
        )
    progress.publish(
        progress.Step(
            place.site,
            place.number,
            place.rounds,
            step,
            steps,
            value,
            step * batch / clock.elapsed,
            clock.waited / clock.elapsed,
        )
    )


def _measure(
    method: Method, sums: Mapping[str, Tensor], batches: Batches, views: Views, place: Round, clock: _Clock
) -> Trained:
    steps = len(batches)
    seconds, waited = clock.elapsed, clock.waited
    metrics = {name: float(value) / steps for name, value in sums.items() if name not in {"mass", "usage"}}
    usage = sums.get("usage")
    if metrics.keys() - {"loss"} != set(method.terms):  # what leaves a site was decided before
        raise FederationError("gives terms of its loss that the method does not declare; nothing was sent")
    if usage is not None:
        metrics["effective_prototypes"] = perplexity(usage.sum(0))
        told = modality_information(usage)
        metrics |= {} if told is None else {"modality_nmi": told}
    metrics["rankme"] = rank_me(_sample_features(method, batches, views.edge, place))
    metrics["images"] = float(steps * batches.size)
    metrics["seconds"] = seconds
    metrics["images_per_s"] = metrics["images"] / seconds
    metrics["data_wait"] = waited / seconds
    mass = sums.get("mass")
    return Trained(metrics, None if mass is None else mass.cpu(), None if usage is None else usage.sum(0).cpu())


@torch.no_grad()
def _sample_features(method: Method, batches: Batches, edge: int, place: Round) -> Float[Tensor, "samples width"]:
    """Features of up to 512 of the site's training images, whole and unaugmented."""
    device = next(method.parameters()).device
    count = min(RANKME_SAMPLES, len(batches.images))
    order = torch.randperm(len(batches.images), generator=torch.Generator().manual_seed(place.derived_seed("rankme")))
    images = image_batch(batches.images.read(order[:count].sort().values.numpy())).shown()
    method.eval()
    features = [method.encoder(centre_view(chunk.to(device), edge=edge)) for chunk in images.split(128)]
    return torch.cat(features).float().cpu()


def autocast_for(device: torch.device, precision: str) -> Callable[[], torch.autocast]:
    """Return a maker of autocast contexts.

    Args:
        device: where the model is.
        precision: ``auto`` (bf16 on a GPU, float32 on a CPU), ``bf16`` or ``float32``.
    """
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def pick_device(device: str) -> torch.device:
    """Resolve ``auto`` to a GPU if there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
