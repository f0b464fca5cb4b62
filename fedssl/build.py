"""From a configuration to objects: the only place where settings become arguments."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fedssl import progress
from fedssl.aggregation.mean import WeightedMean
from fedssl.augment import Views
from fedssl.config import REMOTE, Config, instantiate_node
from fedssl.data.cache import ImageStore, Subset, select
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.pseudonym import site_secret
from fedssl.data.splits import test_mask
from fedssl.data.store import Source, Store
from fedssl.errors import ConfigError, DataError
from fedssl.methods.base import Method
from fedssl.optim import Schedule
from fedssl.start_weights import load_start_weights
from fedssl.storage import cache_folder
from fedssl.training import pick_device
from fedssl.update import shared_state

POOLED_SITE = "pooled"
_TINY = 16  # pixels on a side: 1 x 1 before the last stage of a residual network


def build_method(config: Config) -> Method:
    """Build encoder and method, untrained, on the chosen device."""
    node = {key: value for key, value in config["encoder"].items() if key != "weights"}
    method = _build_method(config["method"], instantiate_node(node))
    return method.to(pick_device(config["training"]["device"]))


def check_settings(config: Config) -> Method:
    """Build all that a round needs and throw it away, so that a setting that fits nothing is said before work begins.

    Returns:
        The method, untrained.

    Raises:
        ConfigError: says which setting.
    """
    build_views(config)
    Schedule(config["optim"]["schedule"], config["optim"]["warmup"])
    method = build_method(config)
    optimizer_maker(config)(method)
    if config["collapse"]["contrast"] > 1 and not method.weighs_contrast:
        raise ConfigError("collapse.contrast needs method=contrastive_clustering: other losses have no such term.")
    if config["collapse"]["reseed"] and not method.num_prototypes:
        raise ConfigError("collapse.reseed needs a method with prototypes: contrastive_clustering or swav.")
    return method


def _build_method(node: Mapping[str, Any], encoder: nn.Module) -> Method:
    """Build a method, or one that is built on another (``base``)."""
    if "base" not in node:
        return instantiate_node(node, encoder=encoder)
    outer = {key: value for key, value in node.items() if key != "base"}
    return instantiate_node(outer, base=_build_method(node["base"], encoder))


def first_state(config: Config, method: Method) -> dict[str, Tensor]:
    """Return the shared state that a federation starts from: random, or an encoder from ``encoder.weights``.

    Args:
        config: names the weights.
        method: untrained; its encoder takes the weights.

    Raises:
        ConfigError: the weights do not fit the encoder.
        DataError: their file cannot be read.
    """
    weights = config["encoder"]["weights"]
    if weights:
        load_start_weights(method.encoder, Path(weights), in_chans=config["encoder"]["in_chans"])
    return shared_state(method)


def build_views(config: Config) -> Views:
    """Build the maker of augmented views.

    Raises:
        ConfigError: a setting is unusable, or views are too small for mixed precision.
    """
    views: Views = instantiate_node(config["augment"])
    if config["training"]["precision"] == "bf16" and any(scale.edge <= _TINY for scale in views.scales):
        raise ConfigError(
            f"augment.crops of {_TINY} pixels or less need training.precision=float32: on CPUs PyTorch's bf16 "
            "convolution with stride 2 of a 1 x 1 map gives gradients from memory that was never written."
        )
    return views


def image_edge(config: Config) -> int:
    """Pixels on a side of what the encoder is trained for and evaluated with."""
    return build_views(config).edge


def build_aggregator(config: Config) -> WeightedMean:
    """Build the rule that combines the sites' states."""
    return instantiate_node(config["aggregation"])


def optimizer_maker(config: Config) -> Callable[[Method], Optimizer]:
    """Return a function that makes a fresh optimiser for a method."""
    node = {key: value for key, value in config["optim"].items() if key not in {"warmup", "schedule"}}
    return partial(_make_optimizer, node)


def _make_optimizer(node: Mapping[str, Any], method: Method) -> Optimizer:
    return instantiate_node({**node, "_partial_": True})(method)


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


def participants(config: Config, store: ImageStore) -> dict[str, list[str]]:
    """Map each simulated site to the sites of the index whose images it holds.

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
    return {POOLED_SITE: list(chosen)} if config["simulation"]["pool"] else {site: [site] for site in chosen}


def training_images(config: Config, store: ImageStore, members: Sequence[str] | None) -> Subset:
    """Choose the images of the training patients of some sites (None: of all)."""
    data = config["data"]
    held_out = test_mask(store, test_fraction=data["test_fraction"], unseen_sites=data["unseen_sites"])
    here = [members is None or site in members for site in store.column("site").tolist()]
    return select(store, ~held_out & here)


def training_digest(config: Config, store: ImageStore) -> str:
    """Hash which images train: a run is evaluated and resumed only with the split that it was trained with."""
    members = [site for names in participants(config, store).values() for site in names]
    digests = sorted(training_images(config, store, members).column("digest").tolist())
    return hashlib.sha256(b"".join(digests)).hexdigest()
