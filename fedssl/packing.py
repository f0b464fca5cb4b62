"""States on the wire: one flat array a dtype, with names, shapes, precision and a checksum beside it.

Flower moves every array as objects of its own: a state of 300 tensors is several times slower than one flat array.
"""

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedssl.errors import FederationError

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FULL = "float32"
Packed = tuple[ArrayRecord, ConfigRecord]


def pack(state: Mapping[str, Tensor], precision: str = FULL, reference: Mapping[str, Tensor] | None = None) -> Packed:
    """Flatten named tensors into one array per dtype and a layout that says how to take them apart.

    Args:
        state: the tensors.
        precision: of float32 tensors on the wire; bfloat16 travels as its bits (uint16), which Flower can carry.
        reference: state that the receiver knows: at half precision only the difference to it travels, whose rounding is
            far below that of the weights themselves.

    Raises:
        FederationError: a number does not fit half precision.
    """
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        groups.setdefault(str(tensor.dtype).removeprefix("torch."), []).append((name, tensor))
    difference = reference is not None and precision != FULL and groups.keys() == {FULL}
    arrays, digest = {}, hashlib.sha256()
    for dtype, members in groups.items():
        flat = torch.cat([tensor.flatten() for _, tensor in members])
        if reference is not None and difference:
            flat = flat - torch.cat([reference[name].flatten() for name, _ in members])
        arrays[dtype] = Array(_narrowed(flat, precision if dtype == FULL else FULL))
        digest.update(arrays[dtype].data)
    layout = {dtype: [[name, list(tensor.shape)] for name, tensor in members] for dtype, members in groups.items()}
    return ArrayRecord(arrays), ConfigRecord(
        {
            "layout": json.dumps(layout),
            "precision": precision,
            "difference": difference,
            "sha256": digest.hexdigest(),
        }
    )


def _narrowed(flat: Tensor, precision: str) -> np.ndarray:
    if precision == FULL:
        return flat.numpy()
    half = flat.to(HALVES[precision])
    if bool((torch.isinf(half) & torch.isfinite(flat)).any()):
        raise FederationError("its weights do not fit half precision; use federation.precision=bfloat16 or float32")
    return half.view(torch.uint16).numpy() if precision == "bfloat16" else half.numpy()


def unpack(
    arrays: ArrayRecord, layout: ConfigRecord, reference: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Undo ``pack``.

    Raises:
        FederationError: the layout does not fit the arrays, or they were damaged on the way.
    """
    precision, digest = str(layout["precision"]), hashlib.sha256()
    state: dict[str, Tensor] = {}
    for dtype, members in json.loads(str(layout["layout"])).items():
        digest.update(arrays[dtype].data)
        flat = _widened(arrays[dtype].numpy(), precision if dtype == FULL else FULL)
        sizes = [math.prod(shape) for _, shape in members]
        if any(size < 0 for _, shape in members for size in shape):
            raise FederationError("its layout names a negative size")
        if flat.ndim != 1 or len(flat) != sum(sizes):
            raise FederationError(f"one of its arrays holds {flat.numel()} values where its layout names {sum(sizes)}")
        state |= {name: part.reshape(shape) for (name, shape), part in zip(members, flat.split(sizes), strict=True)}
    if digest.hexdigest() != layout["sha256"]:
        raise FederationError("its arrays were damaged on the way (checksum)")
    if not layout["difference"]:
        return state
    return {name: _known(reference, name, value) + value for name, value in state.items()}


def _widened(values: np.ndarray, precision: str) -> Tensor:
    flat = torch.from_numpy(values if values.flags.writeable else values.copy())
    if precision == FULL:
        return flat
    if precision not in HALVES:
        raise FederationError("its numbers have an unknown precision")
    return (flat.view(torch.bfloat16) if precision == "bfloat16" else flat).float()


def _known(reference: Mapping[str, Tensor] | None, name: str, difference: Tensor) -> Tensor:
    value = (reference or {}).get(name)
    if value is None or value.shape != difference.shape:
        raise FederationError(f"tensor {name} is a difference to a tensor that was not sent")
    return value


def size_in_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's arrays."""
    return sum(record.count_bytes() for record in content.array_records.values())
