"""Whom the leakage audit compares: patients who trained a run, and held-out patients of the same sites."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from fedssl.build_images import held_out_images, simulated_sites
from fedssl.config import REMOTE, Config
from fedssl.data.cache import ImageStore, Subset
from fedssl.data.pseudonym import numbered
from fedssl.errors import ConfigError, DataError

MOST_PATIENTS, MOST_IMAGES = 512, 8  # on a side, and of a patient


@dataclass(frozen=True)
class Cohort:
    """Images of patients who trained and of held-out patients of the same sites.

    Attributes:
        images: as the files hold them, without a simulated scanner.
        patients: [images] numbers (``numbered`` groups of the store).
        member: [images] whether the patient trained.
    """

    images: Subset
    patients: Int[np.ndarray, " images"]
    member: Bool[np.ndarray, " images"]

    @property
    def trained(self) -> Bool[np.ndarray, " patients"]:
        """Whether each patient trained, in the order of their numbers."""
        return self.member[np.unique(self.patients, return_index=True)[1]]


def refuse_images_elsewhere(config: Config) -> None:
    """Refuse a run whose images are not on this machine.

    Raises:
        ConfigError: says what to do.
    """
    root = config["data"]["root"]
    if not root.startswith(REMOTE) and not Path(root).exists():
        raise ConfigError(
            "The images of this run are not on this machine (its data.root is missing here), and an audit compares "
            "patients who trained with patients who did not. Run fedssl audit where the images are; what a whole "
            "federation of hospitals gives away is measured on a simulation of it (fedssl simulate, same settings)."
        )


def cohort_of(config: Config, store: ImageStore, took_part: Sequence[str]) -> Cohort:
    """Choose up to 512 patients who trained, as many who did not, and up to eight images of each.

    Args:
        config: of the run.
        store: its images.
        took_part: names of the sites that trained.

    Raises:
        DataError: these sites are not those of the images, or nobody was held out.
    """
    sites = simulated_sites(config, store)
    missing = [name for name in took_part if name not in sites]
    if missing:
        raise DataError(
            f"The run was trained by {', '.join(missing)}, and the images here are of {', '.join(sites)}. Give the "
            "data.root that holds the images of all sites, or audit a simulation."
        )
    site = store.column("site")
    member = np.zeros(len(store), bool)
    for name in took_part:
        member[sites[name].rows] = True
    held_out = held_out_images(config, store) & np.isin(site, np.unique(site[member])) & ~member
    if not held_out.any():
        raise DataError(
            "No patient of the sites that trained was held out, so there is nobody to compare with (data.test_fraction="
            f"{config['data']['test_fraction']:g}). Train with data.test_fraction=0.3, or audit a simulation that does."
        )
    patients = numbered(store.column("group"))
    rows = np.sort(np.concatenate([sampled(np.flatnonzero(side), patients) for side in (member, held_out)]))
    return Cohort(Subset(store, rows), patients[rows], member[rows])


def sampled(rows: Int[np.ndarray, " images"], patients: Int[np.ndarray, " stored"]) -> Int[np.ndarray, " chosen"]:
    """Choose patients by a fixed seed, and of each images that are spread evenly."""
    names = np.random.default_rng(0).permutation(np.unique(patients[rows]))[:MOST_PATIENTS]
    kept = []
    for name in names:
        own = rows[patients[rows] == name]
        kept.append(own[np.unique(np.linspace(0, len(own) - 1, min(MOST_IMAGES, len(own))).round().astype(int))])
    return np.concatenate(kept)
