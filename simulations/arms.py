"""The arms of a comparison: the same encoder and settings, other hospitals together.

All arms see equally many images: an arm with fewer images passes over them more often. An arm of one site has nobody to
differ from: it trains plainly, whatever rule the federated one follows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedssl.build_images import simulated_sites
from fedssl.build_privacy import by_patient
from fedssl.config import Config
from fedssl.data.batches import Batches
from fedssl.data.cache import ImageStore, Subset
from fedssl.errors import ConfigError
from fedssl.overrides import quoted

FEDERATED, SINGLE_SITE, POOLED = "federated", "single_site", "pooled"


@dataclass(frozen=True)
class Arm:
    """One training of a comparison.

    Attributes:
        name: ``federated``, ``single_site`` or ``pooled``.
        title: for people.
        folder: its run folder.
        overrides: the overrides to run it with.
        sites: number of simulated sites.
    """

    name: str
    title: str
    folder: Path
    overrides: list[str]
    sites: int


def plan_arms(config: Config, store: ImageStore, overrides: Sequence[str]) -> list[Arm]:
    """Plan the arms that ``simulation.arms`` names; the federated one comes first and owns the run folder."""
    sites = simulated_sites(config, store)
    largest = max(sites, key=lambda site: (len(sites[site]), site))
    folder, training = Path(config["run_dir"]), config["training"]
    if training["local_seconds"] is not None and set(config["simulation"]["arms"]) != {FEDERATED}:
        raise ConfigError(
            "With training.local_seconds nobody knows how many images an arm sees. Set simulation.arms=[federated], or "
            "training.local_epochs or training.local_steps."
        )
    if by_patient(config) and set(config["simulation"]["arms"]) != {FEDERATED}:
        raise ConfigError(
            "With privacy=patient nobody may know how many images a site sees, so that no arm can see equally many. "
            "Set simulation.arms=[federated]; python -m simulations.privacy_table compares runs with and without noise."
        )
    arms = [Arm(FEDERATED, _title(config, sites), folder, list(overrides), len(sites))]
    for name in config["simulation"]["arms"]:
        if name == FEDERATED:
            continue
        alone = name == SINGLE_SITE
        own = only_one_site(config, sites, overrides, largest if alone else None)
        place = {"run_dir": str(folder / "arms" / name), "simulation.arms": f"[{FEDERATED}]"}
        title = f"{largest} alone" if alone else "all images pooled"
        arms.append(Arm(name, title, folder / "arms" / name, _replace(own, place), 1))
    return arms


def only_one_site(config: Config, sites: Mapping[str, Subset], overrides: Sequence[str], site: str | None) -> list[str]:
    """Overrides for one site alone, or for all images pooled at one site, that see as many images as the federation.

    Args:
        config: of the federation.
        sites: images of each site.
        overrides: of the federation.
        site: who trains alone; None: all images pooled.
    """
    federation, own = config["federation"], [_batches(config, images) for images in sites.values()]
    taking = max(federation["min_sites"], math.ceil(federation["participation"] * len(sites) - 1e-9)) / len(sites)
    budget = taking * sum(len(batches) * batches.size for batches in own)  # images in a round, by whole batches
    size = _batches(config, _pooled(list(sites.values())) if site is None else sites[site]).size
    changed = {
        "federation.min_sites": "1",
        "federation.sites": "null",
        "federation.participation": "1.0",
        "federation.equipartition": "local",
        "aggregation": "mean",
        "local": "plain",
        "federation.patience": "null",
        "federation.prototype_patients": "1",
        "training.local_steps": str(max(1, round(budget / size))),
    }
    place = {"simulation.pool": "true"} if site is None else {"simulation.only": quoted(site)}
    return _replace(overrides, changed | place)


def _pooled(parts: Sequence[Subset]) -> Subset:
    return Subset(parts[0].store, np.concatenate([part.rows for part in parts]))


def _batches(config: Config, images: Subset) -> Batches:
    training = config["training"]
    return Batches(
        images, training["batch_size"], training["local_epochs"], seed=0, pairing=config["pairing"],
        steps=training["local_steps"],
    )  # fmt: skip


def _title(config: Config, sites: Mapping[str, Subset]) -> str:
    if config["simulation"]["pool"]:
        return "all images pooled"
    if config["simulation"]["only"] is not None:
        return f"{config['simulation']['only']} alone"
    return f"federated ({len(sites)} sites)"


def _replace(overrides: Sequence[str], changed: dict[str, str]) -> list[str]:
    """Set keys anew; what was said of a group that is now another (``aggregation.hostile``) is dropped with it."""
    groups = tuple(f"{name}." for name in ("aggregation", "local"))
    named = [(text, text.split("=", 1)[0].lstrip("+")) for text in overrides]
    kept = [text for text, key in named if key not in changed and not key.startswith(groups)]
    return kept + [f"{key}={value}" for key, value in changed.items()]
