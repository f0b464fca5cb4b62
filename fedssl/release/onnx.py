"""An encoder as ONNX, the open format for trained networks: grey images in, features out."""

from pathlib import Path

import torch
from torch import nn

from fedssl.errors import ConfigError
from fedssl.storage import atomic_file


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
        encoder.eval(),
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
