"""Start weights from local files: timm's safetensors, BiT's npz, a checkpoint of our own."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fedssl.build import build_method, first_state
from fedssl.checkpoint import Checkpoint, save_checkpoint
from fedssl.config import fingerprint, load
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError, DataError
from fedssl.start_weights import load_start_weights
from fedssl.update import shared_state

IMAGE = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def _encoder(channels=1, seed=1, name="test_resnet"):
    return build_encoder(name, norm_groups=16, in_chans=channels, seed=seed).eval()


def _three(image):
    return image.repeat(1, 3, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_timm_weights_of_three_channels_give_a_grey_image_the_same_features(tmp_path, channels):
    source = _encoder(channels=3)
    save_file(
        source.state_dict() | {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, tmp_path / "a.safetensors"
    )
    encoder = _encoder(channels=channels, seed=2)
    load_start_weights(encoder, tmp_path / "a.safetensors", in_chans=channels)
    found = encoder(IMAGE if channels == 1 else _three(IMAGE))
    torch.testing.assert_close(found, source(_three(IMAGE)), rtol=1e-4, atol=1e-5)


def test_weights_of_one_channel_serve_three(tmp_path):
    source, encoder = _encoder(), _encoder(channels=3, seed=2)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    load_start_weights(encoder, tmp_path / "a.safetensors", in_chans=3)
    torch.testing.assert_close(encoder(_three(IMAGE)), source(IMAGE), rtol=1e-4, atol=1e-5)


def test_a_federation_starts_from_the_encoder_of_another_runs_checkpoint(tmp_path):
    settings = ["data.root=.", "encoder=tiny", "heads.num_prototypes=8"]
    other = build_method(load([*settings, "seed=5", "method=simclr"]))
    save_checkpoint(tmp_path / "last.safetensors", Checkpoint(shared_state(other), "ab" * 8, 3, "f", images_seen=9))
    config = load([*settings, f"encoder.weights={tmp_path / 'last.safetensors'}"])
    state = first_state(config, build_method(config))
    for name, value in shared_state(other).items():
        assert torch.equal(state[name], value) or not name.startswith("encoder.")
    assert not torch.equal(state["projector.0.weight"], shared_state(other)["projector.0.weight"])
    # a site needs no such file, and its configuration is the same
    config["encoder"]["weights"] = "/nowhere.safetensors"
    build_method(config)
    assert fingerprint(config) == fingerprint(load(settings))


def _npz_of(encoder, path):
    """Write an encoder as Google publishes BiT: HWIO kernels under the names of its own code."""
    arrays = {}

    def put(name, tensor):
        value = tensor.detach().numpy()
        arrays[f"resnet/{name}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value

    stem = encoder.stem.conv.weight
    put("root_block/standardized_conv2d/kernel", stem.repeat(1, 3, 1, 1) / 3 if stem.shape[1] == 1 else stem)
    put("group_norm/gamma", encoder.norm.weight)
    put("group_norm/beta", encoder.norm.bias)
    for i, stage in enumerate(encoder.stages):
        for j, block in enumerate(stage.blocks):
            unit = f"block{i + 1}/unit{j + 1:02d}"
            for letter, number in zip("abc", "123", strict=True):
                put(f"{unit}/{letter}/standardized_conv2d/kernel", getattr(block, f"conv{number}").weight)
                put(f"{unit}/{letter}/group_norm/gamma", getattr(block, f"norm{number}").weight)
                put(f"{unit}/{letter}/group_norm/beta", getattr(block, f"norm{number}").bias)
            if block.downsample is not None:
                put(f"{unit}/a/proj/standardized_conv2d/kernel", block.downsample.conv.weight)
    np.savez(path, **arrays)


def _bit(seed):
    return build_encoder("resnetv2_50x1_bit", norm="model", in_chans=1, seed=seed).eval()


def test_bit_weights_are_read_from_npz_and_the_stem_folded(tmp_path):
    source = _bit(1)
    _npz_of(source, tmp_path / "BiT-M-R50x1.npz")
    encoder = _bit(2)
    load_start_weights(encoder, tmp_path / "BiT-M-R50x1.npz", in_chans=1)
    torch.testing.assert_close(encoder(IMAGE), source(IMAGE), rtol=1e-3, atol=1e-4)


def test_an_npz_for_another_architecture_is_refused_with_the_reason(tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(ConfigError, match="does not hold this encoder"):
        load_start_weights(_bit(0), tmp_path / "other.npz", in_chans=1)
    with pytest.raises(ConfigError, match=r"\.npz file, and this encoder has no such weights"):
        load_start_weights(_encoder(), tmp_path / "other.npz", in_chans=1)


def test_a_mismatch_names_what_differs(tmp_path):
    state = _encoder().state_dict()
    del state["conv1.0.weight"]
    state["layer1.0.conv1.weight"] = torch.zeros(2, 2)
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError) as problem:
        load_start_weights(_encoder(), tmp_path / "a.safetensors", in_chans=1)
    for part in (
        "1 weights are missing (conv1.0.weight)",
        "1 are unknown (extra.weight)",
        "layer1.0.conv1.weight is [2, 2]",
    ):
        assert part in str(problem.value)


def test_weights_with_batchnorm_are_refused_because_their_statistics_must_not_be_shared(tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="trained with BatchNorm"):
        load_start_weights(_encoder(channels=3), tmp_path / "a.safetensors", in_chans=3)


def test_a_missing_or_pickled_file_is_refused_without_opening_it(tmp_path):
    with pytest.raises(DataError, match="not there"):
        load_start_weights(_encoder(), tmp_path / "none.safetensors", in_chans=1)
    torch.save(_encoder().state_dict(), tmp_path / "a.pt")
    with pytest.raises(DataError, match="pickled weights"):
        load_start_weights(_encoder(), tmp_path / "a.pt", in_chans=1)
