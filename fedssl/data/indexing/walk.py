"""Every file below a folder, in a fixed order and with flat memory, whatever the folder holds."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedssl.errors import DataError

_NO_TEXT = "has a name that is no text; rename it"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, or something that stands in for files that cannot be reached.

    Attributes:
        file: path below the root with ``/``; bytes that are no text are written as backslash escapes.
        bytes: size.
        modified_ns: time of the last change.
        trouble: why it cannot be read, or empty.
    """

    file: str
    bytes: int
    modified_ns: int
    trouble: str = ""


def order_of(file: str) -> str:
    """Return the sorting key of a path: folders before longer names, as ``walk`` gives them."""
    return file.replace("/", "\0")


def walk(root: Path) -> Iterator[Entry]:
    """Give every file below ``root``, sorted by ``order_of``; memory holds one folder's names at a time a level.

    Links are followed unless they lead back to a folder above. Hidden files are passed over; tables and other files are
    given like all others: what they are is decided by their content.

    Raises:
        DataError: ``root`` is no folder or may not be read.
    """
    try:
        first = os.stat(root)  # noqa: PTH116
        yield from _below(os.fspath(root), "", ((first.st_dev, first.st_ino),), top=True)
    except OSError as error:
        raise DataError(
            f"data.root is neither a folder nor a manifest file ({error.strerror}). Check data.root=FOLDER and its "
            "rights."
        ) from None


def _below(folder: str, prefix: str, above: tuple[tuple[int, int], ...], *, top: bool = False) -> Iterator[Entry]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entries, key=lambda entry: _as_text(entry.name))
    except OSError as error:
        if top:
            raise
        yield Entry(f"{prefix}(folder)", 0, 0, f"is a folder that cannot be read ({error.strerror})")
        return
    for entry in names:
        if entry.name.startswith("."):
            continue
        name = _as_text(entry.name)
        file = f"{prefix}{name}"
        try:
            status = entry.stat()
        except OSError as error:
            lost = "is a link to nothing" if entry.is_symlink() else f"is unreachable ({error.strerror})"
            yield Entry(file, 0, 0, lost)
            continue
        me = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode) and me not in above and name == entry.name:
            yield from _below(entry.path, f"{file}/", (*above, me))
        else:
            yield _file(file, status, text=name == entry.name)


def _as_text(name: str) -> str:
    """Write bytes that are no text as backslash escapes; such names are sorted as they are written."""
    return name.encode("utf-8", "backslashreplace").decode()


def _file(file: str, status: os.stat_result, *, text: bool) -> Entry:
    if stat.S_ISDIR(status.st_mode):
        return Entry(file, 0, 0, "is a link to a folder above it" if text else _NO_TEXT)
    if not stat.S_ISREG(status.st_mode):
        return Entry(file, 0, 0, "is no regular file")
    return Entry(file, status.st_size, status.st_mtime_ns, "" if text else _NO_TEXT)
