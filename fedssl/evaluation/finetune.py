"""Fine-tuning of an encoder with few labels (SimCLR, Chen et al. 2020, section 4; REMEDIS, Azizi et al. 2023)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from fedssl import progress
from fedssl.augment import Changes, Crops, centre_view
from fedssl.data.batches import ImageBatch, image_batch
from fedssl.data.cache import ImageStore, Subset
from fedssl.encoders import feature_width
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.recipe import Recipe as Recipe  # also for those who import it from here
from fedssl.evaluation.targets import Targets
from fedssl.optim import Schedule, adamw, set_rate
from fedssl.training import autocast_for

Outputs = Float[Tensor, "batch outputs"]
Scores = Float[np.ndarray, "images outputs"]
View = Callable[[ImageBatch, Generator], Tensor]


class Classifier(nn.Module):
    """An encoder and a linear head that starts at zero."""

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.utils.skip_init(nn.Linear, feature_width(encoder), outputs)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Float[Tensor, "batch channels edge edge"]) -> Outputs:
        """Return a logit for each class or finding."""
        return self.head(self.encoder(images))


@dataclass(frozen=True)
class Check:
    """Mean AUROC (0 to 1) on the validation patients after ``images`` training images, repeats counted."""

    images: int
    value: float


@dataclass(frozen=True)
class Finetuned:
    """The best weights, or without validation the last; every look; the images that these weights have seen."""

    model: Classifier
    curve: list[Check]
    images: int


def finetune(  # noqa: PLR0913 - what is trained, on what, and how
    encoder: nn.Module,
    store: ImageStore,
    rows: Int[np.ndarray, " labelled"],
    targets: Targets,
    patients: np.ndarray,
    recipe: Recipe,
    *,
    edge: int,
    seed: int,
    flip: bool = True,
    validate: tuple[Int[np.ndarray, " checked"], Targets] | None = None,
) -> Finetuned:
    """Train a copy of ``encoder`` with a new head; of 10 or more labelled patients some only decide when to stop.

    Args:
        encoder: to start from, on its device.
        store: the images.
        rows: [labelled] which of them.
        targets: [labelled] of these.
        patients: [labelled] whose they are.
        recipe: how to train.
        edge: pixels on a side of the encoder's input.
        seed: at least 0; decides everything, on a CPU bit for bit with equal threads.
        flip: mirror left and right; only where anatomy allows.
        validate: other rows and targets that decide instead; figures on these are then too good.

    Raises:
        DataError: the labels are all the same, or ``validate`` lacks a value of an output that they show both ways.
        ConfigError: the training diverges.
    """
    split, dropout, *seeds = (int(word) for word in np.random.SeedSequence(seed).generate_state(4))
    if validate is None:
        held = validation_patients(targets, patients, share=recipe.validation, seed=split)
        validate = (rows[held], targets.take(held)) if held.any() else None
        rows, targets = rows[~held], targets.take(~held)
    if not targets.shown_both:
        raise DataError(f"The labels of the {len(rows)} images to learn from are all the same. Label more patients.")
    if validate is not None and not set(targets.shown_both) <= set(validate[1].shown_both):
        raise DataError("The images that decide when to stop lack a label of either kind. Choose more patients.")
    device = next(encoder.parameters()).device
    model = Classifier(copy.deepcopy(encoder), len(targets.names)).to(device)
    changes, crops = Changes(15.0, flip, gamma=0.2, contrast=0.2, brightness=0.05), Crops(1, edge, (0.6, 1.0))
    looks = _train(model, Subset(store, rows), partial(changes.view, crops=crops), targets, recipe, *seeds)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(dropout)
        if validate is None:
            return Finetuned(images=max(looks), curve=[], model=model.eval())
        scores = partial(predict, model, store, validate[0], edge=edge, exclusive=targets.exclusive)
        return _best(model, looks, lambda: mean_auroc(scores(), validate[1], targets.shown_both), recipe.patience)


def _best(model: Classifier, looks: Iterator[int], score: Callable[[], float], patience: int) -> Finetuned:
    curve, best, kept = list[Check](), Check(0, -math.inf), model.state_dict()
    for images in looks:
        curve.append(Check(images, score()))
        if curve[-1].value > best.value:
            best, kept = curve[-1], {name: x.to("cpu", copy=True) for name, x in model.state_dict().items()}
        if len(curve) - 1 - curve.index(best) >= patience:
            break
    model.load_state_dict(kept)
    return Finetuned(model.eval(), curve, best.images)


def _train(model: Classifier, pool: Subset, view: View, targets: Targets, recipe: Recipe, *seeds: int) -> Iterator[int]:
    """Give the images seen at each look; the first is before the training."""
    trained = {"head": [], "last": last_stage(model.encoder)}.get(recipe.part)
    for name, parameter in model.encoder.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
    optimizer = adamw(model.encoder, lr=recipe.lr, weight_decay=recipe.weight_decay)
    for group in adamw(model.head, lr=recipe.head_lr, weight_decay=recipe.weight_decay).param_groups:
        optimizer.add_param_group(group)
    device = model.head.weight.device
    order, rng = np.random.default_rng(seeds[0]), Generator(device).manual_seed(seeds[1])
    values, weights = (torch.from_numpy(x).float().to(device) for x in (targets.values, balance(targets)))
    n, size, steps = len(targets), min(recipe.batch_size, len(targets)), recipe.steps(len(targets))
    batches = (b for _ in range(steps) for b in np.split(order.permutation(n)[: n - n % size], n // size))
    looks = {round(number * steps / recipe.checks) for number in range(1, recipe.checks + 1)}
    yield 0
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        set_rate(optimizer, Schedule("cosine", warmup=0.05)((step - 0.5) / steps))
        model.train().encoder.train(recipe.part != "head")
        views = view(image_batch(pool.read(batch)).to(device), rng)
        with autocast_for(device, recipe.precision)():
            output = model(views)
        loss = balanced_loss(output.float(), values[batch], weights, exclusive=targets.exclusive)
        if not math.isfinite(loss.item()):
            raise ConfigError(f"The loss is not finite in step {step} of {steps}. Lower finetune.lr.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.publish(progress.Done("fine-tuning", step, steps))
        if step in looks:
            yield step * size


def last_stage(encoder: nn.Module) -> list[str]:
    """Name the parameters of the last stage or block, and of what follows it, such as a norm."""
    names = [name for name, _ in encoder.named_parameters()]
    children = [name.split(".")[: 1 + name.startswith(("blocks.", "layers.", "stages."))] for name in names]
    stages = [child for child in children if len(child) == 2] or children
    return names[children.index(stages[-1]) :]


def validation_patients(targets: Targets, patients: np.ndarray, *, share: float, seed: int) -> Bool[np.ndarray, " all"]:
    """Draw patients that show both values of every output that all images together show both ways, as the others do.

    Nobody if there are too few.
    """
    names, rng = np.unique(patients), np.random.default_rng(seed)
    for _ in range(20 if len(names) >= 10 and targets.shown_both else 0):
        held = np.isin(patients, rng.permutation(names)[: max(2, round(share * len(names)))])
        if targets.take(held).shown_both == targets.take(~held).shown_both == targets.shown_both:
            return held
    return np.zeros(len(patients), bool)


def balance(targets: Targets) -> Float[np.ndarray, " outputs"]:
    """Weights of classes, n / (C n_c) with C classes present, or of positive findings, negative / positive."""
    positive, negative = (targets.values == 1).sum(0), (targets.values == 0).sum(0)
    if targets.exclusive:
        return len(targets) / ((positive > 0).sum() * np.maximum(positive, 1.0))
    return np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1.0), 1.0)


def balanced_loss(logits: Outputs, values: Outputs, weights: Tensor, *, exclusive: bool) -> Float[Tensor, ""]:
    """Cross-entropy of classes, mean over images; or binary of findings, mean over those that are known (not NaN)."""
    if exclusive:
        return F.cross_entropy(logits, values, weights)
    known = ~values.isnan()
    each = F.binary_cross_entropy_with_logits(logits, values.nan_to_num(), pos_weight=weights, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def logits(model: Classifier, store: ImageStore, rows: np.ndarray, *, edge: int) -> Scores:
    """Logits of whole images without augmentation, in inference mode; a ConfigError where they are not finite."""
    device = model.eval().head.weight.device
    chunks = (image_batch(store.read(chunk)).shown() for chunk in np.split(rows, range(128, len(rows), 128)))
    values = torch.cat([model(centre_view(chunk.to(device), edge=edge)).float().cpu() for chunk in chunks])
    if not values.isfinite().all():
        raise ConfigError("The fine-tuned encoder gives values that are not finite. Lower finetune.lr.")
    return values.numpy()


def predict(model: Classifier, store: ImageStore, rows: np.ndarray, *, edge: int, exclusive: bool) -> Scores:
    """Probabilities of classes (softmax) or findings (sigmoid)."""
    values = torch.from_numpy(logits(model, store, rows, edge=edge))
    return (values.softmax(1) if exclusive else values.sigmoid()).numpy()


def mean_auroc(scores: Scores, targets: Targets, outputs: Sequence[int]) -> float:
    """Mean over some outputs, each of the images where it is known, which must show both values."""
    values, known = targets.values, ~np.isnan(targets.values.T)
    return float(np.mean([roc_auc_score(values[known[o], o], scores[known[o], o]) for o in outputs]))
