"""What is to be predicted of each image: one of several classes, or several findings at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fedssl.errors import DataError

_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


@dataclass(frozen=True)
class Targets:
    """Labels of images as numbers.

    Attributes:
        values: [images, outputs] 1 or 0; NaN where a finding is not known.
        names: of the outputs: of classes, or of findings.
        exclusive: one output of each image is 1 (two or more classes); else every finding stands for itself.
    """

    values: Float[np.ndarray, "images outputs"]
    names: list[str]
    exclusive: bool

    def __len__(self) -> int:
        """Count the images."""
        return len(self.values)

    def take(self, rows: np.ndarray) -> "Targets":
        """Choose images by position or mask."""
        return Targets(self.values[rows], self.names, self.exclusive)

    @property
    def scored(self) -> list[int]:
        """Outputs that figures are averaged over: of two classes the second alone, else all."""
        return [1] if self.exclusive and len(self.names) == 2 else list(range(len(self.names)))

    @property
    def classes(self) -> Int[np.ndarray, " images"]:
        """[images] number of the class; only of exclusive targets."""
        assert self.exclusive
        return self.values.argmax(1)

    @property
    def shown_both(self) -> list[int]:
        """Scored outputs that some images show as 1 and others as 0: those of which AUROC is defined."""
        return [output for output in self.scored if {0.0, 1.0} <= set(self.values[:, output].tolist())]

    @property
    def complete(self) -> bool:
        """Whether every scored output has images that are 1 and images that are 0."""
        return all({0.0, 1.0} <= set(self.values[:, output].tolist()) for output in self.scored)


def classes_of(labels: Sequence[object]) -> Targets:
    """Take one column of labels as classes, in the order of their names."""
    names, numbers = np.unique(np.array([str(label) for label in labels]), return_inverse=True)
    return Targets(np.eye(len(names), dtype=np.float32)[numbers.ravel()], names.tolist(), exclusive=True)


def findings_of(columns: Sequence[Sequence[object]], names: Sequence[str]) -> Targets:
    """Take several columns as findings that may occur together: 1, 0, or empty where it is not known.

    Raises:
        DataError: a value is none of these.
    """
    values = np.stack(
        [[_finding(value, name) for value in column] for column, name in zip(columns, names, strict=True)]
    )
    return Targets(values.T.astype(np.float32), list(names), exclusive=False)


def _finding(value: object, name: str) -> float:
    text = "" if value is None else str(value).strip().lower()
    if text in _YES | _NO:
        return float(text in _YES)
    if text in {"", "nan", "-1", "-1.0"}:  # -1: uncertain, as in CheXpert
        return float("nan")
    raise DataError(
        f"The column {name} holds a value that is neither 1, 0 nor empty. Findings that occur together need one column "
        "each with 1 and 0; give a single column name for classes."
    )
