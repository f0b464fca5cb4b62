"""The encoders that a study compares: where they come from, and which weights they hold."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedssl.build import build_method, image_edge
from fedssl.config import Config
from fedssl.evaluation.judgement import signs_of_collapse
from fedssl.run_folder import RunFolder
from fedssl.start_weights import load_start_weights
from fedssl.update import load_shared_state
from fedssl.weights import identity, trained_checkpoint

SCRATCH, NATURAL, FEDERATED, POOLED, ALONE, WITHOUT = (
    "scratch", "natural", "federated", "pooled", "alone", "without",
)  # fmt: skip
KINDS = (SCRATCH, NATURAL, FEDERATED, POOLED, ALONE)


@dataclass(frozen=True)
class Arm:
    """One way to come by an encoder.

    Attributes:
        kind: ``scratch`` (random weights), ``natural`` (supervised on natural images), ``federated``, ``pooled``,
            ``alone`` (one site by itself) or ``without`` (all sites but one).
        site: of ``alone`` and ``without``.
        variant: name of another pretraining; empty for the study's own.
        folder: run folder of the pretraining; None where there is none.
        missing: why the arm cannot be compared; empty if it can.
    """

    kind: str
    site: str = ""
    variant: str = ""
    folder: Path | None = None
    missing: str = ""

    @property
    def name(self) -> str:
        """For people, unique in a study."""
        titles = {SCRATCH: "no pretraining", NATURAL: "natural images", ALONE: f"{self.site} alone"}
        title = titles.get(self.kind, f"without {self.site}" if self.kind == WITHOUT else self.kind)
        return f"{title} ({self.variant})" if self.variant else title


NOTHING = Arm(SCRATCH).name


@dataclass(frozen=True)
class Encoder:
    """An encoder with its weights.

    Attributes:
        arm: where it comes from.
        module: the encoder.
        edge: pixels on a side of its input.
        identity: hash, round, images seen, method, fingerprint.
        start: makes the module to fine-tune with a seed: other random weights for each where nothing was pretrained.
    """

    arm: Arm
    module: nn.Module
    edge: int
    identity: dict[str, Any]
    start: Callable[[int], nn.Module]

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.arm.name


def load_encoder(arm: Arm, config: Config) -> Encoder:
    """Build an arm's encoder with its weights.

    Args:
        arm: not missing.
        config: of the study; pretrained arms are built by their own run's.

    Raises:
        ConfigError: the weights never trained, or do not fit.
        DataError: they cannot be read.
    """
    if arm.folder is not None:
        run = RunFolder(arm.folder)
        own = run.config()
        own["training"]["device"] = config["training"]["device"]
        method, checkpoint = build_method(own), trained_checkpoint(run.last)
        load_shared_state(method, checkpoint.state)
        known = identity(checkpoint, method) | {"folder": arm.folder.name}
        signs = signs_of_collapse(run, checkpoint.round)
        known["collapse"] = [f"{site}: {'; '.join(texts)}" for site, texts in sorted(signs.items())]
        return _fixed(arm, method.encoder, own, known)
    method = build_method(config)
    drawn = {name: value for name, value in config["encoder"].items() if name not in {"weights", "seed"}}
    facts: dict[str, Any] = {
        "round": 0, "images_seen": 0, "sites": [], "method": "none", "fingerprint": "", "drawn": drawn
    }  # fmt: skip
    if arm.kind == NATURAL:
        path = Path(config["study"]["natural_weights"])
        load_start_weights(method.encoder, path, in_chans=config["encoder"]["in_chans"])
        facts |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "method": "supervised on natural images"}
        return _fixed(arm, method.encoder, config, facts)
    return replace(_fixed(arm, method.encoder, config, facts), start=lambda seed: _random(config, seed))


def _fixed(arm: Arm, module: nn.Module, config: Config, facts: dict[str, Any]) -> Encoder:
    return Encoder(arm, module, image_edge(config), facts, lambda _: module)


def _random(config: Config, seed: int) -> nn.Module:
    return build_method(config | {"encoder": config["encoder"] | {"seed": seed}}).encoder


def chosen(encoders: Sequence[Encoder], *kinds: str) -> list[Encoder]:
    """Pick the encoders of some kinds, in their order."""
    return [encoder for encoder in encoders if encoder.arm.kind in kinds]
