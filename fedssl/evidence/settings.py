"""From a study's configuration to its tasks and rules, and the hash that freezes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedssl.build import build_views
from fedssl.build_images import chosen_sites, held_out_images
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.data.labels import label_table
from fedssl.errors import DataError
from fedssl.evaluation.finetune import Recipe
from fedssl.evaluation.subsets import rehearsal
from fedssl.evaluation.task import Question, Task, make_task
from fedssl.evidence.fits import Tuning
from fedssl.evidence.frozen import labels_path
from fedssl.evidence.labels_needed import Shares


def questions_of(config: Config) -> dict[str, Question]:
    """Name what is asked; without ``study.tasks`` it is the question of ``evaluation``."""
    plain = {key: config["evaluation"][key] for key in ("label", "where", "covariates")}
    named = config["study"]["tasks"] or {_title(plain["label"]): {}}
    return {name: Question(**(plain | dict(changed))) for name, changed in named.items()}


def _title(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else " + ".join(label)


def task_of(
    config: Config, store: ImageStore, question: Question, *, sites: Sequence[str], unseen_sites: Sequence[str]
) -> Task:
    """Split the labelled images of some sites.

    Raises:
        DataError: the labels do not fit.
    """
    held_out = held_out_images(config, store, unseen_sites)
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
    return Tuning({part: Recipe(part=part, **node) for part in parts}, kinds, build_views(config).flip, folder)


def sites_and_patients(store: ImageStore, config: Config) -> dict[str, int]:
    """Count the patients of each site that takes part."""
    sites, patients = store.column("site"), store.column("group")
    return {site: len(np.unique(patients[sites == site])) for site in chosen_sites(config, store)}
