"""Checkpoints: safetensors with a JSON header, written whole or not at all."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedssl.errors import DataError
from fedssl.storage import atomic_file


@dataclass(frozen=True)
class Checkpoint:
    """The federation after a round: everything that the next round starts from.

    Attributes:
        state: the shared state.
        run: random name of the run; sites file their own state under it.
        round: rounds done.
        fingerprint: of the configuration.
        best_loss: lowest weighted mean loss of a round so far.
        images_seen: images that all sites trained on so far.
        sites: names of the sites of the last round.
        contrast: factor of the contrastive term in the next round.
    """

    state: Mapping[str, Tensor]
    run: str
    round: int
    fingerprint: str
    best_loss: float | None = None
    images_seen: int = 0
    sites: list[str] = field(default_factory=list)
    contrast: float = 1.0


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        StorageError: the disk is full.
    """
    facts = asdict(replace(checkpoint, state={}))
    del facts["state"]
    save_tensors(path, checkpoint.state, facts, "the checkpoint")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DataError: it is missing or damaged.
    """
    state, facts = load_tensors(path)
    if "fingerprint" not in facts:
        raise DataError(f"{path.name} is no fedssl checkpoint. Give a run folder or one of its checkpoints.")
    return Checkpoint(state=state, **facts)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], what: str) -> None:
    """Write named tensors and JSON facts to a safetensors file, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_file(path, what) as stream:
        stream.write(save(contiguous, {"fedssl": json.dumps(dict(facts), sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what ``save_tensors`` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            facts = json.loads((stream.metadata() or {}).get("fedssl", "{}"))
            return {name: stream.get_tensor(name) for name in stream.keys()}, facts  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise DataError(
            f"There is no {path.name} in {path.parent.name}. Has the run finished its first round?"
        ) from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path.name} is damaged or no safetensors file. Take another checkpoint.") from error
