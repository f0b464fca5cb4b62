"""Trained encoders on disk: which weights they are, and that they were trained at all."""

import json
from pathlib import Path
from typing import Any

from fedssl.build import build_method
from fedssl.checkpoint import Checkpoint, load_checkpoint
from fedssl.config import Config
from fedssl.errors import ConfigError
from fedssl.methods.base import Method
from fedssl.run_folder import RunFolder
from fedssl.update import load_shared_state, state_digest


def resolve_run(path: Path) -> tuple[RunFolder, Path]:
    """Find the run folder and the checkpoint that a path means: a run folder (its last checkpoint) or a checkpoint.

    Raises:
        ConfigError: there is no run, such as in the folder of a study.
    """
    folder = RunFolder(path.parent.parent if path.suffix == ".safetensors" else path)
    if (folder.path / "protocol.json").exists():
        raise ConfigError(
            f"{folder.path.resolve().name} is a study, not the run of one encoder. Give one of its encoders, a folder "
            f"in study.encoders (default: runs/encoders){_encoders_of(folder.path)}."
        )
    if folder.path.resolve().parent.name == "arms":
        raise ConfigError(f"{folder.path.name} is an arm of a comparison. Evaluate the run that it belongs to.")
    return folder, path if path.suffix == ".safetensors" else folder.last


def _encoders_of(study: Path) -> str:
    """Name the encoders of a study and their folders, as far as its results say."""
    try:
        arms = json.loads((study / "study.json").read_text(encoding="utf-8"))["arms"]
        named = [
            f"{arm['encoder']} ({arm['folder']})" if arm.get("folder")
            else f"{arm['encoder']} (starts with {arm['fingerprint']})"
            for arm in arms
            if arm.get("folder") or arm.get("fingerprint")  # older studies tell only how a folder's name starts
        ]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    return f": {', '.join(named)}" if named else ""


def trained_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint whose encoder was trained.

    Raises:
        ConfigError: it never was.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.round == 0 or checkpoint.images_seen == 0:
        raise ConfigError(
            f"{path.name} holds an encoder that never trained. Evaluate a checkpoint of a finished round."
        )
    return checkpoint


def trained_method(path: Path) -> tuple[Config, Method]:
    """Load a run's configuration and its trained method, on the CPU.

    Raises:
        ConfigError: there is no run, or the encoder never trained.
    """
    folder, checkpoint = resolve_run(path)
    config = folder.config()
    config["training"]["device"] = "cpu"
    method = build_method(config)
    load_shared_state(method, trained_checkpoint(checkpoint).state)
    return config, method


def identity(checkpoint: Checkpoint, method: Method) -> dict[str, Any]:
    """Say which weights are evaluated, so that nobody can mistake them.

    The hash is of the weights' names, shapes and values, equal for equal weights; a checkpoint's file also holds the
    random name of its run.
    """
    return {
        "sha256": state_digest(checkpoint.state),
        "round": checkpoint.round,
        "images_seen": checkpoint.images_seen,
        "sites": checkpoint.sites,
        "method": type(method).__name__,
        "fingerprint": checkpoint.fingerprint,
    }
