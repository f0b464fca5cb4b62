"""Every encoder file as ONNX gives the features of PyTorch in ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch

from fedssl.config import CONFIG_FOLDER, instantiate_node, load
from fedssl.release.onnx import export_onnx

_LARGE = {"resnet18", "resnet50", "resnetv2_152x2_bit", "vit_small_patch16_224"}
ENCODERS = [
    pytest.param(path.stem, marks=pytest.mark.slow) if path.stem in _LARGE else path.stem
    for path in sorted((CONFIG_FOLDER / "encoder").glob("*.yaml"))
]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_exported_encoder_gives_the_same_features_in_another_program(name, tmp_path):
    node = load(["data.root=.", f"encoder={name}"])["encoder"]
    del node["weights"]
    encoder = instantiate_node(node).eval()
    export_onnx(tmp_path / "encoder.onnx", encoder, in_chans=1, edge=64)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    features = session.run(None, {"images": images.numpy()})[0]
    expected = encoder(images).detach().numpy()
    np.testing.assert_allclose(features, expected, atol=1e-3 * np.abs(expected).max())
