"""A whole study: every task, every encoder, every question of the protocol, written as JSON, CSV and one page."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedssl import progress
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.evaluation.features import PIXELS
from fedssl.evaluation.statistics import holm
from fedssl.evaluation.targets import Targets
from fedssl.evidence.encoders import (
    ALONE,
    FEDERATED,
    NATURAL,
    POOLED,
    SCRATCH,
    WITHOUT,
    Arm,
    Encoder,
    chosen,
    load_encoder,
)
from fedssl.evidence.joining import benefit_rows, left_out_rows
from fedssl.evidence.labels_needed import (
    Measured,
    Shares,
    convergence_rows,
    delong_rows,
    difference_rows,
    measure,
    reduction_rows,
    score_rows,
)
from fedssl.evidence.sentences import limits, sentences
from fedssl.evidence.settings import questions_of, shares_of, sites_and_patients, tasks_of, tasks_without, tuning_of
from fedssl.evidence.shortcuts import shortcut_rows
from fedssl.evidence.stability import robustness_rows
from fedssl.storage import atomic_file, write_json

RESULTS, TABLE, FITS = "study.json", "study.csv", "fits"
_LEVEL = 0.05  # of p after Holm's correction
_LEAST_PATIENTS = 5  # a bootstrap of fewer says nothing
_UNEQUAL = 0.02
Rows = list[dict[str, Any]]


def run_study(config: Config, store: ImageStore, arms: Sequence[Arm], folder: Path, protocol: str) -> dict[str, Any]:
    """Evaluate trained arms by the protocol and write ``study.json`` and ``study.csv``.

    Args:
        config: of the study.
        store: the images.
        arms: trained, or missing with a reason.
        folder: of the study.
        protocol: its hash.

    Raises:
        ConfigError: an encoder never trained.
        DataError: the labels do not fit.
    """
    torch.set_num_threads(config["training"]["threads"])
    encoders = [load_encoder(arm, config) for arm in arms if not arm.missing]
    compared = [encoder for encoder in encoders if encoder.arm.kind != WITHOUT]
    shares, tuning = shares_of(config), tuning_of(config, folder / FITS)
    rows: dict[str, Rows] = {name: [] for name in _SECTIONS}
    tasks, notes = tasks_of(config, store), list(unequal(encoders))
    for name, task in tasks.items():
        progress.publish(progress.Note(f"Task {name}: {len(task.rows)} labelled images"))
        measured = measure(name, compared, store, task, shares, tuning)
        for section, found in _effects(config, store, measured, encoders, shares.resamples).items():
            rows[section] += found
        notes += measured.notes
    rows["differences"] = judged(rows["differences"], "encoder", "other", "probe", "fraction", "domain")
    rows["joining"] = judged(rows["joining"], "site", "variant")
    rows["left_out"] = judged(rows["left_out"], "site", "variant")
    results = {
        "protocol": protocol,
        **_facts(config, store, shares),
        "arms": [_arm_row(arm, encoders) for arm in arms],
        "tasks": [_task_row(name, task.targets, task) for name, task in tasks.items()],
        "notes": notes,
        **rows,
    }
    results["sentences"], results["limits"] = sentences(results), limits(results)
    plain: dict[str, Any] = _finite(results)
    write_json(folder / RESULTS, plain, "the study")
    _write_table(folder / TABLE, plain["scores"])
    return plain


def _facts(config: Config, store: ImageStore, shares: Shares) -> dict[str, Any]:
    return {
        "synthetic": (Path(config["data"]["root"]) / "synthetic.json").exists(),
        "on": config["evaluation"]["patients"],
        "sites": sites_and_patients(store, config),
        "unseen_sites": config["data"]["unseen_sites"],
        "seeds": shares.seeds,
        "resamples": shares.resamples,
    }


_SECTIONS = (
    "scores", "differences", "delong", "reductions", "convergence", "joining", "left_out", "shortcuts", "robustness",
)  # fmt: skip


def _effects(
    config: Config, store: ImageStore, measured: Measured, encoders: Sequence[Encoder], resamples: int
) -> dict[str, Rows]:
    """Answer every question of the protocol for one task."""
    name, task = measured.name, measured.task
    compared = [encoder for encoder in encoders if encoder.arm.kind != WITHOUT]
    told = [*(e.name for e in chosen(encoders, SCRATCH, NATURAL, FEDERATED, POOLED)), PIXELS]
    tried = chosen(encoders, SCRATCH, NATURAL, FEDERATED, POOLED) if config["study"]["robustness"] else []
    question = questions_of(config)[name]
    outside = tasks_without(config, store, question) if chosen(encoders, WITHOUT) else {}
    return {
        "scores": score_rows(measured),
        "differences": difference_rows(measured, compared),
        "delong": delong_rows(measured, compared),
        "reductions": reduction_rows(measured, compared),
        "convergence": convergence_rows(measured),
        "joining": benefit_rows(name, task, measured.features, encoders, resamples=resamples),
        "left_out": left_out_rows(name, encoders, store, outside, resamples=resamples),
        "shortcuts": shortcut_rows(name, store, task, measured.features, told, resamples=resamples),
        "robustness": robustness_rows(name, tried, store, task, resamples=resamples),
    }


def judged(rows: Rows, *keys: str) -> Rows:
    """Correct p-values across tasks (Holm 1979) and say better, worse or tie; below the noise it is a tie."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        if "p" in row:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group in groups.values():
        for row, corrected in zip(group, holm([row["p"] for row in group]), strict=True):
            row["p_holm"] = corrected
            row["verdict"] = _verdict(row)
    return rows


def unequal(encoders: Sequence[Encoder]) -> Iterator[str]:
    """Name encoders that saw other numbers of images than the federated one of the same pretraining."""
    seen = {e.arm.variant: e.identity["images_seen"] for e in chosen(encoders, FEDERATED)}
    for encoder in chosen(encoders, POOLED, ALONE, WITHOUT):
        images, wanted = encoder.identity["images_seen"], seen[encoder.arm.variant]
        if encoder.arm.kind != WITHOUT and abs(images - wanted) > _UNEQUAL * wanted:
            yield f"{encoder.name} saw {images:,} images, the federated encoder {wanted:,}: not equal."


def _verdict(row: Mapping[str, Any]) -> str:
    if row["test_patients"] < _LEAST_PATIENTS:
        return "too few patients to tell"
    if row["p_holm"] >= _LEVEL or row["low"] <= 0 <= row["high"]:
        return "tie"
    return "better" if row["difference"] > 0 else "worse"


def _arm_row(arm: Arm, encoders: Sequence[Encoder]) -> dict[str, Any]:
    facts = next((encoder.identity for encoder in encoders if encoder.arm == arm), {})
    own = {"encoder": arm.name, "kind": arm.kind, "site": arm.site, "variant": arm.variant, "missing": arm.missing}
    return own | {name: value for name, value in facts.items() if name != "drawn"}


def _task_row(name: str, targets: Targets, task: Any) -> dict[str, Any]:  # noqa: ANN401 - a Task
    kind = "multi-label" if not targets.exclusive else ("binary" if len(targets.names) == 2 else "multi-class")
    tests = {
        d: {"images": int(m.sum()), "patients": len(set(task.patients[m].tolist()))} for d, m in task.tests.items()
    }
    return {
        "task": name, "kind": kind, "outputs": targets.names, "tests": tests,
        "train_patients": len(set(task.patients[task.train].tolist())), "train_images": int(task.train.sum()),
    }  # fmt: skip


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Put null where a number is none: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    listed = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(listed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    with atomic_file(path, "the table of the study") as stream:
        stream.write(text.getvalue().encode())
