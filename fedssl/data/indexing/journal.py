"""The site's memory of its files: parts of about a thousand files, each whole or absent, with their pixels.

A scan (a *run*) adds parts named ``RRRRR-PPPPP`` in the order of the files; nothing that is written is changed later.
What became of a file is what the newest run says of it. Rows of removed or changed files are *dead* until their part
holds nothing else. A part holds ``files.parquet`` (every file seen), ``rows.parquet`` (every image) and raw pixels by
layout.
"""

import hashlib
import heapq
import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fedssl.data.decoding.record import LAYOUTS
from fedssl.data.indexing.walk import order_of
from fedssl.storage import atomic_folder

FILES = pa.schema([
    ("file", pa.string()), ("bytes", pa.int64()), ("modified_ns", pa.int64()), ("site", pa.string()),
    ("kind", pa.string()), ("reason", pa.string()), ("again", pa.bool_()), ("limits", pa.string()),
    ("risk", pa.string()), ("stated", pa.string()),
])  # fmt: skip
ROWS = pa.schema([
    ("file", pa.string()), ("image", pa.string()), ("frame", pa.int32()), ("site", pa.string()),
    ("patient", pa.string()), ("folder", pa.string()), ("shuffle", pa.int32()), ("folder_shuffle", pa.int32()),
    ("study", pa.string()), ("series", pa.string()), ("modality", pa.string()), ("scanner", pa.string()),
    ("description", pa.string()), ("instance", pa.int64()), ("position", pa.float64()), ("plane", pa.string()),
    ("rows", pa.int32()), ("columns", pa.int32()), ("meaning", pa.string()), ("layout", pa.string()),
    ("slot", pa.int32()),
    ("scale", pa.float32()), ("offset", pa.float32()), ("low", pa.float32()), ("high", pa.float32()),
    ("quantiles", pa.list_(pa.float32())), ("digest", pa.binary(16)), ("hash", pa.binary(32)),
    ("hash_turned", pa.binary(32)), ("flags", pa.string()), ("ordinal", pa.int32()),
])  # fmt: skip
_KNOWN = ["file", "bytes", "modified_ns", "site", "stated", "again", "limits"]
_FILES_IN_A_PART = 1024
_BYTES_IN_A_PART = 128 * 2**20


class Known(NamedTuple):
    """What the journal knows of a file.

    ``facts``: size, time of change, site, and the modality that the manifest states; ``again``: try it at the next
    scan; ``limits``: of time and memory, where these were why it failed; ``ordinal``: its place in its part.
    """

    key: str
    run: int
    facts: tuple[int, int, str, str]
    again: bool
    limits: str
    part: str
    ordinal: int


Dead = dict[str, set[int]]


def parts(folder: Path) -> list[str]:
    """Return the names of all whole parts, oldest first."""
    return sorted(path.name for path in folder.glob("[0-9]*-[0-9]*") if path.is_dir())


def next_run(folder: Path) -> int:
    """Return the number of a new run."""
    return max((int(name.split("-")[0]) for name in parts(folder)), default=-1) + 1


def known_files(folder: Path, dead: Dead) -> Iterator[Known]:
    """Give what is known of each file, sorted by ``order_of``; older entries of a file go to ``dead``."""
    runs = itertools.groupby(parts(folder), key=lambda name: name.split("-")[0])
    streams = [_known_of_run(folder, list(names)) for _, names in runs]
    for _, entries in itertools.groupby(heapq.merge(*streams), key=attrgetter("key")):
        *older, newest = entries
        for entry in older:
            dead[entry.part].add(entry.ordinal)
        yield newest


def _known_of_run(folder: Path, names: list[str]) -> Iterator[Known]:
    for name in names:
        table = pq.read_table(folder / name / "files.parquet", columns=_KNOWN)
        columns = [table[column].to_pylist() for column in table.column_names]
        run = int(name.split("-")[0])
        for ordinal, (file, *facts, again, limits) in enumerate(zip(*columns, strict=True)):
            yield Known(order_of(file), run, tuple(facts), again, limits, name, ordinal)


def empty_dead() -> Dead:
    """Return a table of dead files that holds none."""
    return defaultdict(set)


@dataclass
class PartWriter:
    """Collects files in scan order and writes them part by part.

    Args:
        folder: of the journal.
        run: number of this run.
        edge: pixels on a side of a record.
        make_room: is told the bytes that are about to be written; may raise StorageError.
    """

    folder: Path
    run: int
    edge: int
    make_room: Callable[[int], None] = lambda _bytes: None
    number: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    pixels: dict[str, list[memoryview]] = field(default_factory=lambda: defaultdict(list))
    size: int = 0

    def add(self, file: dict[str, Any], rows: list[dict[str, Any]], pixels: bytes) -> None:
        """Take one file with the rows of its images; ``pixels`` are their records, one after the other."""
        view, start = memoryview(pixels), 0
        for row in rows:
            layout = row["layout"]
            length = record_bytes(layout, self.edge)
            row["slot"], row["ordinal"] = len(self.pixels[layout]), len(self.files)
            self.pixels[layout].append(view[start : start + length])
            start += length
        self.files.append(file)
        self.rows += rows
        self.size += len(pixels)
        if len(self.files) >= _FILES_IN_A_PART or self.size >= _BYTES_IN_A_PART:
            self.commit()

    def commit(self) -> None:
        """Write what was collected as one part.

        Raises:
            StorageError: the disk is full.
        """
        if not self.files:
            return
        self.make_room(self.size)
        sums = {}
        with atomic_folder(self.folder / f"{self.run:05d}-{self.number:05d}", "the image cache") as part:
            for layout, records in self.pixels.items():
                digest = hashlib.blake2b(digest_size=16)
                with (part / f"{layout}.bin").open("wb") as stream:
                    for record in records:
                        stream.write(record)
                        digest.update(record)
                sums[layout] = digest.hexdigest()
            (part / "sums.json").write_text(json.dumps(sums))
            pq.write_table(pa.Table.from_pylist(self.rows, ROWS), part / "rows.parquet")
            pq.write_table(pa.Table.from_pylist(self.files, FILES), part / "files.parquet")
        self.number += 1
        self.files, self.rows, self.pixels, self.size = [], [], defaultdict(list), 0


def record_bytes(layout: str, edge: int) -> int:
    """Bytes of one record of a layout."""
    dtype, channels = LAYOUTS[layout]
    return edge * edge * channels * int(dtype[-1])


def live_rows(folder: Path, part: str, dead: Dead) -> pa.Table:
    """Read the rows of a part whose files are still there and unchanged."""
    table = pq.read_table(folder / part / "rows.parquet")
    if not dead.get(part):
        return table
    gone = pa.array(sorted(dead[part]), pa.int32())
    return table.filter(pa.compute.invert(pa.compute.is_in(table["ordinal"], value_set=gone)))


def live_files(folder: Path, part: str, dead: Dead) -> pa.Table:
    """Read the files of a part that are still there and unchanged."""
    table = pq.read_table(folder / part / "files.parquet")
    keep = [ordinal for ordinal in range(table.num_rows) if ordinal not in dead.get(part, ())]
    return table.take(keep) if len(keep) < table.num_rows else table


def live_parts(folder: Path, dead: Dead) -> list[str]:
    """Return the parts that hold at least one live file."""
    return [name for name in parts(folder) if not _all_dead(folder, name, dead)]


def _all_dead(folder: Path, name: str, dead: Dead) -> bool:
    count = len(dead.get(name, ()))
    return count > 0 and count == pq.read_metadata(folder / name / "files.parquet").num_rows


def drop_dead_parts(folder: Path, dead: Dead, keep: Collection[str]) -> None:
    """Remove parts that hold nothing but dead files, except those that ``keep`` names.

    The newest stays, so that its number is never given to other pixels while a process still maps the old ones.
    """
    for name in parts(folder)[:-1]:
        if name not in keep and _all_dead(folder, name, dead):
            remove_part(folder, name)


def remove_part(folder: Path, name: str) -> None:
    """Remove a part: it is there whole or not at all, whenever the process is killed (what stays is swept)."""
    gone = folder / f".{name}.{os.getpid()}.tmp"
    (folder / name).rename(gone)
    shutil.rmtree(gone)


def damaged_parts(folder: Path) -> list[str]:
    """Read all pixels again and name the parts whose checksum is wrong."""
    return [part for part in parts(folder) if not _sound(folder / part)]


def _sound(part: Path) -> bool:
    try:
        pq.read_table(part / "files.parquet")
        pq.read_table(part / "rows.parquet")
        sums = json.loads((part / "sums.json").read_text())
        return all(_sum(part / f"{layout}.bin") == expected for layout, expected in sums.items())
    except (OSError, ValueError):  # gone, or no Parquet or JSON any more
        return False


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
