"""Start weights of an encoder from a local file: BiT ``.npz``, timm ``.safetensors``, or a checkpoint of ours.

The server reads them once; the sites receive them with the first round.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from timm.models import adapt_input_conv
from torch import Tensor, nn

from fedssl import progress
from fedssl.errors import ConfigError, DataError

_OURS = "encoder."
_SHOWN = 3


def load_start_weights(encoder: nn.Module, path: Path, *, in_chans: int) -> None:
    """Put the weights of a file into an encoder, in place.

    A stem for other channels is folded: from three to one by the sum over the channels, so that a grey image gives what
    it gave as three equal channels. A classifier in the file is left out.

    Args:
        encoder: as ``build_encoder`` makes it.
        path: the file.
        in_chans: channels of the encoder's input.

    Raises:
        DataError: the file is missing or damaged.
        ConfigError: it holds another architecture.
    """
    if not path.exists():
        raise DataError("encoder.weights names a file that is not there. Give a .npz or .safetensors file.")
    if path.suffix == ".npz":
        _load_npz(encoder, path)
    else:
        _load_named(encoder, _read(path), in_chans)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    progress.publish(progress.Note(f"The encoder starts from {path.name} (SHA-256 {digest})"))


def _load_npz(encoder: nn.Module, path: Path) -> None:
    """Weights of Big Transfer (Kolesnikov et al. 2020) and of the original vision transformers, as timm reads them."""
    loader: Any = getattr(encoder, "load_pretrained", None)
    if loader is None:
        raise ConfigError(
            "encoder.weights is a .npz file, and this encoder has no such weights. Choose encoder=resnetv2_50x1_bit or "
            "another of timm's BiT and ViT models, or give a .safetensors file."
        )
    try:
        loader(str(path))
    except (KeyError, RuntimeError, ValueError, AttributeError, OSError, EOFError, BadZipFile) as error:
        raise ConfigError(
            f"encoder.weights does not hold this encoder: {type(error).__name__} while reading it. Choose the encoder "
            "whose name the file has, such as resnetv2_50x1_bit for BiT-M-R50x1.npz."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise DataError(
            "encoder.weights is damaged or no safetensors file. Give a .npz or .safetensors file; pickled weights "
            "(.pt, .pth, .bin) are not opened, because they can run programs."
        ) from error


@torch.no_grad()
def _load_named(encoder: nn.Module, found: Mapping[str, Tensor], in_chans: int) -> None:
    if any(name.startswith(_OURS) for name in found):
        found = {name.removeprefix(_OURS): value for name, value in found.items() if name.startswith(_OURS)}
    config: Any = getattr(encoder, "pretrained_cfg", {})
    stem, classifier = f"{config.get('first_conv')}.weight", config.get("classifier")
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or []))
    found = {name: value for name, value in found.items() if not name.startswith(heads)}
    if stem in found and found[stem].ndim == 4 and found[stem].shape[1] != in_chans:
        found[stem] = _folded(found[stem], in_chans)
    _refuse_mismatch(encoder.state_dict(), found)
    encoder.load_state_dict(found)


def _folded(weight: Tensor, in_chans: int) -> Tensor:
    if weight.shape[1] == 1:
        return weight.repeat(1, in_chans, 1, 1) / in_chans
    return adapt_input_conv(in_chans, weight)


def _refuse_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{name} is {list(found[name].shape)} where {list(value.shape)} is expected"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    problems = [f"{len(missing)} weights are missing ({', '.join(missing[:_SHOWN])})"] if missing else []
    problems += [f"{len(extra)} are unknown ({', '.join(extra[:_SHOWN])})"] if extra else []
    problems += other[:_SHOWN]
    if not problems:
        return
    hint = "Choose the encoder that the file was made for."
    if any("running_mean" in name for name in extra):
        hint = (
            "The file was trained with BatchNorm, whose statistics must not be shared. Choose a model made with "
            "GroupNorm, such as resnet50_gn or resnetv2_50x1_bit."
        )
    raise ConfigError(f"encoder.weights does not fit the encoder: {'; '.join(problems)}. {hint}")
