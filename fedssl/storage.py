"""Files that are either whole or absent: write beside, flush to the disk, rename."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fedssl import progress
from fedssl.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OTHER_DISK = "Free space, or choose another disk with data.store=FOLDER or run_dir=FOLDER"


@contextlib.contextmanager
def atomic_file(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its name only when the block ends without an error.

    Args:
        path: the file to make or to replace.
        what: the thing in words, for the error ("the image cache").

    Raises:
        StorageError: the disk is full, a quota is spent, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", opener=_private) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _explained(error, what) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    """Only the owner may read: it is patients' data, or made of it."""
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def atomic_folder(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its name, flushed, when the block ends without an error.

    Args:
        path: the folder to make; it must not exist.
        what: the thing in words, for the error.

    Raises:
        StorageError: the disk is full, a quota is spent, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        temporary.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise _explained(error, what) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, what: str, remedy: str = _OTHER_DISK) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            f"The disk is full: {what} could not be written whole and nothing was kept of it. "
            f"{remedy}, and run the command again."
        )
    return StorageError(
        f"{what[0].upper()}{what[1:]} could not be written ({error.strerror}). Check the folder's rights."
    )


def write_json(path: Path, value: Any, what: str) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, what) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and flush it to the operating system."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
    except OSError as error:
        raise _explained(error, "the metrics file") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all whole JSON lines; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def rewrite_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file by ``rows``, atomically."""
    with atomic_file(path, "the metrics file") as stream:
        for row in rows:
            stream.write((json.dumps(row, sort_keys=True, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``: of several processes one works at a time, the others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        raise _explained(error, "the cache folder (FEDSSL_CACHE or data.store)") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.publish(progress.Note("Waiting for another fedssl process that prepares the same images."))
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def private_folder(path: Path, what: str) -> None:
    """Make the folder ``path`` for its owner alone, so that it outlives a power cut; leave one that exists as it is.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        if missing:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in missing:
            _flush(folder.parent)
    except OSError as error:
        raise _explained(error, what, "Free space") from error


def append_durably(path: Path, data: bytes, what: str) -> None:
    """Append ``data`` to a file in an existing folder and flush it to the disk; all of it is kept, or nothing.

    Only a process that is killed can leave a part of it.

    Raises:
        StorageError: the disk is full, a quota is spent, or the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            length = os.fstat(descriptor).st_size
            _append_whole(descriptor, data, length)
        finally:
            os.close(descriptor)
        if length == 0:
            _flush(path.parent)
    except OSError as error:
        raise _explained(error, what, "Free space") from error


def _append_whole(descriptor: int, data: bytes, length: int) -> None:
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, length)
        raise


def write_json_durably(path: Path, value: Any, what: str) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write ``value`` as JSON, atomically, in a private folder; not even a power cut brings the old one back."""
    private_folder(path.parent, what)
    write_json(path, value, what)
    try:
        _flush(path.parent)
    except OSError as error:
        raise _explained(error, what, "Free space") from error


def new_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist, readable as ``mode`` says from its first moment; whole or not at all.

    Raises:
        OSError: it exists or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        path.unlink(missing_ok=True)  # our own, not yet whole
        raise


def new_secret(path: Path, mode: int) -> None:
    """Write 32 random bytes to a file that must not exist.

    Raises:
        OSError: it exists or cannot be written.
    """
    new_file(path, secrets.token_bytes(32), mode)


def state_folder() -> Path:
    """Return where lives what must never be lost, such as privacy ledgers: FEDSSL_STATE, or the user's state folder."""
    base = os.environ.get("FEDSSL_STATE") or Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "fedssl"
    return Path(base).expanduser()


def cache_folder() -> Path:
    """Return where indexes, decoded images and synthetic hospitals live: FEDSSL_CACHE, or the user's cache folder."""
    base = os.environ.get("FEDSSL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fedssl"
    return Path(base).expanduser()
