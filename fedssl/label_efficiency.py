"""Evaluate a run: its encoder, those of its arms and the baselines, on the same labels, patients and resamples."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedssl import progress
from fedssl.build import build_method, image_edge
from fedssl.build_images import chosen_sites, held_out_images, open_images, training_digest
from fedssl.checkpoint import load_checkpoint
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.data.labels import label_table
from fedssl.errors import DataError
from fedssl.evaluation.features import baselines, embed
from fedssl.evaluation.protocol import Score, compare, probe_encoders, score_cells
from fedssl.evaluation.prototype_sheet import write_sheet
from fedssl.evaluation.task import Question, Task, make_task
from fedssl.methods.base import PROTOTYPES
from fedssl.run_folder import RunFolder
from fedssl.storage import atomic_file, write_json
from fedssl.update import load_shared_state
from fedssl.weights import identity, resolve_run, trained_checkpoint

RESULTS, SHEET = "evaluation.json", "prototypes.png"
PRETRAINED, RANDOM = "federated", "random encoder"
_ARM_TITLES = {"single_site": "single site", "pooled": "pooled"}
_BOTH, _LINEAR = ("linear", "knn"), ("linear",)


def evaluate_run(path: Path, labels: Path | None = None, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Score a run and write ``evaluation.json``, ``evaluation.csv`` and ``prototypes.png`` into its folder.

    Args:
        path: a run folder or a checkpoint in one.
        labels: label table; default: the run's ``evaluation.labels``, else the labels in the index.
        changed: settings of ``evaluation`` that differ from the run's.

    Raises:
        ConfigError: there is no run, or the encoder never trained.
        DataError: the labels do not fit.
    """
    folder, checkpoint_path = resolve_run(path)
    config = folder.config()
    config["evaluation"] |= dict(changed or {})
    checkpoint = trained_checkpoint(checkpoint_path)
    store = open_images(config)
    folder.bind_images(training_digest(config, store))
    task = _task(config, store, labels)
    method = build_method(config)
    edge = image_edge(config)
    features = {RANDOM: embed(method.encoder, store, task.rows, edge=edge)}
    encoders: dict[str, Any] = {RANDOM: {"round": 0, "images_seen": 0}}
    for name, source in _arms(folder, checkpoint_path, config["federation"]["rounds"]).items():
        arm = checkpoint if source == checkpoint_path else trained_checkpoint(source)
        load_shared_state(method, arm.state)
        features[name] = embed(method.encoder, store, task.rows, edge=edge)
        encoders[name] = identity(arm, method)
    load_shared_state(method, checkpoint.state)
    if PROTOTYPES in checkpoint.state:
        write_sheet(folder.path / SHEET, method, store, task.rows, features[PRETRAINED])
    features |= baselines(store, task.rows, task.train, task.images.covariates)
    results = _score(features, encoders, task, config) | {"encoders": encoders, "synthetic": _is_synthetic(config)}
    write_json(folder.path / RESULTS, results, "the evaluation")
    _write_csv(folder.path / "evaluation.csv", results["scores"])
    return results


def _task(config: Config, store: ImageStore, labels: Path | None) -> Task:
    data, evaluation = config["data"], config["evaluation"]
    table = labels or (Path(evaluation["labels"]) if evaluation["labels"] else None)
    held_out = held_out_images(config, store)
    sites = chosen_sites(config, store)
    question = Question(evaluation["label"], evaluation["where"], evaluation["covariates"])
    return make_task(
        store, label_table(store, table, question.labels), question, held_out=held_out, sites=sites,
        unseen_sites=data["unseen_sites"],
    )  # fmt: skip


def _arms(folder: RunFolder, checkpoint: Path, rounds: int) -> dict[str, Path]:
    """Checkpoints to compare by name: the one asked for, and the last one of every arm that was trained."""
    arms = {PRETRAINED: checkpoint}
    for name, title in _ARM_TITLES.items():
        last = RunFolder(folder.path / "arms" / name).last
        if last.exists() and load_checkpoint(last).round < rounds:
            progress.publish(progress.Note(f"The arm {title} is not finished and is left out.", alarm=True))
        elif last.exists():
            arms[title] = last
    return arms


def _score(features: Mapping[str, Any], encoders: Mapping[str, Any], task: Task, config: Config) -> dict[str, Any]:
    evaluation = config["evaluation"]
    cells = probe_encoders(
        features,
        task,
        probes={name: _BOTH if name in encoders else _LINEAR for name in features},
        fractions=evaluation["fractions"],
        seeds=evaluation["seeds"],
    )
    scores, values = score_cells(list(cells), task, resamples=evaluation["bootstrap"])
    others = [name for name in encoders if name != PRETRAINED]
    counts = {domain: int(mask.sum()) for domain, mask in task.tests.items()}
    patients = {domain: len(np.unique(task.patients[mask])) for domain, mask in task.tests.items()}
    return {
        "label": evaluation["label"],
        "classes": task.targets.names,
        "train_patients": len(np.unique(task.patients[task.train])),
        "test_images": counts,
        "test_patients": patients,
        "seeds": evaluation["seeds"],
        "resamples": evaluation["bootstrap"],
        "scores": [asdict(score) for score in scores],
        "differences": [asdict(difference) for difference in compare(values, PRETRAINED, others, patients)],
    }


def labels_fit(config: Config, store: ImageStore) -> bool:
    """Tell whether a run can be evaluated: it names a label file, or its index holds labels.

    Raises:
        DataError: there are labels, but they do not fit; better known before hours of training than after.
    """
    if not config["evaluation"]["labels"] and not any(store.column("label").tolist()):
        return False
    _task(config, store, None)
    return True


def _is_synthetic(config: Config) -> bool:
    return (Path(config["data"]["root"]) / "synthetic.json").exists()


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path, "the evaluation") as stream:
        stream.write(text.getvalue().encode())


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read ``evaluation.json`` of a run; None if it was not evaluated.

    Raises:
        DataError: it is damaged.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} is damaged. Run fedssl evaluate again.") from error
    return results
