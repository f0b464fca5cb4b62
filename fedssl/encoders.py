"""Encoders by timm name, with GroupNorm by default: no running statistics to average or to leak."""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GroupNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedssl.errors import ConfigError

_OPTIONS = {  # of timm's models; others could open files or download
    "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "global_pool", "img_size", "patch_size",
    "proj_drop_rate",
}  # fmt: skip


def build_encoder(
    name: str,
    *,
    norm: str = "group",
    norm_groups: int = 32,
    in_chans: int = 1,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make an untrained encoder whose forward maps [batch, in_chans, edge, edge] to features [batch, num_features].

    Args:
        name: a timm model, e.g. ``resnet18``.
        norm: ``group`` (GroupNorm, Wu & He 2018), or ``model`` for the model's own norm.
        norm_groups: groups of each GroupNorm; must divide every width.
        in_chans: image channels.
        options: further arguments of the timm model, such as ``dynamic_img_size`` of vision transformers.
        seed: of the initial weights; equal at all sites, so that averages by index make sense.

    Raises:
        ConfigError: timm does not know the name, or the model takes no other norm.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " List the names with timm.list_models()."
        raise ConfigError(f"encoder.name={name} is not a timm model.{hint}")
    unknown = sorted(set(options or {}) - _OPTIONS)
    if unknown:
        raise ConfigError(f"encoder.options.{unknown[0]} is not allowed; there are {', '.join(sorted(_OPTIONS))}.")
    given = {**(options or {})} | (
        {"norm_layer": partial(GroupNorm, num_groups=norm_groups)} if norm == "group" else {}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            encoder = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **given)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"encoder.name={name} cannot be built with norm={norm}, norm_groups={norm_groups} and "
                f"options={options} ({error}). Choose encoder.norm=model or other groups."
            ) from error
    if any(isinstance(module, _BatchNorm) and module.track_running_stats for module in encoder.modules()):
        raise ConfigError(
            f"encoder.name={name} with norm={norm} keeps BatchNorm running statistics. They are made of "
            "patients' images and never leave a site, so the shared encoder would lack them. Choose encoder.norm=group."
        )
    return encoder


def feature_width(encoder: nn.Module) -> int:
    """Return the width of the encoder's features."""
    return int(encoder.num_features)  # type: ignore[arg-type]
