"""A site from a configuration: images, labels and settings of a Flower node that is a hospital or stands for one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedssl import progress
from fedssl.build import build_local_rule, build_method, build_views, optimizer_maker
from fedssl.build_images import open_images, root_of, simulated_sites, store_folder, training_images
from fedssl.build_privacy import build_mechanism, by_patient, check_privacy, is_private, nominal_patients
from fedssl.config import Config
from fedssl.data.cache import ImageStore, Subset
from fedssl.data.labels import labels_of_images
from fedssl.errors import ConfigError, DataError, PrivacyError
from fedssl.optim import Schedule
from fedssl.site.agent import SiteAgent
from fedssl.site.ledger import Ledger, default_ledger, folder_name
from fedssl.site.memory import SiteMemory
from fedssl.site.policy import SIMULATED, Profile, profile_of
from fedssl.site.private_agent import PrivateSiteAgent, Terms
from fedssl.site.work import LocalWork

_FEWEST_PATIENTS = 3
_HELD_OUT = 0.3  # share of a hospital's patients that private runs never train on


def build_agent(config: Config, node_config: Mapping[str, Any]) -> SiteAgent:
    """Build the agent of the site that a Flower node is.

    Args:
        config: the configuration.
        node_config: ``site``, ``data-dir``, ``labels``, ``label``, ``burned-in``, ``patient-from``, ``start`` (a
            checkpoint of its own pretraining), ``prototype-patients`` (at least), ``privacy-profile``,
            ``epsilon-cap``, ``patients`` (its own public number of them), ``ledger`` (a folder), ``workers`` and
            ``budget-gb`` (of its cache) where a hospital runs it; ``partition-id`` in a simulation.

    Raises:
        ConfigError: the node is none of the sites.
        DataError: the site has no readable image.
        PrivacyError: the hospital's policy does not admit the run, or its ledger cannot be trusted.
    """
    place = _quiet_place(config, node_config)
    config, site, images = place.config, place.site, place.images
    profile, private = _profile(node_config), is_private(config, site)
    profile.admit(private=private, delta=config["privacy"]["delta"])
    method = build_method(config)
    if private:
        check_privacy(config, method)  # whatever the server checked
    elif "data-dir" in node_config:
        _refuse_plain_run(node_config, site)
    memory = SiteMemory(store_folder(config, place.root) / ("private-state" if private else "state"), site)
    terms = {"terms": _terms(config, node_config, place, profile)} if private else {}
    return (PrivateSiteAgent if private else SiteAgent)(
        site, images, memory, method, optimizer_maker(config),
        build_views(config), _work(config, node_config, profile),
        _training_labels(config, place.store, images, method.classes),
        own_start=Path(str(node_config["start"])) if "start" in node_config and not private else None, **terms,
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Which site a node is, and its training images; the configuration with the hospital's own settings."""

    config: Config
    site: str
    root: Path
    store: ImageStore
    images: Subset


def _quiet_place(config: Config, node_config: Mapping[str, Any]) -> _Place:
    """Find the images; where they cannot be used, a private hospital says so without a count."""
    hospital = "data-dir" in node_config and is_private(config, str(node_config.get("site", "site")))
    try:
        return _place(config, node_config)
    except DataError as error:
        if not hospital:
            raise
        progress.publish(progress.Note(f"This stays here: {error}", alarm=True))
        raise DataError("cannot use its images; its own log says why") from error


def _place(config: Config, node_config: Mapping[str, Any]) -> _Place:
    if "data-dir" in node_config:
        config = _with_own_settings(config, node_config)
        site = str(node_config.get("site", "site"))
        root = root_of(config, str(node_config["data-dir"]), site=site)
        store = open_images(config, root, site=site)
        return _Place(config, site, root, store, training_images(config, store, None))
    root = root_of(config, config["data"]["root"])
    store = open_images(config, root)
    sites = simulated_sites(config, store)
    number = int(node_config.get("partition-id", -1))
    nodes = int(node_config.get("num-partitions", len(sites)))
    if not 0 <= number < len(sites) or nodes != len(sites):
        raise ConfigError(f"is node {number} of {nodes} where the data has {len(sites)} sites; start a node a site")
    site, images = list(sites.items())[number]
    return _Place(config, site, root, store, images)


def _work(config: Config, node_config: Mapping[str, Any], profile: Profile) -> LocalWork:
    training = config["training"]
    patients = max(
        config["federation"]["prototype_patients"], _own_number(node_config, "prototype-patients"),
        profile.prototype_patients,
    )  # fmt: skip
    return LocalWork(
        training["batch_size"], training["local_epochs"], training["local_steps"], training["local_seconds"],
        config["seed"], Schedule(config["optim"]["schedule"], config["optim"]["warmup"]), config["pairing"],
        training["precision"], training["threads"], build_local_rule(config), patients, by_patient(config),
    )  # fmt: skip


def _profile(node_config: Mapping[str, Any]) -> Profile:
    """The hospital's own demands; a simulated site has none."""
    if "data-dir" not in node_config:
        return SIMULATED
    try:
        cap = float(node_config["epsilon-cap"]) if "epsilon-cap" in node_config else None
    except ValueError as error:
        raise ConfigError("has a node configuration whose epsilon-cap is no number") from error
    return profile_of(str(node_config.get("privacy-profile", "research-open")), cap)


def _ledger(node_config: Mapping[str, Any], site: str, delta: float) -> Ledger:
    """A hospital's ledger: it counts all its studies and lies outside every run."""
    path, anchor = default_ledger(site)
    path = Path(str(node_config["ledger"])) / "ledger.jsonl" if "ledger" in node_config else path
    return Ledger(path, anchor, site=site, delta=delta)


def _refuse_plain_run(node_config: Mapping[str, Any], site: str) -> None:
    """Keep patients whose epsilon is counted out of runs that have none.

    Raises:
        PrivacyError: the hospital has a ledger with something in it.
    """
    if _ledger(node_config, site, _profile(node_config).delta).head:
        raise PrivacyError(
            "keeps a privacy ledger, which a run without privacy would make untrue. Start the run with privacy=patient "
            "and this site among privacy.sites"
        )
    text = f"Site {site} trains WITHOUT differential privacy in this run; node-config privacy-profile can demand it."
    progress.publish(progress.Note(text))


def _terms(config: Config, node_config: Mapping[str, Any], place: _Place, profile: Profile) -> Terms:
    """The run's public constants, and the hospital's own; a simulated site's ledger lies in the run."""
    privacy, site, hospital = config["privacy"], place.site, "data-dir" in node_config
    patients = nominal_patients(config, site)
    if hospital:
        ledger, bound = _ledger(node_config, site, profile.delta), store_folder(config, place.root) / "ledger-id"
        declared = _own_number(node_config, "patients") or patients
    else:
        folder = Path(config["run_dir"]) / "ledgers" / folder_name(site)
        ledger = Ledger(folder / "ledger.jsonl", folder / "anchor.json", site=site, delta=float(privacy["delta"]))
        bound, declared = None, patients
    return Terms(
        build_mechanism(config, site), ledger, bound, float(privacy["epsilon"]), profile.cap, patients, declared,
        int(privacy["most_images"]), str(privacy["engine"]), int(config["federation"]["rounds"]),
        simulated=not hospital,
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
        "workers": _own_number(node_config, "workers"),
        "worker_memory_gb": 8.0,
        "decode_timeout_s": 60.0,
        "budget_gb": _own_number(node_config, "budget-gb") or None,
        "labels": node_config.get("labels"),
        "label": str(node_config.get("label", "label")),
    }
    if by_patient(config):  # the run must not choose which patients train: it could ask for them one by one
        own["test_fraction"] = _HELD_OUT
    return {**config, "data": {**config["data"], **own}}
