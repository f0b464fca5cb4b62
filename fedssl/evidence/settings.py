"""From a study's configuration to its tasks and rules, and the hash that freezes them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedssl import __version__
from fedssl.build import build_views
from fedssl.build_images import chosen_sites, training_digest
from fedssl.config import Config, fingerprint
from fedssl.data.cache import ImageStore
from fedssl.data.labels import label_table
from fedssl.data.splits import test_mask
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.finetune import Recipe
from fedssl.evaluation.subsets import rehearsal
from fedssl.evaluation.task import Question, Task, make_task
from fedssl.evidence.fits import Tuning
from fedssl.evidence.labels_needed import Shares
from fedssl.storage import write_json

PROTOCOL = "protocol.json"
_NOT_FROZEN = ("encoders", "natural_weights")  # paths; the weights' own hash counts


def questions_of(config: Config) -> dict[str, Question]:
    """Name what is asked; without ``study.tasks`` it is the question of ``evaluation``."""
    plain = {key: config["evaluation"][key] for key in ("label", "where", "covariates")}
    named = config["study"]["tasks"] or {_title(plain["label"]): {}}
    return {name: Question(**(plain | dict(changed))) for name, changed in named.items()}


def _title(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else " + ".join(label)


def labels_path(config: Config) -> Path | None:
    """Return the label file, or None for the labels of the index."""
    return Path(config["evaluation"]["labels"]) if config["evaluation"]["labels"] else None


def task_of(
    config: Config, store: ImageStore, question: Question, *, sites: Sequence[str], unseen_sites: Sequence[str]
) -> Task:
    """Split the labelled images of some sites.

    Raises:
        DataError: the labels do not fit.
    """
    held_out = test_mask(store, test_fraction=config["data"]["test_fraction"], unseen_sites=list(unseen_sites))
    table = label_table(store, labels_path(config), question.labels)
    task = make_task(store, table, question, held_out=held_out, sites=sites, unseen_sites=unseen_sites)
    return rehearsal(task, 0.25) if config["evaluation"]["patients"] == "validation" else task


def tasks_of(config: Config, store: ImageStore) -> dict[str, Task]:
    """Make every task of the study; all must fit before anything is trained.

    Raises:
        DataError: says which task does not.
    """
    sites, tasks = chosen_sites(config, store), {}
    for name, question in questions_of(config).items():
        try:
            tasks[name] = task_of(config, store, question, sites=sites, unseen_sites=config["data"]["unseen_sites"])
        except DataError as error:
            raise DataError(f"Task {name}: {error}") from error
    return tasks


def tasks_without(config: Config, store: ImageStore, question: Question) -> dict[str, Task]:
    """Make for each site the task that trains on the others and tests on it, where its labels allow that."""
    sites, tasks = chosen_sites(config, store), {}
    for site in sites:
        try:
            others = [other for other in sites if other != site]
            tasks[site] = task_of(config, store, question, sites=others, unseen_sites=[site])
        except DataError:
            continue
    return tasks


def shares_of(config: Config) -> Shares:
    """Take the shares of the labels."""
    evaluation = config["evaluation"]
    fractions = sorted({*evaluation["fractions"], 1.0})
    return Shares(fractions, evaluation["seeds"], evaluation["bootstrap"], config["study"]["unseen_test"])


def tuning_of(config: Config, folder: Path) -> Tuning:
    """Take how encoders are fine-tuned.

    Raises:
        ConfigError: an impossible value.
    """
    node = dict(config["study"]["finetune"])
    kinds, parts = node.pop("arms"), node.pop("parts")
    return Tuning({part: Recipe(part=part, **node) for part in parts}, kinds, build_views(config).changes.flip, folder)


def freeze(config: Config, store: ImageStore, folder: Path) -> str:
    """Write the protocol before anything is trained, or check that it is still the same; returns its hash.

    Raises:
        ConfigError: the folder holds a study with another protocol.
    """
    settings = _frozen(config, store)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = folder / PROTOCOL
    if not path.exists():
        write_json(path, {"sha256": digest, "settings": settings}, "the protocol")
        return digest
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["sha256"] != digest:
        moved = sorted(name for name in settings if settings[name] != known["settings"].get(name))
        raise ConfigError(
            f"The study in {folder.name} was frozen as {known['sha256'][:12]}, and this command differs in "
            f"{', '.join(moved)}. Give the same settings, or make another study with name=NAME."
        )
    return digest


def _frozen(config: Config, store: ImageStore) -> dict[str, Any]:
    weights, labels = config["study"]["natural_weights"], labels_path(config)
    return {
        "version": __version__,
        "pretraining": fingerprint(config),
        "training_images_sha256": training_digest(config, store),
        "labels_sha256": _hash(labels) if labels else _labels_of_index(store),
        "natural_weights_sha256": _hash(Path(weights)) if weights else "",
        "study": {name: value for name, value in config["study"].items() if name not in _NOT_FROZEN},
        "evaluation": {name: value for name, value in config["evaluation"].items() if name != "labels"},
    }


def _hash(path: Path) -> str:
    if not path.exists():
        raise DataError("A file of the study is not there. Check evaluation.labels and study.natural_weights.")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _labels_of_index(store: ImageStore) -> str:
    pairs = zip(store.column("digest").tolist(), store.column("label").tolist(), strict=True)
    return hashlib.sha256(b"\0".join(digest + str(label).encode() for digest, label in sorted(pairs))).hexdigest()


def sites_and_patients(store: ImageStore, config: Config) -> dict[str, int]:
    """Count the patients of each site that takes part."""
    sites, patients = store.column("site"), store.column("group")
    return {site: len(np.unique(patients[sites == site])) for site in chosen_sites(config, store)}
