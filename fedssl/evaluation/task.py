"""A labelled task: which images, which label, which patients train the probe and which test it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from fedssl import progress
from fedssl.data.cache import ImageStore
from fedssl.data.indexing.scan import known_columns, read_table, tidy
from fedssl.data.pseudonym import numbered
from fedssl.errors import DataError

IN_DOMAIN, UNSEEN = "in domain", "unseen site"
_OWN_NAMES = "(image)"  # of a table made from the index: its files have no other name there


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
    rows, entries = _join(store, table, [label, *where, *covariates])
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


def _join(store: ImageStore, table: pa.Table, columns: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    own = _OWN_NAMES in table.column_names
    missing = [name for name in [_OWN_NAMES if own else "file", *columns] if name not in table.column_names]
    if missing:
        raise DataError(
            f"The label table lacks the column {', '.join(missing)}; {known_columns(table, ['file', *columns])}. It "
            "needs `file` (path below data.root) and the columns named in evaluation.label, .where and .covariates."
        )
    files = table[_OWN_NAMES if own else "file"].to_pylist()
    names = files if own else store.names_of([tidy(str(file)) for file in files])
    place = {name: number for number, name in enumerate(names)}
    found = [(row, place[name]) for row, name in enumerate(store.column("image").tolist()) if name in place]
    if not found:
        raise DataError(
            f"None of the {table.num_rows} labels belongs to an image. The column `file` must hold the path below "
            "data.root, such as SITE/PATIENT/IMAGE.dcm."
        )
    if not own and len(place) < len(names):
        raise DataError(
            f"The label table lists {len(names) - len(place)} files more than once. Keep one row for each; its label "
            "stands for all frames of the file."
        )
    used = {number for _, number in found}
    if len(used) < len(place):
        text = f"{len(place) - len(used)} of {len(place)} labels belong to no readable image."
        progress.publish(progress.Note(text, alarm=len(used) < len(place) / 2))
    picked = table.take([number for _, number in found])
    valid = np.array([value is not None and value != "" for value in picked[columns[0]].to_pylist()])
    entries = {name: np.asarray(picked[name].to_pylist(), dtype=object)[valid] for name in columns}
    return np.array([row for row, _ in found])[valid], entries


def label_table(store: ImageStore, path: Path | None, label: str) -> pa.Table:
    """Read the label file, or take the labels that the index holds."""
    if path is not None:
        return read_table(path, [label])
    return pa.table({_OWN_NAMES: store.column("image"), "label": store.column("label")})


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
