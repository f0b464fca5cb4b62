"""From a configuration to images: where they lie, which of them train, and at which site."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedssl import progress
from fedssl.config import REMOTE, Config
from fedssl.data.cache import ImageStore, Subset, select
from fedssl.data.canaries import CanarySubset, half_of_patients, planted_patients
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.labels import labels_of_images
from fedssl.data.partition import assign
from fedssl.data.pseudonym import numbered, site_secret
from fedssl.data.scanner_shift import ScannerShift, ShiftedSubset, Together
from fedssl.data.splits import test_mask
from fedssl.data.store import Source, Store
from fedssl.errors import ConfigError, DataError
from fedssl.storage import cache_folder

POOLED_SITE = "pooled"


def store_folder(config: Config, root: Path) -> Path:
    """Return where index and decoded images of a root live."""
    return _store_base(config) / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def open_images(config: Config, root: Path | None = None, *, site: str = "", rescan: bool = False) -> ImageStore:
    """Open the images of a root (default: data.root), indexing and decoding them on first use."""
    store = image_store(config, root, site=site, rescan=rescan)
    return store.open(channels=config["encoder"]["in_chans"], rescan=rescan)


def image_store(config: Config, root: Path | None = None, *, site: str = "", rescan: bool = False) -> Store:
    """Describe the store of a root (default: data.root); a PACS is first mirrored to the site's own disk."""
    data = config["data"]
    root = root or root_of(config, data["root"], site=site, refresh=rescan)
    decoding = Decoding(
        data["edge"], data["burned_in"], data["workers"], data["worker_memory_gb"], data["decode_timeout_s"]
    )
    return Store(store_folder(config, root), Source(root, site, data["patient_from"]), decoding, data["budget_gb"])


def root_of(config: Config, address: str, *, site: str = "", refresh: bool = False) -> Path:
    """Return the folder of the images; a PACS is mirrored to the site's own disk.

    The mirror is ``<patient>/...`` where the site is named, else ``pacs/<patient>/...``.

    Args:
        config: data.filters chooses what is pulled.
        address: a path, or ``dicomweb+https://HOST/PATH``.
        site: name of the one site that owns it, or empty.
        refresh: ask the PACS again though there is a mirror.

    Raises:
        ConfigError: the address or a filter is unusable.
        DataError: the PACS cannot be used, or nothing matches.
    """
    if not address.startswith(REMOTE):
        return Path(address)
    from fedssl.data.dicomweb import pull

    filters = {str(key): str(value) for key, value in (config["data"]["filters"] or {}).items()}
    key = hashlib.sha256(json.dumps([address, sorted(filters.items())]).encode()).hexdigest()[:12]
    root = _store_base(config) / f"pacs-{key}"
    mirror = root / "images" / "pacs"
    if refresh or not mirror.exists():
        pulled = pull(address, mirror, site_secret(root), filters=filters)
        text = f"PACS: {pulled.instances} images match, {pulled.new} new, {pulled.present} were here."
        failures = "; ".join(f"{count} x {reason}" for reason, count in pulled.failed.items())
        progress.publish(progress.Note(text + (f" Not pulled: {failures}" if failures else "")))
    return mirror if site else mirror.parent


def _store_base(config: Config) -> Path:
    return Path(config["data"]["store"]) if config["data"]["store"] else cache_folder()


def chosen_sites(config: Config, store: ImageStore) -> list[str]:
    """Name the sites of the index whose images train.

    Raises:
        DataError: a site of data.sites has no images, or none is left.
    """
    known = sorted(set(store.column("site").tolist()))
    unseen = config["data"]["unseen_sites"]
    chosen = config["data"]["sites"] or [site for site in known if site not in unseen]
    missing = [site for site in [*chosen, *unseen] if site not in known]
    if missing or not chosen:
        raise DataError(
            f"No image belongs to site {', '.join(missing) or '(none)'}; the index holds {', '.join(known)}. "
            "Check data.sites and data.unseen_sites."
        )
    return list(chosen)


def held_out_images(config: Config, store: ImageStore, unseen_sites: Sequence[str] | None = None) -> np.ndarray:
    """Mark the images of test patients, [images] bool; ``unseen_sites`` in place of the run's own if given.

    In a run with differential privacy each patient's side is a matter of that patient alone.

    Raises:
        ConfigError: nobody was held out from a shadow.
    """
    if config["simulation"].get("shadow") is not None:
        raise ConfigError(
            "A shadow of the leakage audit trains on test patients too, so that nobody is held out: it is for fedssl "
            "audit RUN alone. Leave simulation.shadow=null, or give the run that the shadow belongs to."
        )
    data = config["data"]
    unseen = data["unseen_sites"] if unseen_sites is None else list(unseen_sites)
    alone = config.get("privacy", {}).get("unit") == "patient"
    return test_mask(store, test_fraction=data["test_fraction"], unseen_sites=unseen, each_alone=alone)


def training_images(config: Config, store: ImageStore, sites: Sequence[str] | None) -> Subset:
    """Choose the images of the training patients of some sites of the index (None: of all)."""
    held_out = held_out_images(config, store)
    here = np.ones(len(store), bool) if sites is None else np.isin(store.column("site"), sites)
    return select(store, ~held_out & here)


def simulated_sites(config: Config, store: ImageStore) -> dict[str, Subset]:
    """Deal the training images out to the sites of a simulation, by name; see docs/partitions.md.

    Raises:
        ConfigError: the partition is impossible, or ``simulation.only`` is none of its sites.
        DataError: the images cannot be divided so.
    """
    simulation, data = config["simulation"], config["data"]
    images = simulated_images(config, store)
    labels = images.column("label")
    if simulation["partition"] == "dirichlet" and data["labels"]:
        labels = labels_of_images(store, Path(data["labels"]), data["label"])[images.rows]
    names = assign(
        simulation["partition"], groups=images.column("group"), labels=labels, modalities=images.column("modality"),
        natural_sites=images.column("site"), sites=simulation["sites"], alpha=simulation["alpha"], seed=config["seed"],
    )  # fmt: skip
    shift = simulation["scanner_shift"]
    sites = {
        name: _planted(config, _through_scanner(Subset(store, images.rows[names == name]), name, shift, config["seed"]))
        for name in sorted(set(names.tolist()))
    }
    if simulation["pool"]:
        return {POOLED_SITE: Together.of(list(sites.values())) if shift or simulation.get("canaries") else images}
    if simulation["only"] is None:
        return sites
    if str(simulation["only"]) not in sites:
        raise ConfigError(f"simulation.only={simulation['only']} is none of the sites {', '.join(sites)}.")
    return {str(simulation["only"]): sites[str(simulation["only"])]}


def simulated_images(config: Config, store: ImageStore) -> Subset:
    """Choose the images that a simulation trains on.

    Those of the training patients; of a shadow (``simulation.shadow``) those of a random half of all patients of the
    sites, training and test.
    """
    sites, shadow = chosen_sites(config, store), config["simulation"].get("shadow")
    if shadow is None:
        return training_images(config, store, sites)
    here = np.flatnonzero(np.isin(store.column("site"), sites))
    patients = numbered(store.column("group"))[here]
    return Subset(store, here[half_of_patients(patients, store.column("site")[here], shadow, config["seed"])])


def canary_patients(config: Config, store: ImageStore) -> np.ndarray:
    """Number the patients (``numbered`` groups of the store) whose images a shadow replaces by patterns."""
    here = np.isin(store.column("site"), chosen_sites(config, store))
    count = config["simulation"].get("canaries", 0)
    return planted_patients(numbered(store.column("group"))[here], count, config["seed"])


def _planted(config: Config, images: Subset) -> Subset:
    if not config["simulation"].get("canaries"):
        return images
    patients = numbered(images.store.column("group"))[images.rows]
    return CanarySubset.of(images, patients, canary_patients(config, images.store), config["seed"])


def _through_scanner(images: Subset, site: str, strength: float, seed: int) -> Subset:
    return ShiftedSubset(images.store, images.rows, ScannerShift.draw(site, strength, seed)) if strength else images


def training_digest(config: Config, store: ImageStore) -> str:
    """Hash which images train: a run is evaluated and resumed only with the split that it was trained with."""
    digests = sorted(simulated_images(config, store).column("digest").tolist())
    return hashlib.sha256(b"".join(digests)).hexdigest()
