"""An encoder as ONNX, the open format for trained networks: grey images in, features out."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedssl.errors import ConfigError
from fedssl.storage import atomic_file


class _Framed(nn.Module):
    """Zeros around an image by concatenation.

    ONNX Runtime fuses a Pad with zeros into the MaxPool after it, which pads with minus infinity: BiT's stem would
    give other features there.
    """

    def __init__(self, padding: Sequence[int]) -> None:
        super().__init__()
        self.left, self.right, self.top, self.bottom = padding

    def forward(self, images: Tensor) -> Tensor:
        """Pad [batch, channels, rows, columns]."""
        zero = images[..., :1] * 0.0
        images = torch.cat([zero] * self.left + [images] + [zero] * self.right, dim=3)
        zero = images[:, :, :1] * 0.0
        return torch.cat([zero] * self.top + [images] + [zero] * self.bottom, dim=2)


def _without_padding_modules(encoder: nn.Module) -> nn.Module:
    """Copy an encoder with another module in the place of each ``ConstantPad2d`` of zeros."""
    copied = copy.deepcopy(encoder)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ConstantPad2d) and child.value == 0.0:
                setattr(parent, name, _Framed(child.padding))
    return copied


def export_onnx(path: Path, encoder: nn.Module, *, in_chans: int, edge: int) -> None:
    """Write ``encoder`` for images [batch, in_chans, edge, edge], standardised as ``fedssl.augment.standardise`` does.

    Args:
        path: the ONNX file.
        encoder: on the CPU.
        in_chans: image channels.
        edge: pixels on a side, those of the evaluation.

    Raises:
        ConfigError: the extra ``export`` is not installed.
        StorageError: the disk is full.
    """
    try:
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError as error:
        raise ConfigError("ONNX export needs two more packages: pip install 'fedssl[export]'.") from error
    images = torch.zeros(2, in_chans, edge, edge)
    program = torch.onnx.export(
        _without_padding_modules(encoder).eval(),
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with atomic_file(path, "the ONNX file") as stream:
        stream.write(program.model_proto.SerializeToString())
