"""Settings: composed by Hydra from configs/ and overrides, all checked at once, and hashed.

A configuration is a plain nested dictionary. No class of the library sees one: ``fedssl.build`` takes it apart.
"""

import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedssl import __version__
from fedssl.errors import ConfigError
from fedssl.overrides import CONFIG_FOLDER as CONFIG_FOLDER
from fedssl.overrides import is_choice, keys_of, ready, refuse_missing, refuse_unknown
from fedssl.values import check_values

Config = dict[str, Any]
REMOTE = "dicomweb+"  # the start of a root that is a PACS and no folder
ALLOWED_TARGETS = ("fedssl.", "torch.optim.")
_PATHS = (  # made absolute: runs are read from anywhere
    ("data", "root"), ("data", "store"), ("data", "labels"), ("evaluation", "labels"), ("encoder", "weights"),
    ("study", "natural_weights"), ("study", "encoders"),
)  # fmt: skip
_SHARED_SECTIONS = ("seed", "encoder", "method", "augment", "optim", "aggregation", "local", "pairing", "collapse",
    "privacy",
)  # fmt: skip
_SHARED_KEYS = (
    "training.batch_size", "training.local_epochs", "training.local_steps", "training.local_seconds",
    "training.precision", "federation.rounds", "federation.sites", "federation.participation", "federation.precision",
    "federation.equipartition", "federation.sinkhorn_iterations", "federation.prototype_patients", "simulation.pool",
    "simulation.only", "simulation.partition", "simulation.sites", "simulation.alpha", "simulation.scanner_shift",
    "simulation.shadow", "simulation.canaries",
    "data.edge", "data.sites", "data.unseen_sites", "data.test_fraction", "data.label",
)  # fmt: skip


def load(overrides: Sequence[str]) -> Config:
    """Compose, resolve and check the configuration.

    Args:
        overrides: Hydra overrides such as ``training.batch_size=64`` or ``+experiment=brain_mr``.

    Raises:
        ConfigError: an unknown key (with a suggestion), a missing value or an impossible one; all problems at once.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not CONFIG_FOLDER.is_dir():
        raise ConfigError(
            "The folder configs/ is not beside the package: fedssl was installed without its checkout. Simulations and "
            "federations run from a checkout (pip install -e .)."
        )
    overrides = [ready(override) for override in overrides]
    try:
        refuse_unknown(overrides, _known_keys(tuple(text for text in overrides if is_choice(text))))
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        refuse_missing(OmegaConf.missing_keys(composed))
        config = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"The configuration cannot be composed: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(config, dict)
    plain: Config = {str(key): value for key, value in config.items()}
    for section, key in (
        ("data", "sites"),
        ("data", "unseen_sites"),
        ("federation", "sites"),
        ("privacy", "sites"),
    ):  # a site may be called 3
        names = plain[section][key]
        plain[section][key] = [str(site) for site in names] if isinstance(names, list) else names
    check_values(plain)
    if isinstance(plain["privacy"].get("patients"), dict):
        plain["privacy"]["patients"] = {str(site): count for site, count in plain["privacy"]["patients"].items()}
    for section, key in _PATHS:
        if plain[section][key] and not plain[section][key].startswith(REMOTE):
            plain[section][key] = str(Path(plain[section][key]).absolute())
    return plain


@functools.lru_cache(maxsize=64)
def _known_keys(choices: tuple[str, ...]) -> list[str]:
    """List the keys of the configuration that chosen files make, such as ``("method=simclr",)``."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return list(keys_of(OmegaConf.to_container(compose("config", overrides=list(choices)), resolve=False)))


def overrides_of(text: str) -> list[str]:
    """Split one string of overrides as a shell would: Flower's run configuration holds only scalars."""
    return shlex.split(text)


def as_text(overrides: Sequence[str]) -> str:
    """Join overrides to the one string that ``overrides_of`` takes apart."""
    return shlex.join(overrides)


def fingerprint(config: Config) -> str:
    """Hash what server and sites must agree on; paths, devices, deadlines and evaluation do not count."""
    shared: Config = {section: config[section] for section in _SHARED_SECTIONS}
    shared["encoder"] = {key: value for key, value in config["encoder"].items() if key != "weights"}
    for key in _SHARED_KEYS:
        section, name = key.split(".")
        shared[key] = config[section][name]
    shared["version"] = __version__
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def instantiate_node(node: Mapping[str, Any], **extra: Any) -> Any:  # noqa: ANN401 - whatever the YAML names
    """Call what ``_target_`` names with the node's other values and ``extra``.

    Raises:
        ConfigError: the target is not allowed, or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    target = str(node.get("_target_", ""))
    nested = any("_target_" in str(value) for key, value in node.items() if key != "_target_")
    if (
        nested
        or not target.startswith(ALLOWED_TARGETS)
        or not get_object(target).__module__.startswith(ALLOWED_TARGETS)
    ):
        raise ConfigError(
            f"_target_: {target} is refused; only {' and '.join(ALLOWED_TARGETS)}* may be built from a configuration."
        )
    try:
        return instantiate(dict(node), **extra, _convert_="all", _recursive_=False)
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError(f"{target} cannot be built: {str(error.__cause__ or error).splitlines()[0]}") from error
