"""Labels of images: a table that names files, or the label that the index took from a manifest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedssl import progress
from fedssl.data.cache import ImageStore
from fedssl.data.indexing.scan import known_columns, read_table, tidy
from fedssl.errors import DataError

_OWN_NAMES = "(image)"  # of a table made from the index: its files have no other name there


def join_labels(
    store: ImageStore, table: pa.Table, labels: Sequence[str], others: Sequence[str] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Find the images of a label table; rows without any label are left out.

    Args:
        store: the images.
        table: a column ``file``, and the others.
        labels: columns of which one must hold a value.
        others: further columns.

    Returns:
        [labelled] rows of the store, and [labelled] values by column.

    Raises:
        DataError: a column is missing, a file is listed twice, or none is known.
    """
    own, columns = _OWN_NAMES in table.column_names, [*labels, *others]
    _refuse_missing(table, [_OWN_NAMES if own else "file", *columns])
    files = table[_OWN_NAMES if own else "file"].to_pylist()
    names = files if own else store.names_of([tidy(str(file)) for file in files])
    place = {name: number for number, name in enumerate(names)}
    found = [(row, place[name]) for row, name in enumerate(store.column("image").tolist()) if name in place]
    if not found:
        raise DataError(
            f"None of the {table.num_rows} labels belongs to an image. The column `file` must hold the path below "
            "the images' root, such as SITE/PATIENT/IMAGE.dcm, or PATIENT/IMAGE.dcm if the root is one site's."
        )
    if not own and len(place) < len(names):
        raise DataError(
            f"The label table lists {len(names) - len(place)} files more than once. Keep one row for each; its label "
            "stands for all frames of the file."
        )
    used = {number for _, number in found}
    if len(used) < len(place):
        text = f"{len(place) - len(used)} of {len(place)} labels belong to no readable image."
        if half_lost(len(place) - len(used), len(place)):
            text += " Check the column `file`, the images' root and whether all files could be read."
        progress.publish(progress.Note(text, alarm=half_lost(len(place) - len(used), len(place))))
    picked = table.take([number for _, number in found])
    given = zip(*(picked[name].to_pylist() for name in labels), strict=True)
    valid = np.array([any(value is not None and value != "" for value in values) for values in given])
    entries = {name: np.asarray(picked[name].to_pylist(), dtype=object)[valid] for name in columns}
    return np.array([row for row, _ in found])[valid], entries


def _refuse_missing(table: pa.Table, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"The label table lacks the column {', '.join(missing)}; {known_columns(table, ['file', *columns])}. It "
            "needs `file` (path below the images' root), the label column that you asked for (--label, "
            "evaluation.label; for training data.label) and those of .where and .covariates, if any."
        )


def half_lost(lost: int, listed: int) -> bool:
    """Tell whether so many labels have no image that something is wrong."""
    return lost > 0 and 2 * lost >= listed


def lost_labels(store: ImageStore, table: pa.Table) -> dict[str, int]:
    """Count the files that a label table names (``listed``), and those of them that are no readable image (``lost``).

    Args:
        store: the images.
        table: with the column ``file``.
    """
    names = set(store.names_of([tidy(str(file)) for file in table["file"].to_pylist()]))
    return {"listed": len(names), "lost": len(names.difference(store.column("image").tolist()))}


def label_table(store: ImageStore, path: Path | None, labels: Sequence[str]) -> pa.Table:
    """Read the label file, or take the labels that the index holds (column ``label``).

    Raises:
        DataError: there is no such file, or no file was given and the index does not hold these labels.
    """
    if path is not None:
        return read_table(path, labels)
    if not (store.column("label") != "").any():
        raise DataError(
            "No labels were given, and the images' index holds none. Give a table with evaluation.labels=FILE (or "
            "--labels FILE): CSV or Parquet with the column `file` (path below the images' root) and the label."
        )
    other = [name for name in labels if name != "label"]
    if other:
        raise DataError(
            f"No label table was given, and the images' index holds only the column label, not {', '.join(other)}. "
            "Give a table with evaluation.labels=FILE (or --labels FILE), or ask for label."
        )
    return pa.table({_OWN_NAMES: store.column("image"), "label": store.column("label")})


def labels_of_images(store: ImageStore, path: Path | None, label: str) -> np.ndarray:
    """Return the label of every image of the store as text, empty where unknown: for methods that learn from labels.

    Raises:
        DataError: the table does not fit the images.
    """
    if path is None:
        return store.column("label")
    rows, entries = join_labels(store, label_table(store, path, [label]), [label])
    labels = np.full(len(store), "", object)
    labels[rows] = entries[label].astype(str)
    return labels.astype(np.str_)
