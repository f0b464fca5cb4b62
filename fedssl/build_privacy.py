"""The privacy section of a configuration: who trains privately, with which public constants, and whether it holds."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedssl.build import build_views
from fedssl.config import Config
from fedssl.errors import ConfigError
from fedssl.methods.base import Method
from fedssl.methods.separable import require_separable
from fedssl.privacy.accounting import planned_sigma
from fedssl.privacy.cohort import PAIRINGS
from fedssl.privacy.engines.choice import AUTO, ENGINES
from fedssl.privacy.mechanism import Mechanism
from fedssl.site.private_agent import LARGEST_DELTA

PATIENT = "patient"


def by_patient(config: Mapping[str, Any]) -> bool:
    """Tell whether a run has private sites."""
    return config.get("privacy", {}).get("unit", "none") == PATIENT


def is_private(config: Config, site: str) -> bool:
    """Tell whether a site of the run trains privately."""
    chosen = config["privacy"]["sites"]
    return by_patient(config) and (chosen is None or site in chosen)


def nominal_patients(config: Config, site: str) -> int:
    """Public number of training patients that a site is taken to have.

    Raises:
        ConfigError: the run does not say it for this site.
    """
    patients = config["privacy"]["patients"]
    if not isinstance(patients, Mapping):
        return int(patients)
    if site not in patients:
        raise ConfigError(
            f"privacy.patients says nothing of site {site}. Add it: privacy.patients={{{site}: 1000, ...}}."
        )
    return int(patients[site])


def planned_steps(config: Config) -> int:
    """Steps that the noise is planned for: of all rounds and the spare ones."""
    privacy = config["privacy"]
    return math.ceil(config["federation"]["rounds"] * (1.0 + privacy["spare"]) - 1e-9) * int(privacy["steps"])


def build_mechanism(config: Config, site: str) -> Mechanism:
    """Plan the noise of a site's steps from the run's public constants.

    Raises:
        ConfigError: no useful noise keeps the budget.
    """
    privacy = config["privacy"]
    rate = privacy["batch"] / nominal_patients(config, site)
    sigma = planned_sigma(
        epsilon=float(privacy["epsilon"]), delta=float(privacy["delta"]), rate=rate, steps=planned_steps(config)
    )
    return Mechanism(
        sigma, rate, float(privacy["batch"]), int(privacy["steps"]), float(privacy["clip"]),
        float(privacy["vote_share"]), float(privacy["loss_share"]), int(privacy["images"]),
    )  # fmt: skip


def check_privacy(config: Config, method: Method) -> None:
    """Refuse a run whose guarantee would not be true.

    Raises:
        ConfigError: says why.
    """
    if not by_patient(config):
        return
    require_separable(method, in_chans=config["encoder"]["in_chans"], edge=build_views(config).edge)
    problems = [*_unfit_settings(config), *_unfit_numbers(config["privacy"])]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _unfit_settings(config: Config) -> Iterator[str]:
    if config["federation"]["equipartition"] != "local":
        yield "federation.equipartition must be local: column sums carry no noise"
    if config["pairing"] not in PAIRINGS:
        yield f"pairing must be {' or '.join(PAIRINGS)}"
    unknown = sorted(set(config["privacy"]["sites"] or ()) - set(config["federation"]["sites"] or ()))
    if unknown and config["federation"]["sites"]:
        yield f"privacy.sites names {', '.join(unknown)}, which federation.sites does not"
    if config["privacy"]["engine"] not in {AUTO, *ENGINES}:
        yield f"privacy.engine must be auto, {', '.join(ENGINES)}"


def _unfit_numbers(privacy: Mapping[str, Any]) -> Iterator[str]:
    stated = privacy["patients"].values() if isinstance(privacy["patients"], Mapping) else [privacy["patients"]]
    for patients in sorted(set(stated)):
        if privacy["batch"] >= patients:
            yield f"privacy.batch={privacy['batch']} must be below the nominal patients of a site, {patients}"
        if privacy["delta"] * patients > LARGEST_DELTA:
            yield (
                f"privacy.delta={privacy['delta']:g} is too large for {patients} patients: it must be at most "
                f"{LARGEST_DELTA / patients:.1g}, or a mechanism that publishes some patient whole would pass"
            )
