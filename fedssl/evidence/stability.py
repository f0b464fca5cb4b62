"""How the figures fall when test images are turned, scaled or shown differently; the model stays as it is."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from fedssl import progress
from fedssl.data.cache import ImageStore
from fedssl.evaluation.features import embed
from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.probe import linear_probe
from fedssl.evaluation.protocol import AUROC
from fedssl.evaluation.robustness import LEVELS, NEUTRAL, changed, mean_drop
from fedssl.evaluation.statistics import interval
from fedssl.evaluation.task import Task
from fedssl.evidence.encoders import Encoder


def robustness_rows(
    name: str, encoders: Sequence[Encoder], store: ImageStore, task: Task, *, resamples: int
) -> list[dict[str, Any]]:
    """AUROC by kind and level of the change, and the mean drop, for a linear probe with all labels.

    Args:
        name: of the task.
        encoders: to test.
        store: the images.
        task: labels and splits; the probe is trained on images as they are.
        resamples: draws of the test patients.
    """
    rows = []
    tested = np.any(list(task.tests.values()), axis=0)
    for done, encoder in enumerate(encoders):
        scores = _scores(encoder, store, task, tested)
        for domain, mask in task.tests.items():
            draws, targets = draw_patients(task.patients[mask], number=resamples, seed=0), task.targets.take(mask)
            for kind, levels in LEVELS.items():
                values = {level: METRICS[AUROC](scores[kind, level][mask[tested]], targets, draws) for level in levels}
                keys: dict[str, Any] = {"task": name, "encoder": encoder.name, "domain": domain, "kind": kind}
                for level, found in values.items():
                    rows.append(keys | {"level": level} | _estimate("value", found, len(draws.counts)))
                rows.append(keys | _estimate("drop", mean_drop(values, NEUTRAL[kind]), len(draws.counts)))
        progress.publish(progress.Done("encoders tried on changed images", done + 1, len(encoders)))
    return rows


def _scores(
    encoder: Encoder, store: ImageStore, task: Task, tested: np.ndarray
) -> dict[tuple[str, float], Float[np.ndarray, "_tested outputs"]]:
    """Probabilities of the tested images by kind and level of the change, from one probe."""
    places = [(kind, level) for kind, levels in LEVELS.items() for level in levels]
    embedded = [
        embed(
            encoder.module, store, task.rows[tested], edge=encoder.edge, change=partial(changed, kind=kind, level=level)
        )
        for kind, level in places
    ]
    train = embed(encoder.module, store, task.rows[task.train], edge=encoder.edge)
    found = linear_probe(train, task.targets.take(task.train), np.concatenate(embedded))
    return dict(zip(places, np.split(found, len(places)), strict=True))


def _estimate(name: str, values: Float[np.ndarray, " draws"], patients: int) -> dict[str, float]:
    estimate, low, high = interval(values, patients)
    return {name: estimate, "low": low, "high": high}
