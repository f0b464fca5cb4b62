"""What the arrays of a message are, one entry a tensor: for a hospital that wants to know what left it."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedssl.errors import PolicyError

TensorEntry = dict[str, Any]
_FULL, _BITS = "float32", "bfloat16"  # bfloat16 travels as its bits, in uint16
_ON_THE_WIRE = {_FULL: "float32", "float16": "float16", _BITS: "uint16"}
_NUMBERS = "biuf"


def describe_state(arrays: Mapping[str, np.ndarray], layout: Mapping[str, Any]) -> list[TensorEntry]:
    """Describe the tensors of a packed state (see ``fedssl.packing``) as they travel.

    Args:
        arrays: the flat arrays as they travel, by the dtype that they had before.
        layout: what says how to take them apart: ``layout``, ``precision``, ``difference``.

    Returns:
        One entry a tensor: name, dtype (on the wire), shape, bytes, sha256 (of its bytes), norm (L2 of its values, in
        float64; of the difference, where one travels), difference.

    Raises:
        PolicyError: something is in the arrays that the layout does not name, or the other way round.
    """
    try:
        members = {
            str(dtype): [(str(name), [int(size) for size in shape]) for name, shape in named]
            for dtype, named in json.loads(str(layout["layout"])).items()
        }
        precision, difference = str(layout["precision"]), bool(layout["difference"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _undescribed("its layout cannot be read") from None
    if members.keys() != set(arrays):
        raise _undescribed(f"it holds arrays of {_names(arrays)}, and its layout names {_names(members)}")
    names = [name for named in members.values() for name, _ in named]
    if len(set(names)) < len(names):
        raise _undescribed("its layout names a tensor twice")
    return [
        entry
        for dtype, named in members.items()
        for entry in _described(arrays[dtype], dtype, named, precision, difference=difference)
    ]


def _described(
    flat: np.ndarray, dtype: str, named: list[tuple[str, list[int]]], precision: str, *, difference: bool
) -> Iterator[TensorEntry]:
    expected = _ON_THE_WIRE.get(precision) if dtype == _FULL else dtype
    if flat.dtype.name != expected:
        raise _undescribed(f"it says that {dtype} travels as {precision}, and its numbers are {flat.dtype.name}")
    sizes = [math.prod(shape) for _, shape in named]
    if any(size < 0 for _, shape in named for size in shape) or flat.shape != (sum(sizes),):
        raise _undescribed(f"an array of {flat.size} values does not fit the {sum(sizes)} that its layout names")
    begin = 0
    for (name, shape), size in zip(named, sizes, strict=True):
        part, begin = flat[begin : begin + size], begin + size
        bits = dtype == _FULL and precision == _BITS
        yield _entry(name, part, shape, _BITS if bits else flat.dtype.name, difference=difference)


def describe_counts(arrays: Mapping[str, np.ndarray]) -> list[TensorEntry]:
    """Describe small arrays that travel as they are (mass, usage, sums): entries as of ``describe_state``.

    Raises:
        PolicyError: one holds no numbers.
    """
    return [
        _entry(name, array, list(array.shape), array.dtype.name, difference=False) for name, array in arrays.items()
    ]


def _entry(name: str, values: np.ndarray, shape: list[int], dtype: str, *, difference: bool) -> TensorEntry:
    if values.dtype.kind not in _NUMBERS:
        raise _undescribed(f"tensor {name} holds no numbers ({values.dtype.name})")
    data = values.tobytes(order="A")  # as NumPy writes it
    return {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "norm": _norm(values, bits=dtype == _BITS),
        "difference": difference,
    }


def _norm(values: np.ndarray, *, bits: bool) -> float:
    if bits:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):  # what is not finite is said to be so, not refused
        return float(np.sqrt(np.square(values.astype(np.float64)).sum()))


def _names(found: Mapping[str, Any]) -> str:
    return ", ".join(sorted(found)) or "nothing"


def _undescribed(why: str) -> PolicyError:
    return PolicyError(
        f"A message cannot be entered in the egress manifest: {why}. Nothing left. Install the version of fedssl that "
        "the consortium agreed on; if it happens again, show this sentence to whoever runs the federation."
    )
