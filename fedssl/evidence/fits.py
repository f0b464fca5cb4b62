"""Fine-tuning every encoder with every share of the labels; what is fitted is kept, so that a stopped study goes on."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fedssl import progress
from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.data.cache import ImageStore
from fedssl.evaluation.calibration import prior_of
from fedssl.evaluation.finetune import Recipe, finetune, predict
from fedssl.evaluation.protocol import Cell
from fedssl.evaluation.subsets import distinct_fractions, nested_label_subsets
from fedssl.evaluation.task import Task
from fedssl.evidence.encoders import Encoder
from fedssl.evidence.frozen import task_key

FINE_TUNED = {"all": "fine-tuned", "last": "last layers"}
TUNED = FINE_TUNED["all"]


@dataclass(frozen=True)
class Curve:
    """AUROC on validation patients during fine-tuning with all labels.

    Attributes:
        encoder: its name.
        seed: of the fit.
        images: seen at each check.
        values: at each check.
    """

    encoder: str
    seed: int
    images: list[int]
    values: list[float]


@dataclass(frozen=True)
class Fit:
    """One fine-tuned model's predictions by domain, and its validation curve."""

    predicted: Mapping[str, np.ndarray]
    images: list[int]
    values: list[float]


@dataclass(frozen=True)
class Tuning:
    """How encoders are fine-tuned.

    Attributes:
        recipes: by what is trained, a key of ``FINE_TUNED``.
        kinds: of encoders that are fine-tuned.
        flip: mirror images left and right while training.
        folder: where fits are kept, of this protocol only.
    """

    recipes: Mapping[str, Recipe]
    kinds: Sequence[str]
    flip: bool
    folder: Path


def finetuned_cells(
    encoders: Sequence[Encoder],
    store: ImageStore,
    task: Task,
    tuning: Tuning,
    *,
    name: str,
    fractions: Sequence[float],
    seeds: int,
) -> Iterator[tuple[Cell, list[Curve]]]:
    """Fine-tune each encoder with each share of the labels and each seed.

    Args:
        encoders: to fine-tune.
        store: the images.
        task: labels and splits.
        tuning: how.
        name: of the task, for people.
        fractions: of the training patients that have labels.
        seeds: of the subsets, of validation patients and of training.

    Yields:
        For each encoder, recipe and share the predictions, and the validation curves where all labels are used.
    """
    fractions = distinct_fractions(task, fractions, seeds=seeds)
    subsets = nested_label_subsets(task, fractions, seeds=seeds)
    what = task_key(store, task)
    total, done = len(encoders) * len(tuning.recipes) * len(fractions) * seeds, 0
    for encoder in encoders:
        for part, recipe in tuning.recipes.items():
            for fraction in fractions:
                fits = []
                for seed in range(seeds):
                    key = f"{what}/{_weights(encoder)}/{tuning.flip}/{asdict(recipe)}/{fraction}/{seed}"
                    path = tuning.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
                    if not path.exists():
                        fit = _fit(encoder, store, task, subsets[fraction, seed], recipe, seed=seed, flip=tuning.flip)
                        _save(path, fit, key)
                    fits.append(_load(path))
                    done += 1
                    progress.publish(progress.Done(f"models fine-tuned for {name}", done, total))
                priors = [prior_of(task.targets.take(subsets[fraction, seed])) for seed in range(seeds)]
                cell = Cell(encoder.name, FINE_TUNED[part], fraction, [fit.predicted for fit in fits], priors)
                whole = fraction == max(fractions) and part == "all"
                yield cell, [Curve(encoder.name, s, f.images, f.values) for s, f in enumerate(fits) if whole]


def _weights(encoder: Encoder) -> str:
    """Name the weights that a fit starts from: their hash, or the architecture that random ones are drawn for."""
    return str(encoder.identity.get("sha256") or f"{encoder.arm.kind} {encoder.identity['drawn']}")


def _fit(
    encoder: Encoder, store: ImageStore, task: Task, rows: np.ndarray, recipe: Recipe, *, seed: int, flip: bool
) -> Fit:
    tuned = finetune(
        encoder.start(seed), store, task.rows[rows], task.targets.take(rows), task.patients[rows], recipe,
        edge=encoder.edge, seed=seed, flip=flip,
    )  # fmt: skip
    exclusive = task.targets.exclusive
    predicted = {
        domain: predict(tuned.model, store, task.rows[mask], edge=encoder.edge, exclusive=exclusive)
        for domain, mask in task.tests.items()
    }
    return Fit(predicted, [check.images for check in tuned.curve], [float(check.value) for check in tuned.curve])


def _save(path: Path, fit: Fit, key: str) -> None:
    tensors = {domain: torch.from_numpy(np.ascontiguousarray(values)) for domain, values in fit.predicted.items()}
    curve = {"images": fit.images, "values": [repr(value) for value in fit.values]}  # text: JSON has no NaN
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {"key": key, **curve}, "a fitted model's predictions")


def _load(path: Path) -> Fit:
    tensors, facts = load_tensors(path)
    values = [float(value) for value in facts["values"]]
    return Fit({domain: tensor.numpy() for domain, tensor in tensors.items()}, facts["images"], values)
