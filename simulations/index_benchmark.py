"""An index of many images: ``python -m simulations.index_benchmark [--rows 1000000] [--files 200000]``.

1. A journal of ``rows`` images is fabricated (empty records of 64 x 64 pixels), its index built, and the index opened
   in a fresh process that reads a random batch. Goals for opening: 2 s and 200 MB.
2. A folder of ``files`` small images is indexed, and then looked through again unchanged. Goal: 20 s.
"""

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedssl.data.indexing import journal
from fedssl.data.indexing.identity import Identities
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.indexing.journal import PartWriter
from fedssl.data.indexing.snapshot import build_snapshot
from fedssl.data.store import Source, Store

_EDGE, _SERIES, _PER_PATIENT = 64, 50, 200
_OPEN = """
import sys, time, numpy as np, pyarrow.parquet
def peak_mb():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024
base = peak_mb()
begin = time.perf_counter()
from pathlib import Path
from fedssl.data.cache import ImageStore
from fedssl.data.index import Index
from fedssl.data.shards import Shards
import json
folder = Path(sys.argv[1])
parts = json.loads((folder / "index/parts.json").read_text())
store = ImageStore(Index(folder / "index"), Shards(folder, parts, int(sys.argv[2])))
rows = np.random.default_rng(0).integers(0, len(store), 128)
store.read(rows)
opened = time.perf_counter() - begin
print(f"{len(store)} rows: opened and first batch read in {opened:.2f} s; peak {peak_mb():.0f} MB, "
      f"{peak_mb() - base:.0f} MB above the bare interpreter")
begin = time.perf_counter()
store.column("group"), store.column("patient"), store.column("site")
print(f"three columns more (group, patient, site): {time.perf_counter() - begin:.2f} s; peak {peak_mb():.0f} MB")
"""


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=200_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.rows:
            _many_rows(Path(name) / "rows", arguments.rows)
        shutil.rmtree(Path(name) / "rows", ignore_errors=True)
        if arguments.files:
            _many_files(Path(name), arguments.files)


def _many_rows(folder: Path, count: int) -> None:
    begin = time.perf_counter()
    writer = PartWriter(folder, 0, _EDGE)
    for number in range(count):
        file = f"site/{number // _PER_PATIENT:06d}/{number:09d}.dcm"
        known = {
            "file": file, "bytes": 1, "modified_ns": 1, "site": "site", "kind": "image", "reason": "", "again": False,
            "limits": "",
            "risk": "", "stated": "",
        }  # fmt: skip
        writer.add(known, [_row(file, number)], bytes(_EDGE * _EDGE))
    writer.commit()
    _say(f"{count} rows fabricated in {time.perf_counter() - begin:.0f} s")
    begin = time.perf_counter()
    build_snapshot(folder, folder / "index", journal.empty_dead(), Identities(b"", None, "auto"), edge=_EDGE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _say(f"index built in {time.perf_counter() - begin:.0f} s; peak {peak:.0f} MB")
    for _ in range(3):
        command = [sys.executable, "-c", _OPEN, str(folder), str(_EDGE)]
        _say(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())  # noqa: S603


def _row(file: str, number: int) -> dict[str, Any]:
    digest = hashlib.blake2b(file.encode(), digest_size=32).digest()
    patient = hashlib.blake2b(str(number // _PER_PATIENT).encode(), digest_size=8).hexdigest()
    series = hashlib.blake2b(str(number // _SERIES).encode(), digest_size=8).hexdigest()
    return {
        "file": file, "image": digest[:8].hex(), "frame": 0, "site": "site", "patient": patient, "folder": patient,
        "shuffle": int(patient[:4], 16), "folder_shuffle": 0, "study": patient, "series": series, "modality": "MR",
        "scanner": "bench", "description": "T1", "instance": number, "position": float(number), "plane": "axial",
        "rows": 512, "columns": 512, "meaning": "raw", "layout": "grey8", "scale": 1.0, "offset": 0.0, "low": 0.0,
        "high": 255.0, "quantiles": [float(level) for level in range(17)], "digest": digest[:16], "hash": digest,
        "hash_turned": digest, "flags": "",
    }  # fmt: skip


def _many_files(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "images" / "site" / f"p{number // _PER_PATIENT:05d}" / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    store = Store(folder / "store", Source(folder / "images"), Decoding(_EDGE))
    for name in ("first scan", "second scan of the unchanged folder", "third scan"):
        begin = time.perf_counter()
        images = store.open(rescan=True)
        _say(f"{name} of {len(images)} files: {time.perf_counter() - begin:.1f} s")
    _say(json.dumps(store.summary()["sites"]))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
