"""A labelled task: which images, which label, which patients train the probe and which test it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from fedssl.data.cache import ImageStore
from fedssl.data.labels import join_labels
from fedssl.data.pseudonym import numbered
from fedssl.errors import DataError

IN_DOMAIN, UNSEEN = "in domain", "unseen site"


@dataclass(frozen=True)
class Task:
    """Images with labels, split by patient.

    Attributes:
        rows: [images] their rows in the store.
        labels: [images] class numbers.
        classes: names of the classes by number.
        patients: [images] numbers, the same on every machine.
        covariates: [images, extra] further columns of the label file, numbers.
        train: [images] images of training patients.
        tests: images of test patients by domain.
    """

    rows: Int[np.ndarray, " images"]
    labels: Int[np.ndarray, " images"]
    classes: list[str]
    patients: np.ndarray
    covariates: Float[np.ndarray, "images extra"]
    train: Bool[np.ndarray, " images"]
    tests: dict[str, Bool[np.ndarray, " images"]]


def make_task(
    store: ImageStore,
    table: pa.Table,
    *,
    label: str,
    where: Mapping[str, Sequence[float]],
    covariates: Sequence[str],
    held_out: Bool[np.ndarray, " images"],
    sites: Sequence[str],
    unseen_sites: Sequence[str],
) -> Task:
    """Join labels to images and split them.

    Args:
        store: the images.
        table: a column ``file`` (path below the root), the label, and the columns of ``where`` and ``covariates``.
        label: the column to predict.
        where: keep rows whose column lies in [low, high].
        covariates: numeric columns for the metadata baseline.
        held_out: [images of the store] images of test patients.
        sites: sites that took part in training.
        unseen_sites: sites that did not.

    Raises:
        DataError: a column is missing, no label fits an image, or a split has only one class.
    """
    rows, entries = join_labels(store, table, [label, *where, *covariates])
    keep = np.ones(len(rows), bool)
    for column, (low, high) in where.items():
        keep &= (entries[column].astype(float) >= low) & (entries[column].astype(float) <= high)
    site = store.column("site")[rows]
    keep &= np.isin(site, [*sites, *unseen_sites])
    rows, site, entries = rows[keep], site[keep], {name: values[keep] for name, values in entries.items()}
    classes, labels = np.unique(entries[label].astype(str), return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"The label column {label} has only one class among the {len(rows)} images that are scored, so nothing can "
            "be learned from it. Check evaluation.label and evaluation.where."
        )
    test = held_out[rows]
    domains = {IN_DOMAIN: test & np.isin(site, sites), UNSEEN: test & np.isin(site, unseen_sites)}
    extra = [entries[name].astype(np.float32) for name in covariates]
    task = Task(
        rows, labels, classes.tolist(), numbered(store.column("patient"))[rows],
        np.stack(extra, 1) if extra else np.zeros((len(rows), 0), np.float32),
        ~test & np.isin(site, sites), {name: mask for name, mask in domains.items() if mask.any()},
    )  # fmt: skip
    _require_two_classes(task)
    return task


def _require_two_classes(task: Task) -> None:
    if not task.tests:
        raise DataError(
            "No labelled image belongs to a test patient. Raise data.test_fraction, or name data.unseen_sites."
        )
    for name, mask in {"training patients": task.train, **task.tests}.items():
        if len(np.unique(task.labels[mask])) < 2:
            raise DataError(
                f"The labelled images of the {name} show fewer than two classes, so AUROC is not defined there. Label "
                "more patients, or change data.test_fraction."
            )


def nested_label_subsets(
    task: Task, fractions: Sequence[float], *, seeds: int
) -> dict[tuple[float, int], Int[np.ndarray, " labelled"]]:
    """Choose the labelled training images for each fraction and seed, whole patients at a time.

    For one seed the subsets are nested. The order of patients is random, except that the first ones together show every
    class: a hospital that labels only a few patients would make sure of that, and a probe needs it. All encoders share
    the subsets.

    Returns:
        Positions in the task's images by (fraction, seed).
    """
    names = np.unique(task.patients[task.train])
    subsets = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(names)
        first = _first_with_all_classes(task, order)
        ordered = np.concatenate([first, order[~np.isin(order, first)]])
        for fraction in fractions:
            count = max(len(first), int(np.ceil(fraction * len(names) - 1e-9)))
            chosen = task.train & np.isin(task.patients, ordered[:count])
            subsets[fraction, seed] = np.flatnonzero(chosen)
    return subsets


def _first_with_all_classes(task: Task, order: np.ndarray) -> np.ndarray:
    """Walk through the patients and keep those that add a class not seen yet."""
    seen: set[int] = set()
    first: list[np.ndarray] = []
    wanted = len(np.unique(task.labels[task.train]))
    for patient in order:
        if len(seen) == wanted:
            break
        shown = set(task.labels[task.train & (task.patients == patient)].tolist())
        if shown - seen:
            first.append(patient)
            seen |= shown
    return np.array(first)
