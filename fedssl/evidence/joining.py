"""What a hospital gains by taking part: on its own patients with its own labels, and where it stays outside."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedssl.data.cache import ImageStore
from fedssl.evaluation.features import embed
from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.probe import linear_probe
from fedssl.evaluation.protocol import AUROC
from fedssl.evaluation.statistics import interval, p_value
from fedssl.evaluation.task import IN_DOMAIN, UNSEEN, Task, usable
from fedssl.evidence.encoders import ALONE, FEDERATED, NOTHING, SCRATCH, WITHOUT, Encoder, chosen


def benefit_rows(
    name: str, task: Task, features: Mapping[str, np.ndarray], encoders: Sequence[Encoder], *, resamples: int
) -> list[dict[str, Any]]:
    """Federated minus alone for every site: linear probe on the site's own labels, tested on its own patients.

    A site whose labelled patients do not show both classes on both sides is named with the reason.
    """
    rows = []
    for alone in chosen(encoders, ALONE):
        site, here = alone.arm.site, task.images.sites == alone.arm.site
        mine = replace(task, train=task.train & here, tests={site: task.tests.get(IN_DOMAIN, here & False) & here})
        for together in chosen(encoders, FEDERATED):
            if together.arm.variant != alone.arm.variant:
                continue
            row: dict[str, Any] = {"task": name, "site": site, "variant": alone.arm.variant}
            parts = [mine.targets.take(mask) for mask in (mine.train, mine.tests[site])]
            if not all(len(part) and usable(part) for part in parts):
                rows.append(row | {"reason": "too few labelled patients to show both classes"})
                continue
            pair = _aurocs(mine, {e.name: features[e.name] for e in (together, alone)}, site, resamples)
            counts = _counts(mine, site)
            gap = _gap(pair[together.name], pair[alone.name], "federated", "alone", counts["test_patients"])
            rows.append(row | gap | counts)
    return rows


def left_out_rows(
    name: str,
    encoders: Sequence[Encoder],
    store: ImageStore,
    tasks: Mapping[str, Task],
    *,
    resamples: int,
) -> list[dict[str, Any]]:
    """Leave one site out: trained without it, labels of the others, tested on all its patients.

    Args:
        name: of the task.
        encoders: of the study; those without a site are tested on it.
        store: the images.
        tasks: by site, a task whose unseen site it is.
        resamples: draws of the test patients.
    """
    rows: list[dict[str, Any]] = []
    for without in chosen(encoders, WITHOUT):
        site, task = without.arm.site, tasks.get(without.arm.site)
        if task is None or UNSEEN not in task.tests:
            rows.append({"task": name, "site": site, "variant": without.arm.variant, "reason": "it has too few labels"})
            continue
        both = [without, *chosen(encoders, SCRATCH)]
        features = {e.name: embed(e.module, store, task.rows, edge=e.edge) for e in both}
        values = _aurocs(task, features, UNSEEN, resamples)
        row: dict[str, Any] = {"task": name, "site": site, "variant": without.arm.variant} | _counts(task, UNSEEN)
        row |= _gap(values[without.name], values[NOTHING], "without", "no_pretraining", row["test_patients"])
        rows.append(row)
    return rows


def _aurocs(task: Task, features: Mapping[str, np.ndarray], domain: str, resamples: int) -> dict[str, np.ndarray]:
    """AUROC of every draw by encoder, by a linear probe with all labels."""
    mask = task.tests[domain]
    draws, targets = draw_patients(task.patients[mask], number=resamples, seed=0), task.targets
    return {
        name: METRICS[AUROC](
            linear_probe(values[task.train], targets.take(task.train), values[mask]), targets.take(mask), draws
        )
        for name, values in features.items()
    }


def _gap(one: np.ndarray, other: np.ndarray, name: str, other_name: str, patients: int) -> dict[str, float]:
    gap = one - other
    difference, low, high = interval(gap, patients)
    return {
        name: float(one[0]), other_name: float(other[0]), "difference": difference, "low": low, "high": high,
        "p": p_value(gap),
    }  # fmt: skip


def _counts(task: Task, domain: str) -> dict[str, int]:
    mask = task.tests[domain]
    return {
        "train_patients": len(np.unique(task.patients[task.train])),
        "test_patients": len(np.unique(task.patients[mask])),
        "test_images": int(mask.sum()),
    }


def worst_site(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Give the site that gains least by joining, one for each task and variant."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "difference" in row:
            groups.setdefault((row["task"], row["variant"]), []).append(row)
    for group in groups.values():
        yield min(group, key=lambda row: float(row["difference"]))
