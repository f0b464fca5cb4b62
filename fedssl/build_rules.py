"""From a configuration to what a hospital's policy judges."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fedssl.config import Config
from fedssl.site.rules import Proposal


def proposal_of(config: Config, fingerprint: str, number: int, private: bool) -> Proposal:  # noqa: FBT001 - a fact, no switch
    """Tell what a run asks.

    Args:
        config: of the run.
        fingerprint: of it.
        number: of the round.
        private: whether this site trains privately.
    """
    device = str(config["training"]["device"])
    return Proposal(
        method=str(config["method"]["_target_"]).split(".")[-2],
        encoder=str(config["encoder"]["name"]),
        fingerprint=fingerprint,
        number=number,
        min_sites=int(config["federation"]["min_sites"]),
        private=private,
        gpu=device == "cuda" or (device == "auto" and torch.cuda.is_available()),
        settings=dict(_flat(config)),
    )


def _flat(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value
