"""A process that decodes files and nothing else: if a decoder crashes, hangs or eats memory, only it is lost.

Started by ``fedssl.data.decoding.workers`` with a socket and the settings as arguments. Requests are JSON; answers are
JSON and, in a second message, the pixels. No pickle: what a subverted decoder sends is only ever read as data.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import stat
import sys
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import pydicom

from fedssl.data.decoding.burned_in import Policy
from fedssl.data.decoding.dicom import is_dicom
from fedssl.data.decoding.image import open_file, recognised
from fedssl.data.decoding.record import record

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: die with the parent, in the middle of a file too
_MOST_BYTES = 2**31 - 2**20


def main() -> None:
    """Answer requests until the other side closes."""
    settings = json.loads(sys.argv[2])
    warnings.simplefilter("ignore")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # hospitals' files break rules all the time
    logging.disable(logging.CRITICAL)  # decoders' own words may hold values of tags
    limit = int(settings["memory_gb"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold pixels
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    link = Connection(int(sys.argv[1]))
    link.send_bytes(b'"ready"')
    while True:
        try:
            request = json.loads(link.recv_bytes())
        except (EOFError, OSError):
            return
        header, pixels = answer(request, settings["edge"], Policy(settings["burned_in"]))
        link.send_bytes(header)
        link.send_bytes(pixels)


def answer(request: dict[str, Any], edge: int, policy: Policy) -> tuple[bytes, bytes]:
    """Decode one file.

    Args:
        request: ``path``, ``modality``, and ``bytes`` and ``modified_ns`` as the scan saw them.
        edge: pixels on a side of the records.
        policy: what to do with images that may show text.

    Returns:
        A JSON object with ``kind`` (image, foreign, unreadable), ``reason``, ``facts`` and ``records``; and the pixels
        of all records, one after the other.
    """
    try:
        found = _decode(request, edge, policy)
    except MemoryError:
        found = {**_unreadable("needs more memory than data.worker_memory_gb allows"), "limited": True}
    except OSError as error:
        found = {**_unreadable(reason_of(error)), "again": error.errno is not None}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - decoders raise anything, Rust's even PanicException
        found = _unreadable(reason_of(error))
    pixels = b"".join(found.pop("pixels", ()))
    return json.dumps(found).encode(), pixels


def _decode(request: dict[str, Any], edge: int, policy: Policy) -> dict[str, Any]:
    if request["trouble"]:
        raise ValueError(request["trouble"])
    path = request["path"]
    name = os.path.basename(path)  # noqa: PTH119
    data = _read(path, name)
    opened = None if data is None else open_file(data, name, modality=request["modality"], policy=policy)
    if opened is None:
        return {"kind": "foreign", "reason": "", "records": []}
    header, pictures = opened
    records, pixels = [], []
    for picture in pictures:
        made = dict(vars(record(picture, edge)))
        pixels.append(made.pop("data"))
        records.append({key: value.hex() if isinstance(value, bytes) else value for key, value in made.items()})
    after = os.stat(path)  # noqa: PTH116
    if (after.st_size, after.st_mtime_ns) != (request["bytes"], request["modified_ns"]):
        return {**_unreadable("changed while it was read"), "again": True}
    if not records:
        return _unreadable("holds no frame")
    return {"kind": "image", "reason": "", "facts": asdict(header), "records": records, "pixels": pixels}


def _read(path: str, name: str) -> bytes | None:
    """Read a regular file whole (a pipe would never end); None if neither name nor start say that it is an image."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        start = stream.read(132)
        if not (is_dicom(start) or recognised(name.lower())):
            return None
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"is larger than {_MOST_BYTES} bytes")
        return start + stream.read()


def _unreadable(reason: str) -> dict[str, Any]:
    return {"kind": "unreadable", "reason": reason, "records": []}


def reason_of(error: BaseException) -> str:
    """Say why a file cannot be read, without its path or content."""
    if isinstance(error, ValueError) and str(error).startswith(("is ", "holds ", "has a name ")):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, PermissionError):
        return "may not be read (permission)"
    return f"cannot be decoded ({type(error).__name__})"


if __name__ == "__main__":
    main()
