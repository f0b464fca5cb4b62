"""A site from a configuration: images, labels and settings of a Flower node that is a hospital or stands for one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedssl import progress
from fedssl.build import build_local_rule, build_method, build_views, optimizer_maker
from fedssl.build_images import open_images, root_of, simulated_sites, store_folder, training_images
from fedssl.config import Config
from fedssl.data.cache import ImageStore, Subset
from fedssl.data.labels import labels_of_images
from fedssl.errors import ConfigError
from fedssl.optim import Schedule
from fedssl.site.agent import SiteAgent
from fedssl.site.memory import SiteMemory
from fedssl.site.work import LocalWork

_FEWEST_PATIENTS = 3


def build_agent(config: Config, node_config: Mapping[str, Any]) -> SiteAgent:
    """Build the agent of the site that a Flower node is.

    Args:
        config: the configuration.
        node_config: ``site``, ``data-dir``, ``labels``, ``label``, ``burned-in``, ``patient-from``, ``start`` (a
            checkpoint of its own pretraining) and ``prototype-patients`` (at least) where a hospital runs it;
            ``partition-id`` in a simulation.

    Raises:
        ConfigError: the node is none of the sites.
        DataError: the site has no readable image.
    """
    if "data-dir" in node_config:
        config = _with_own_settings(config, node_config)
        site = str(node_config.get("site", "site"))
        root = root_of(config, str(node_config["data-dir"]), site=site)
        store = open_images(config, root, site=site)
        images = training_images(config, store, None)
    else:
        root = root_of(config, config["data"]["root"])
        store = open_images(config, root)
        sites = simulated_sites(config, store)
        number = int(node_config.get("partition-id", -1))
        nodes = int(node_config.get("num-partitions", len(sites)))
        if not 0 <= number < len(sites) or nodes != len(sites):
            raise ConfigError(f"is node {number} of {nodes} where the data has {len(sites)} sites; start a node a site")
        site, images = list(sites.items())[number]
    training = config["training"]
    patients = max(config["federation"]["prototype_patients"], _own_number(node_config, "prototype-patients"))
    work = LocalWork(
        training["batch_size"], training["local_epochs"], training["local_steps"], training["local_seconds"],
        config["seed"], Schedule(config["optim"]["schedule"], config["optim"]["warmup"]), config["pairing"],
        training["precision"], training["threads"], build_local_rule(config), patients,
    )  # fmt: skip
    own_start = Path(str(node_config["start"])) if "start" in node_config else None
    method = build_method(config)
    return SiteAgent(
        site, images, SiteMemory(store_folder(config, root) / "state", site), method, optimizer_maker(config),
        build_views(config), work, _training_labels(config, store, images, method.classes), own_start=own_start,
    )  # fmt: skip


def _own_number(node_config: Mapping[str, Any], name: str) -> int:
    try:
        return int(node_config.get(name, 0))
    except ValueError as error:
        raise ConfigError(f"has a node configuration whose {name} is no whole number") from error


def _training_labels(config: Config, store: ImageStore, images: Subset, classes: Sequence[str]) -> np.ndarray:
    """Labels of the training images, read only where the method learns from them; empty where unknown.

    A class that fewer than three training patients of the site share is left out: the run chooses the classes, and
    must not learn from them whether one patient is here.
    """
    if not classes:
        return np.full(len(images), "")
    data = config["data"]
    every = labels_of_images(store, Path(data["labels"]) if data["labels"] else None, data["label"])
    labels, patients = every[images.rows], images.column("patient")
    for name in classes:
        if len(np.unique(patients[labels == name])) < _FEWEST_PATIENTS:
            labels = np.where(labels == name, "", labels)
    used = np.isin(labels, list(classes))
    text = f"{used.sum()} of {len(labels)} training images have a label that three patients or more share."
    progress.publish(progress.Note(text, alarm=not used.any() and bool((every != "").any())))
    return labels


def _with_own_settings(config: Config, node_config: Mapping[str, Any]) -> Config:
    """Let the hospital, not whoever starts the run, say what its files are, which it lets in and where they lie."""
    own = {
        "burned_in": str(node_config.get("burned-in", "refuse")),
        "patient_from": str(node_config.get("patient-from", "auto")),
        "store": None,
        "filters": None,
        "labels": node_config.get("labels"),
        "label": str(node_config.get("label", "label")),
    }
    return {**config, "data": {**config["data"], **own}}
