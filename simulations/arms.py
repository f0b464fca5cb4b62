"""The arms of a comparison: the same encoder and settings, other hospitals together.

All arms see equally many images: an arm with fewer images passes over them more often. An arm of one site has nobody to
differ from: it trains plainly, whatever rule the federated one follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedssl.build_images import simulated_sites
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.errors import ConfigError

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
    images = {site: len(subset) for site, subset in simulated_sites(config, store).items()}
    largest = max(images, key=lambda site: (images[site], site))
    folder, training = Path(config["run_dir"]), config["training"]
    if training["local_seconds"] is not None and set(config["simulation"]["arms"]) != {FEDERATED}:
        raise ConfigError(
            "With training.local_seconds nobody knows how many images an arm sees. Set simulation.arms=[federated], or "
            "training.local_epochs or training.local_steps."
        )
    arms = [Arm(FEDERATED, f"federated ({len(images)} sites)", folder, list(overrides), len(images))]
    for name in config["simulation"]["arms"]:
        if name == FEDERATED:
            continue
        alone = name == SINGLE_SITE
        own = only_one_site(config, images, overrides, largest if alone else None)
        place = {"run_dir": str(folder / "arms" / name), "simulation.arms": f"[{FEDERATED}]"}
        title = f"{largest} alone" if alone else "all images pooled"
        arms.append(Arm(name, title, folder / "arms" / name, _replace(own, place), 1))
    return arms


def only_one_site(config: Config, images: Mapping[str, int], overrides: Sequence[str], site: str | None) -> list[str]:
    """Overrides for one site alone, or for all images pooled at one site, that see as many images as the federation.

    Args:
        config: of the federation.
        images: number of images of each site.
        overrides: of the federation.
        site: who trains alone; None: all images pooled.
    """
    training, taking = config["training"], config["federation"]["participation"]
    steps = training["local_steps"] and max(1, round(training["local_steps"] * len(images) * taking))
    share = 1.0 if site is None else images[site] / sum(images.values())
    changed = {
        "federation.min_sites": "1",
        "federation.sites": "null",
        "federation.participation": "1.0",
        "federation.equipartition": "local",
        "aggregation": "mean",
        "local": "plain",
        "federation.patience": "null",
        "federation.prototype_patients": "1",
        "training.local_epochs": repr(training["local_epochs"] * taking / share),
        "training.local_steps": str(steps or "null"),
    }
    return _replace(
        overrides, changed | ({"simulation.pool": "true"} if site is None else {"simulation.only": f"'{site}'"})
    )


def _replace(overrides: Sequence[str], changed: dict[str, str]) -> list[str]:
    """Set keys anew; what was said of a group that is now another (``aggregation.hostile``) is dropped with it."""
    groups = tuple(f"{name}." for name in ("aggregation", "local"))
    named = [(text, text.split("=", 1)[0].lstrip("+")) for text in overrides]
    kept = [text for text, key in named if key not in changed and not key.startswith(groups)]
    return kept + [f"{key}={value}" for key, value in changed.items()]
