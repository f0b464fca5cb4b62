"""One round of local training: a pure function of the shared state, the site's images and the seed."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.augment import Views, centre_view
from fedssl.cluster_sums import ClusterSums
from fedssl.clustering import cluster_information
from fedssl.collapse import rank_me
from fedssl.data.batches import Batches, image_batch
from fedssl.data.cache import Subset
from fedssl.errors import FederationError
from fedssl.local.base import Correction
from fedssl.methods.base import Loss, Method
from fedssl.optim import Schedule, set_rate
from fedssl.pace import Clock, paced
from fedssl.prototypes import perplexity

RANKME_SAMPLES = 512


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
    """What local training measured.

    Attributes:
        metrics: figures of the round.
        steps: of the optimiser.
        mass: soft number of samples of each prototype, or None without prototypes.
        usage: number of samples nearest to each prototype, likewise.
        support: number of patients behind each prototype, likewise.
    """

    metrics: dict[str, float]
    steps: int
    mass: Float[Tensor, " prototypes"] | None = None
    usage: Float[Tensor, " prototypes"] | None = None
    support: Int[Tensor, " prototypes"] | None = None


def train_round(
    method: Method,
    optimizer: Optimizer,
    batches: Batches,
    views: Views,
    place: Round,
    *,
    autocast: Callable[[], torch.autocast],
    correction: Correction | None = None,
    seconds: float | None = None,
) -> Trained:
    """Train ``method`` in place on every batch of the round, or on as many as ``seconds`` allow.

    Args:
        method: to train.
        optimizer: of its parameters.
        batches: of the round.
        views: makes augmented views.
        place: where in the federation this round stands.
        autocast: makes autocast contexts.
        correction: of the gradients, against drift.
        seconds: no step begins after these; the first always does. Such a round cannot be repeated bit for bit.

    Raises:
        FederationError: the loss is not finite.
    """
    device = next(method.parameters()).device
    generator = torch.Generator(device).manual_seed(place.derived_seed("views"))
    method.train()
    method.begin_round()
    sums: dict[str, Tensor] = {}
    clock, clusters, step = Clock(), ClusterSums(), 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(place.derived_seed("dropout"))
        for done, images in paced(batches, clock, seconds):
            overall = (place.number - 1 + done) / place.rounds
            set_rate(optimizer, place.schedule(overall))
            method.begin_step(overall)
            with torch.no_grad():
                crops = views(images.to(device), generator)
            with autocast():
                loss = method.loss(crops)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            if correction is not None:
                correction.apply()
            optimizer.step()
            method.after_step()
            _add(sums, loss)
            if loss.clusters is not None:
                clusters.add(loss.clusters, crops)
            step += 1
            if clock.due():
                _notice(place, step, clock.expected(step, batches, seconds), loss, clock, batches.size)
    _notice(place, step, step, loss, clock, batches.size)
    return _measure(method, sums, clusters, step, batches, views, place, clock)


def _add(sums: dict[str, Tensor], loss: Loss) -> None:
    """Add a step's figures to the running sums, without waiting for the device."""
    for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
        sums[name] = sums[name] + value if name in sums else value


def _notice(place: Round, step: int, steps: int, loss: Loss, clock: Clock, batch: int) -> None:
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
    method: Method,
    sums: Mapping[str, Tensor],
    clusters: ClusterSums,
    steps: int,
    batches: Batches,
    views: Views,
    place: Round,
    clock: Clock,
) -> Trained:
    seconds, waited = clock.elapsed, clock.waited
    metrics = {name: float(value) / steps for name, value in sums.items()}
    if metrics.keys() - {"loss"} != set(method.terms):  # what leaves a site was decided before
        raise FederationError("gives terms of its loss that the method does not declare; nothing was sent")
    features = _features(method, batches.images, _sample(batches.images, place, most=RANKME_SAMPLES), views.edge)
    metrics["rankme"] = rank_me(torch.cat(features).float().cpu())
    metrics["steps"], metrics["images"] = float(steps), float(steps * batches.size)
    metrics["seconds"] = seconds
    metrics["images_per_s"] = metrics["images"] / seconds
    metrics["data_wait"] = waited / seconds
    if clusters.mass is None or clusters.usage is None or clusters.entropy is None:
        return Trained(metrics, steps)
    used, told = clusters.usage.sum(0), cluster_information(clusters.usage)
    metrics["effective_prototypes"] = perplexity(used)
    metrics["code_entropy"] = float(clusters.entropy) / steps
    metrics |= {} if told is None else {"modality_nmi": told}
    return Trained(metrics, steps, clusters.mass.cpu(), used.cpu(), clusters.support())


def _sample(images: Subset, place: Round, *, most: int) -> Int[Tensor, " sample"]:
    """Choose up to ``most`` of the site's training images by the round's seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(place.derived_seed("rankme")))
    return order[:most].sort().values


@torch.no_grad()
def _features(
    method: Method, images: Subset, rows: Int[Tensor, " sample"], edge: int
) -> list[Float[Tensor, "_ width"]]:
    """Features of some training images, whole and unaugmented, in equal chunks."""
    device = next(method.parameters()).device
    method.eval()
    return [
        method.encoder(centre_view(image_batch(images.read(chunk.numpy())).shown().to(device), edge=edge))
        for chunk in rows.tensor_split(math.ceil(len(rows) / 128))
    ]


@torch.no_grad()
def sample_scores(
    method: Method, images: Subset, edge: int, place: Round, *, most: int
) -> tuple[Int[Tensor, " sample"], Float[Tensor, "sample prototypes"]]:
    """Score up to ``most`` training images against the prototypes, unaugmented, on the CPU; returns their rows, too."""
    rows = _sample(images, place, most=most)
    features = _features(method, images, rows, edge)
    return rows, torch.cat([method.prototype_scores(chunk).float().cpu() for chunk in features])


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
