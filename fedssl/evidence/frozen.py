"""What a study is, as hashes: a protocol that cannot change unseen, and folders that hold what they say."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedssl import __version__
from fedssl.build_images import chosen_sites, training_images
from fedssl.config import Config, fingerprint
from fedssl.data.cache import ImageStore, Subset
from fedssl.data.pseudonym import numbered
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.task import Task
from fedssl.storage import write_json
from fedssl.training import pick_device

PROTOCOL = "protocol.json"
_NOT_FROZEN = ("encoders", "natural_weights", "variants")  # paths and what holds some; hashes count in their place
_FILES = ("encoder.weights=",)


def labels_path(config: Config) -> Path | None:
    """Return the label file, or None for the labels of the index."""
    return Path(config["evaluation"]["labels"]) if config["evaluation"]["labels"] else None


def freeze(config: Config, store: ImageStore, folder: Path) -> str:
    """Write the protocol before anything is trained, or check that it is still the same; returns its hash.

    Raises:
        ConfigError: the folder holds a study with another protocol.
    """
    settings = _frozen(config, store)
    digest = _json_hash(settings)
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
    weights, labels, study = config["study"]["natural_weights"], labels_path(config), config["study"]
    return {
        "version": __version__,
        "pretraining": _decides_weights(config, store),
        "images_sha256": _images(Subset(store, np.arange(len(store)))),
        "unseen_sites": config["data"]["unseen_sites"],
        "test_fraction": config["data"]["test_fraction"],
        "labels_sha256": _file(labels) if labels else _labels_of_index(store),
        "natural_weights_sha256": _file(Path(weights)) if weights else "",
        "variants": {name: [_without_path(text) for text in changed] for name, changed in study["variants"].items()},
        "study": {name: value for name, value in study.items() if name not in _NOT_FROZEN},
        "evaluation": {name: value for name, value in config["evaluation"].items() if name != "labels"},
    }


def weights_key(config: Config, store: ImageStore) -> str:
    """Name a pretraining by everything that decides its weights: fingerprint, then a hash of all else.

    Beside the fingerprint: images with their sites and patients, start weights and labels (as files), device,
    precision, and the rules that decide which answers count.
    """
    return f"{fingerprint(config)}-{_json_hash(_decides_weights(config, store))[:8]}"


def _decides_weights(config: Config, store: ImageStore) -> dict[str, Any]:
    start, labels, training = config["encoder"]["weights"], config["data"]["labels"], config["training"]
    device = pick_device(training["device"]).type
    federation = {name: config["federation"][name] for name in ("min_sites", "patience", "largest_change")}
    return federation | {
        "fingerprint": fingerprint(config),
        "images": _images(training_images(config, store, chosen_sites(config, store))),
        "start": _file(Path(start)) if start else "",
        "labels": _file(Path(labels)) if labels else "",
        "device": device,
        "threads": training["threads"] if device == "cpu" else 0,  # sums on a CPU depend on them
    }


def task_key(store: ImageStore, task: Task) -> str:
    """Hash the images, labels, patients and splits of a task: fits are of these only."""
    parts = [task.targets.values, task.patients, task.train, *(mask for _, mask in sorted(task.tests.items()))]
    digest = hashlib.sha256(_images(Subset(store, task.rows)).encode())
    for part in parts:
        digest.update(part.tobytes())
    digest.update("\0".join([*task.targets.names, *sorted(task.tests)]).encode())
    return digest.hexdigest()


def _images(images: Subset) -> str:
    """Hash images with who holds them, in the order of the store."""
    columns = (images.column("digest"), images.column("site"), numbered(images.column("group")))
    digest = hashlib.sha256()
    for pixels, site, patient in zip(*(column.tolist() for column in columns), strict=True):
        digest.update(pixels + f"\0{site}\0{patient}\0".encode())
    return digest.hexdigest()


def _without_path(text: str) -> str:
    key, _, value = text.partition("=")
    if f"{key.lstrip('+')}=" not in _FILES:
        return text
    return f"{key}={_file(Path(value.strip(chr(39) + chr(34))))}"


def _json_hash(value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file(path: Path) -> str:
    if not path.exists():
        raise DataError(
            f"There is no file {path.name}. Check evaluation.labels, data.labels, encoder.weights and "
            "study.natural_weights."
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _labels_of_index(store: ImageStore) -> str:
    pairs: Sequence[tuple[bytes, str]] = sorted(
        zip(store.column("digest").tolist(), store.column("label").tolist(), strict=True)
    )
    return hashlib.sha256(b"\0".join(digest + str(label).encode() for digest, label in pairs)).hexdigest()
