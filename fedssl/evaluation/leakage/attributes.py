"""What a linear probe tells of an image from its features alone: site, scanner, sex, or any other column."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.probe import linear_probe
from fedssl.evaluation.statistics import interval
from fedssl.evaluation.targets import classes_of

LEAST_PATIENTS = 3  # of a value on each side: fewer say nothing


def told_on_both_sides(
    values: Shaped[np.ndarray, " images"],
    patients: Shaped[np.ndarray, " images"],
    train: Bool[np.ndarray, " images"],
    test: Bool[np.ndarray, " images"],
) -> Bool[np.ndarray, " images"]:
    """Mark the images whose value at least three training and three test patients share."""
    enough = [
        value
        for value in np.unique(values)
        if all(len(np.unique(patients[mask & (values == value)])) >= LEAST_PATIENTS for mask in (train, test))
    ]
    return np.isin(values, enough) & (train | test)


def predictability(
    values: Shaped[np.ndarray, " images"],
    patients: Shaped[np.ndarray, " images"],
    train: Bool[np.ndarray, " images"],
    features: Float[np.ndarray, "images width"],
    *,
    resamples: int,
) -> tuple[float, float, float]:
    """Balanced accuracy of guessing a value by a linear probe, with its 95 % interval by draws of the test patients.

    Args:
        values: two or more different ones.
        patients: of the images.
        train: images that the probe is fitted on; the others test it.
        features: of the images.
        resamples: draws.
    """
    targets = classes_of(values.tolist())
    guessed = linear_probe(features[train], targets.take(train), features[~train])
    draws = draw_patients(patients[~train], number=resamples, seed=0)
    return interval(METRICS["balanced_accuracy"](guessed, targets.take(~train), draws), len(draws.counts))


def attribute_rows(
    columns: Mapping[str, Shaped[np.ndarray, " images"]],
    patients: Int[np.ndarray, " images"],
    train: Bool[np.ndarray, " images"],
    features: Mapping[str, Float[np.ndarray, "images _width"]],
    *,
    resamples: int,
) -> list[dict[str, Any]]:
    """Figures for each column and encoder; ``balanced_accuracy`` None where fewer than two values can be compared.

    Args:
        columns: by name, a value for each image; empty where unknown.
        patients: of the images.
        train: images of training patients; the others are of test patients.
        features: by encoder.
        resamples: draws of the test patients.
    """
    rows: list[dict[str, Any]] = []
    for what, values in columns.items():
        known = values != ""
        kept = told_on_both_sides(values, patients, train & known, ~train & known)
        number = len(np.unique(values[kept]))
        for encoder, own in features.items():
            row = {"what": what, "encoder": encoder, "values": number, "balanced_accuracy": None}
            if number >= 2:
                value, low, high = predictability(
                    values[kept], patients[kept], train[kept], own[kept], resamples=resamples
                )
                row["balanced_accuracy"] = {"value": value, "low": low, "high": high, "chance": 1.0 / number}
            rows.append(row)
    return rows
