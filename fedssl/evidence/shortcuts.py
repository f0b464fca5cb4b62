"""Does the embedding tell where an image was made? Then a classifier may learn the hospital in place of the disease."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedssl.data.cache import ImageStore
from fedssl.evaluation.leakage.attributes import predictability, told_on_both_sides
from fedssl.evaluation.targets import Targets
from fedssl.evaluation.task import IN_DOMAIN, Task

_GAP = 0.10  # in the share of a class between places, from which the place helps to guess the label


def shortcut_rows(
    name: str,
    store: ImageStore,
    task: Task,
    features: Mapping[str, np.ndarray],
    shown: Sequence[str],
    *,
    resamples: int,
) -> list[dict[str, Any]]:
    """Balanced accuracy of guessing site and scanner from features, by a linear probe, training to test patients.

    Args:
        name: of the task.
        store: the images.
        task: labels and splits; in domain.
        features: by encoder and baseline.
        shown: which of them to report.
        resamples: draws of the test patients.
    """
    rows = []
    for what in ("site", "scanner"):
        places = store.column(what)[task.rows]
        kept = _common(places, task)
        if len(np.unique(places[kept])) < 2:
            continue
        gap = _label_gap(places[kept], task.targets.take(kept))
        for title in shown:
            value, low, high = predictability(
                places[kept], task.patients[kept], task.train[kept], features[title][kept], resamples=resamples
            )
            chance = 1.0 / len(np.unique(places[kept]))
            rows.append(
                {"task": name, "encoder": title, "what": what, "places": len(np.unique(places[kept])),
                 "balanced_accuracy": value, "low": low, "high": high, "chance": chance, "label_gap": gap,
                 "alarm": low > chance and gap > _GAP}
            )  # fmt: skip
    return rows


def _common(places: np.ndarray, task: Task) -> np.ndarray:
    """Mark the images of places with enough training and test patients in domain."""
    test = task.tests.get(IN_DOMAIN, np.zeros(len(places), bool))
    return told_on_both_sides(places, task.patients, task.train, test)


def _label_gap(places: np.ndarray, targets: Targets) -> float:
    """Largest difference between places in how often an output is 1."""
    return max(_spread(places, targets.values[:, output]) for output in targets.scored)


def _spread(places: np.ndarray, values: np.ndarray) -> float:
    shares = list(_shares(places, values))
    return float(max(shares) - min(shares)) if shares else 0.0


def _shares(places: np.ndarray, values: np.ndarray) -> Iterator[float]:
    for place in np.unique(places):
        known = values[(places == place) & ~np.isnan(values)]
        if len(known):
            yield float(known.mean())
