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
        memory: what the aggregator remembers, such as the moments of a server optimiser.
        mass: [prototypes] soft number of images of each prototype, by site, from its last round.
        answered: the last round in which each site answered well.
        ledgers: newest entry of each site's privacy ledger that the server heard of, as number and hash.
        usual_change: median change of the sites' weights in the last round, in norms of the weights.
        best_round: the round of ``best_loss``; 0: none.
    """

    state: Mapping[str, Tensor]
    run: str
    round: int
    fingerprint: str
    best_loss: float | None = None
    images_seen: int = 0
    sites: list[str] = field(default_factory=list)
    contrast: float = 1.0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    mass: Mapping[str, Tensor] = field(default_factory=dict)
    answered: Mapping[str, int] = field(default_factory=dict)
    ledgers: Mapping[str, str] = field(default_factory=dict)
    usual_change: float | None = None
    best_round: int = 0

    def stale(self, patience: int | None) -> bool:
        """Tell whether ``patience`` rounds have passed without a lower loss; None: that never matters."""
        return patience is not None and self.round - self.best_round >= patience


_ROOMS = ("memory", "mass")  # of tensors beside the state; no parameter has a slash in its name


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        StorageError: the disk is full.
    """
    facts = asdict(replace(checkpoint, state={}, memory={}, mass={}))
    tensors = dict(checkpoint.state)
    for room in _ROOMS:
        tensors |= {f"{room}/{name}": value for name, value in getattr(checkpoint, room).items()}
    kept = {name: value for name, value in facts.items() if name not in {"state", *_ROOMS}}
    save_tensors(path, tensors, kept, "the checkpoint")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DataError: it is missing or damaged.
    """
    tensors, facts = load_tensors(path)
    if "fingerprint" not in facts:
        raise DataError(f"{path.name} is no fedssl checkpoint. Give a run folder or one of its checkpoints.")
    rooms = {
        room: {name.removeprefix(f"{room}/"): value for name, value in tensors.items() if name.startswith(f"{room}/")}
        for room in _ROOMS
    }
    state = {name: value for name, value in sorted(tensors.items()) if "/" not in name}
    return Checkpoint(state=state, memory=rooms["memory"], mass=rooms["mass"], **facts)


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
