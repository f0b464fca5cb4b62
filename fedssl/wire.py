"""Messages between server and sites: one flat array a dtype, with names, shapes and checks beside it.

Flower moves every array as objects of its own: a state of 300 tensors is several times slower than one flat array.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedssl.errors import ConfigError, FederationError
from fedssl.update import Update

PROTOCOL = 2
_LONGEST_NAME, _LONGEST_REASON = 64, 500
MOST_CONTRAST = 8.0


@dataclass(frozen=True)
class Order:
    """What the server asks of a site.

    Attributes:
        run: random name of the run.
        number: the round; 0 is the roll call: who is there, with which configuration.
        rounds: of the whole federation.
        fingerprint: of the configuration.
        contrast: factor of the contrastive term in this round.
    """

    run: str
    number: int
    rounds: int
    fingerprint: str
    contrast: float = 1.0


@dataclass(frozen=True)
class Refusal:
    """A site's answer when it does not train: who, and why in one sentence."""

    site: str
    reason: str


def pack(state: Mapping[str, Tensor]) -> tuple[ArrayRecord, ConfigRecord]:
    """Flatten named tensors into one array per dtype and a layout that says how to take them apart."""
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        groups.setdefault(str(tensor.dtype).removeprefix("torch."), []).append((name, tensor))
    arrays = {
        dtype: Array(torch.cat([tensor.flatten() for _, tensor in members]).numpy())
        for dtype, members in groups.items()
    }
    layout = {dtype: [[name, list(tensor.shape)] for name, tensor in members] for dtype, members in groups.items()}
    return ArrayRecord(arrays), ConfigRecord({"layout": json.dumps(layout)})


def unpack(arrays: ArrayRecord, layout: ConfigRecord) -> dict[str, Tensor]:
    """Undo ``pack``.

    Raises:
        FederationError: the layout does not fit the arrays.
    """
    state: dict[str, Tensor] = {}
    for dtype, members in json.loads(str(layout["layout"])).items():
        flat = torch.from_numpy(np.array(arrays[dtype].numpy()))
        sizes = [math.prod(shape) for _, shape in members]
        if any(size < 0 for _, shape in members for size in shape):
            raise FederationError("its layout names a negative size")
        if flat.ndim != 1 or len(flat) != sum(sizes):
            raise FederationError(f"its {dtype} array holds {flat.numel()} values where its layout names {sum(sizes)}")
        for (name, shape), part in zip(members, flat.split(sizes), strict=True):
            state[name] = part.reshape(shape)
    return state


def write_order(order: Order, state: Mapping[str, Tensor] | None) -> RecordDict:
    """Make the content of a message to a site."""
    content = RecordDict({"order": ConfigRecord({"protocol": PROTOCOL, **asdict(order)})})
    if state is not None:
        content["state"], content["layout"] = pack(state)
    return content


def read_order(content: RecordDict, fingerprint: str) -> tuple[Order, dict[str, Tensor]]:
    """Read a server's message at a site.

    Raises:
        ConfigError: the server speaks another protocol or trains with another configuration.
    """
    record = content.config_records["order"]
    if record["protocol"] != PROTOCOL:
        raise ConfigError(
            f"speaks protocol {PROTOCOL}, the server {record['protocol']!r}; install the same fedssl version"
        )
    if record["fingerprint"] != fingerprint:
        raise ConfigError(
            f"has configuration {fingerprint}, the server {record['fingerprint']!r}; use equal versions and overrides"
        )
    contrast = _float(record["contrast"])
    if not 1.0 <= contrast <= MOST_CONTRAST:
        raise ConfigError(
            f"was told to weigh the contrastive term {contrast:.3g} times; 1 to {MOST_CONTRAST:g} is allowed"
        )
    order = Order(str(record["run"]), _int(record["number"]), _int(record["rounds"]), fingerprint, contrast)
    state = unpack(content.array_records["state"], content.config_records["layout"]) if "state" in content else {}
    return order, state


def _int(value: Any) -> int:  # noqa: ANN401 - Flower's own union of config values
    return int(value)


def _float(value: Any) -> float:  # noqa: ANN401 - Flower's own union of metric values
    return float(value)


def write_update(update: Update) -> RecordDict:
    """Make the content of a site's answer."""
    arrays, layout = pack(update.state)
    content = RecordDict({"state": arrays, "layout": layout})
    content["site"] = ConfigRecord({"site": update.site, "examples": update.examples})
    content["metrics"] = MetricRecord({name: float(value) for name, value in update.metrics.items()})
    counts = {"mass": update.mass, "usage": update.usage}
    content["counts"] = ArrayRecord({name: Array(value.numpy()) for name, value in counts.items() if value is not None})
    return content


def write_presence(site: str, facts: Mapping[str, int]) -> RecordDict:
    """Make a site's answer to the roll call."""
    return RecordDict({"site": ConfigRecord({"site": site, **facts})})


def write_refusal(refusal: Refusal) -> RecordDict:
    """Make the content of an answer that says why a site does not train."""
    return RecordDict({"refused": ConfigRecord({"site": refusal.site, "reason": refusal.reason})})


@dataclass(frozen=True)
class Presence:
    """A site's answer to the roll call: its name and how many training images it has."""

    site: str
    images: int


def read_presence(content: RecordDict) -> Presence | Refusal:
    """Read an answer to the roll call.

    Raises:
        FederationError: the answer is malformed.
    """
    with _well_formed():
        if "refused" in content:
            return _read_refusal(content)
        record = content.config_records["site"]
        return Presence(str(record["site"]), _int(record["images"]))


def read_update(content: RecordDict) -> Update | Refusal:
    """Read a site's answer to a round.

    Raises:
        FederationError: the answer is malformed.
    """
    with _well_formed():
        if "refused" in content:
            return _read_refusal(content)
        counts = {
            name: torch.from_numpy(np.array(array.numpy())) for name, array in content.array_records["counts"].items()
        }
        site = content.config_records["site"]
        return Update(
            site=str(site["site"]),
            state=unpack(content.array_records["state"], content.config_records["layout"]),
            examples=_int(site["examples"]),
            mass=counts.get("mass"),
            usage=counts.get("usage"),
            metrics={name: _float(value) for name, value in content.metric_records["metrics"].items()},
        )


@contextmanager
def _well_formed() -> Iterator[None]:
    """Turn whatever a broken or hostile answer raises into one refusal; its text is not repeated."""
    try:
        yield
    except FederationError:
        raise
    except Exception as error:
        raise FederationError(f"its answer is malformed ({type(error).__name__})") from error


def _read_refusal(content: RecordDict) -> Refusal:
    record = content.config_records["refused"]
    return Refusal(str(record["site"])[:_LONGEST_NAME], str(record["reason"])[:_LONGEST_REASON])


def size_in_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's arrays."""
    return sum(record.count_bytes() for record in content.array_records.values())
