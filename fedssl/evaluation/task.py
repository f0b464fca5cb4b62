"""A labelled task: which images, which label, which patients train the probe and which test it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from fedssl.data.cache import ImageStore
from fedssl.data.labels import join_labels
from fedssl.data.pseudonym import numbered
from fedssl.errors import DataError
from fedssl.evaluation.targets import Targets, classes_of, findings_of

IN_DOMAIN, UNSEEN = "in domain", "unseen site"
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Question:
    """What is asked of the images.

    Attributes:
        label: the column to predict; several: findings that may occur together, one column of 1, 0 or empty each.
        where: keep rows whose column, of numbers, lies in [low, high]; rows with an empty cell are left out.
        covariates: columns for the metadata baseline, of numbers without an empty cell among the rows that are kept.
    """

    label: str | Sequence[str]
    where: Mapping[str, Sequence[float]]
    covariates: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        """Name the label columns."""
        return [self.label] if isinstance(self.label, str) else list(self.label)


@dataclass(frozen=True)
class Labelled:
    """Images with labels.

    Attributes:
        rows: [images] their rows in the store.
        targets: what is to be predicted.
        patients: [images] numbers, the same on every machine; patients who share images have one.
        sites: [images] names of the sites.
        covariates: [images, extra] further columns of the label file, numbers.
    """

    rows: Int[np.ndarray, " images"]
    targets: Targets
    patients: np.ndarray
    sites: np.ndarray
    covariates: Float[np.ndarray, "images extra"]

    def take(self, chosen: np.ndarray) -> "Labelled":
        """Choose images by position or mask."""
        return Labelled(
            self.rows[chosen], self.targets.take(chosen), self.patients[chosen], self.sites[chosen],
            self.covariates[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Labelled images, split by patient.

    Attributes:
        images: with their labels.
        train: [images] images of training patients.
        tests: images of test patients by domain.
    """

    images: Labelled
    train: Bool[np.ndarray, " images"]
    tests: dict[str, Bool[np.ndarray, " images"]]

    @property
    def rows(self) -> Int[np.ndarray, " images"]:
        """[images] rows in the store."""
        return self.images.rows

    @property
    def targets(self) -> Targets:
        """What is to be predicted of the images."""
        return self.images.targets

    @property
    def patients(self) -> np.ndarray:
        """[images] numbers of the patients."""
        return self.images.patients


def label_images(store: ImageStore, table: pa.Table, question: Question) -> Labelled:
    """Join a label table to the images that it names.

    Args:
        store: the images.
        table: a column ``file`` (path below the root), and those that the question names.
        question: what is asked.

    Raises:
        DataError: a column is missing, no label fits an image, or a value is not usable.
    """
    rows, entries = join_labels(store, table, question.labels, [*question.where, *question.covariates])
    keep = np.ones(len(rows), bool)
    for column, (low, high) in question.where.items():
        values = _numbers(entries[column], column)
        keep &= (values >= low) & (values <= high)  # not if it is NaN
    rows, entries = rows[keep], {name: values[keep] for name, values in entries.items()}
    columns = [entries[name].tolist() for name in question.labels]
    targets = classes_of(columns[0]) if isinstance(question.label, str) else findings_of(columns, question.labels)
    if not targets.exclusive:
        known = ~np.isnan(targets.values).all(1)
        rows, targets, entries = rows[known], targets.take(known), {n: v[known] for n, v in entries.items()}
    extra = [_complete(entries[name], name) for name in question.covariates]
    return Labelled(
        rows, targets, numbered(store.column("group"))[rows], store.column("site")[rows],
        np.stack(extra, 1) if extra else np.zeros((len(rows), 0), np.float32),
    )  # fmt: skip


def _numbers(cells: np.ndarray, column: str) -> Float[np.ndarray, " cells"]:
    """Read a column; empty cells are NaN. A DataError names the column, never what it holds."""
    numbers = np.array([_number(cell) for cell in cells], np.float64)
    if others := int(np.isinf(numbers).sum()):
        raise DataError(
            f"{others} of {len(numbers)} cells of the column {column} hold no number. Columns in evaluation.where and "
            "evaluation.covariates need numbers, with a point for decimals."
        )
    return numbers


def _number(cell: object) -> float:
    """NaN of an empty cell, infinity of anything that is no number."""
    text = "" if cell is None else str(cell).strip()
    try:
        number = float(text or "nan") if not isinstance(cell, bool) else float(cell)
    except ValueError:
        return math.inf
    return number if math.isnan(number) or abs(number) <= _LARGEST else math.inf


def _complete(cells: np.ndarray, column: str) -> Float[np.ndarray, " cells"]:
    """Read a covariate, which must have no empty cell."""
    numbers = _numbers(cells, column)
    if empty := int(np.isnan(numbers).sum()):
        raise DataError(
            f"{empty} of {len(numbers)} cells of the column {column} are empty. Fill them, or leave the column out of "
            "evaluation.covariates."
        )
    return numbers.astype(np.float32)


def make_task(
    store: ImageStore,
    table: pa.Table,
    question: Question,
    *,
    held_out: Bool[np.ndarray, " stored"],
    sites: Sequence[str],
    unseen_sites: Sequence[str],
) -> Task:
    """Join labels to images and split them.

    Args:
        store: the images.
        table: see ``label_images``.
        question: what is asked.
        held_out: [images of the store] images of test patients.
        sites: sites that took part in training.
        unseen_sites: sites that did not.

    Raises:
        DataError: a column is missing, no label fits an image, or a split has only one class.
    """
    images = label_images(store, table, question)
    images = images.take(np.isin(images.sites, [*sites, *unseen_sites]))
    test = held_out[images.rows]
    domains = {IN_DOMAIN: test & np.isin(images.sites, sites), UNSEEN: test & np.isin(images.sites, unseen_sites)}
    task = Task(images, ~test & np.isin(images.sites, sites), {name: m for name, m in domains.items() if m.any()})
    require_both(task)
    return task


def require_both(task: Task) -> None:
    """Check that every part of a task can be scored.

    Raises:
        DataError: nothing is tested, or a part shows only one class, or no finding both ways.
    """
    names = task.targets.names
    if task.targets.exclusive and len(names) < 2:
        raise DataError(
            f"The label column has only one class among the {len(task.rows)} images that are scored, so nothing can be "
            "learned from it. Check evaluation.label and evaluation.where."
        )
    if not task.tests:
        raise DataError(
            "No labelled image belongs to a test patient. Raise data.test_fraction, or name data.unseen_sites."
        )
    for name, mask in {"training patients": task.train, **task.tests}.items():
        if not usable(task.targets.take(mask)):
            lack = "fewer than two classes" if task.targets.exclusive else "no finding both as 1 and as 0"
            raise DataError(
                f"The labelled images of the {name} show {lack}, so AUROC is not defined there. Label more patients, "
                "or change data.test_fraction."
            )


def usable(targets: Targets) -> bool:
    """Two classes, whichever; or a finding both as 1 and as 0."""
    return bool(targets.shown_both)
