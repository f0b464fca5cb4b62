"""From a configuration to objects: the only place where settings become arguments."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fedssl.aggregation.base import Aggregator
from fedssl.augment import Views, noise_images
from fedssl.config import Config, instantiate_node
from fedssl.errors import ConfigError
from fedssl.local.base import LocalRule
from fedssl.methods.base import Method
from fedssl.methods.separable import SeparableMethod
from fedssl.optim import Schedule
from fedssl.start_weights import load_start_weights
from fedssl.training import pick_device
from fedssl.update import shared_state

_CALIBRATION_IMAGES = 64
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
    if config["federation"]["equipartition"] != "local" and not (method.num_prototypes and method.equipartitions):
        raise ConfigError(
            "federation.equipartition needs prototypes and one equipartition of all images: "
            "method=contrastive_clustering or swav with method.modalities=pooled."
        )
    if build_aggregator(config).robust and config["federation"]["equipartition"] != "local":
        raise ConfigError(
            "federation.equipartition steers every site by what the others claim, which a robust aggregation must not "
            "trust. Choose federation.equipartition=local, or aggregation=mean."
        )
    build_local_rule(config)
    return method


def _build_method(node: Mapping[str, Any], encoder: nn.Module) -> Method:
    """Build a method, or one that is built on another (``base``)."""
    if "base" not in node:
        return instantiate_node(node, encoder=encoder)
    outer = {key: value for key, value in node.items() if key != "base"}
    return instantiate_node(outer, base=_build_method(node["base"], encoder))


def first_state(config: Config, method: Method) -> dict[str, Tensor]:
    """Return the shared state that a federation starts from: random, or an encoder from ``encoder.weights``.

    Its tensors are in the order of their names, as they come from a checkpoint: sums over them depend on the order.

    Args:
        config: names the weights.
        method: untrained; its encoder takes the weights.

    Raises:
        ConfigError: the weights do not fit the encoder.
        DataError: their file cannot be read.
    """
    weights, in_chans = config["encoder"]["weights"], config["encoder"]["in_chans"]
    if weights:
        load_start_weights(method.encoder, Path(weights), in_chans=in_chans)
    if isinstance(method, SeparableMethod):
        method.calibrate(noise_images(_CALIBRATION_IMAGES, in_chans, image_edge(config), seed=config["seed"]))
    return dict(sorted(shared_state(method).items()))


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


def build_aggregator(config: Config) -> Aggregator:
    """Build the rule that combines the sites' states."""
    return instantiate_node(config["aggregation"])


def build_local_rule(config: Config) -> LocalRule:
    """Build what a site does against drift."""
    return instantiate_node(config["local"])


def optimizer_maker(config: Config) -> Callable[[Method], Optimizer]:
    """Return a function that makes a fresh optimiser for a method."""
    node = {key: value for key, value in config["optim"].items() if key not in {"warmup", "schedule"}}
    return partial(_make_optimizer, node)


def _make_optimizer(node: Mapping[str, Any], method: Method) -> Optimizer:
    return instantiate_node({**node, "_partial_": True})(method)
