"""Messages between relay and agent on a Unix socket: a JSON header with a length, then the arrays' bytes.

No pickle, and nothing of torch or of the images: this file is also part of the bundle that runs at a hospital as the
relay, which must start in a second.
"""

import base64
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedssl.errors import FederationError

_START = struct.Struct(">8sIQ")  # mark, bytes of the header, bytes of the arrays
_MARK = b"fedssl/1"
_LONGEST_HEADER = 4 * 1024 * 1024
_CHUNK = 1 << 20
MOST_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Frame:
    """A message.

    Attributes:
        facts: kind of the message, overrides: plain JSON.
        content: the records.
    """

    facts: dict[str, Any]
    content: RecordDict


def write_frame(facts: Mapping[str, Any], content: RecordDict) -> list[bytes]:
    """Make the parts of a frame, to be sent one after the other; the arrays are not copied."""
    records, body = list[list[Any]](), list[bytes]()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = [[key, one.dtype, list(one.shape), one.stype, len(one.data)] for key, one in record.items()]
            body += [array.data for array in record.values()]
            records.append([name, "arrays", arrays])
        elif isinstance(record, ConfigRecord | MetricRecord):
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            records.append([name, kind, {key: _jsoned(value) for key, value in record.items()}])
    header = json.dumps({"facts": dict(facts), "records": records}).encode()
    return [_START.pack(_MARK, len(header), sum(map(len, body))), header, *body]


def read_frame(stream: BufferedIOBase, most_bytes: int = MOST_BYTES) -> Frame | None:
    """Read a frame; None where the other side ended before it began one.

    Args:
        stream: of the socket.
        most_bytes: of the arrays.

    Raises:
        FederationError: it is no frame, too large or incomplete.
    """
    start = _exactly(stream, _START.size, may_end=True)
    if not start:
        return None
    mark, header_bytes, body_bytes = _START.unpack(start)
    if mark != _MARK or header_bytes > _LONGEST_HEADER:
        raise FederationError("was sent what is no message of fedssl; use the relay of the same version")
    if body_bytes > most_bytes:
        raise FederationError(
            f"was sent a message of {body_bytes / 1e6:.0f} MB where {most_bytes / 1e6:.0f} MB are allowed. Choose a "
            "smaller encoder or federation.precision=bfloat16, or raise resources.download_mb_per_message in its policy"
        )
    header = _exactly(stream, header_bytes)
    try:
        return _read(json.loads(header), stream, body_bytes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FederationError(f"was sent a malformed message ({type(error).__name__})") from error


def _read(header: Any, stream: BufferedIOBase, left: int) -> Frame:  # noqa: ANN401 - whatever JSON holds
    content = RecordDict()
    for name, kind, entries in header["records"]:
        if kind == "arrays":
            arrays = dict[str, Array]()
            for key, dtype, shape, stype, size in entries:
                if not 0 <= size <= left:
                    raise ValueError(size)
                left -= size
                arrays[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=_exactly(stream, size))
            content[name] = ArrayRecord(arrays)
        elif kind == "config":
            content[name] = ConfigRecord({key: _unjsoned(value) for key, value in entries.items()})
        else:
            content[name] = MetricRecord({key: _unjsoned(value) for key, value in entries.items()})
    if left:
        raise ValueError(left)
    facts = header["facts"]
    if not isinstance(facts, dict):
        raise TypeError("facts")
    return Frame(facts, content)


def _exactly(stream: BufferedIOBase, size: int, *, may_end: bool = False) -> bytes:
    """Read exactly so many bytes; memory grows with what arrives, not with what a header claims."""
    parts, missing = list[bytes](), size
    while missing:
        part = stream.read(min(missing, _CHUNK))
        if not part:
            if may_end and missing == size:
                return b""
            raise FederationError("was sent a message that ends in the middle")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _jsoned(value: Any) -> Any:  # noqa: ANN401 - Flower's own union of values
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _unjsoned(value: Any) -> Any:  # noqa: ANN401 - Flower's own union of values
    if not isinstance(value, dict):
        return value
    return base64.b64decode(value["bytes"]) if "bytes" in value else float(value["float"])


def send_frame(send: Callable[[bytes], None], parts: list[bytes]) -> int:
    """Send the parts of a frame; gives the number of bytes."""
    for chunk in _chunks(parts):
        send(chunk)
    return sum(map(len, parts))


def _chunks(parts: list[bytes]) -> Iterator[bytes]:
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            yield part[start : start + _CHUNK]
