"""SIGKILL while a site's images are indexed: what is there afterwards is what an undisturbed run makes."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from fedssl import progress
from fedssl.data.indexing import journal
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.pseudonym import site_secret
from fedssl.data.store import Source, Store
from fedssl.errors import DataError

# Counts its own operations on files, and dies before the one with a given number, or says that it is due. Number 0 is
# the moment at which a part has lost its files but not yet its folder.
CHILD = r"""
import os, signal, sys
from pathlib import Path
from fedssl.data.indexing import ingest, journal
from fedssl.data.store import Source, Store
from fedssl.errors import DataError
import fedssl.data.indexing.snapshot
root, folder, due, dies = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "dies"
journal._FILES_IN_A_PART = 16
done = 0
def operation(event, arguments):
    global done
    changes = event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
    if changes or event == "open" and arguments[1] and set(arguments[1]) & set("wa"):
        done += 1
        name = Path(str(arguments[0])).name
        if done == due or (due == 0 and event == "os.rmdir" and name[0].isdigit()):
            os.write(1, f"{event} {name}\n".encode())
            dies and os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(operation)
Store(Path(folder), Source(Path(root)), ingest.Decoding(64, workers=2, timeout_s=30.0)).open(rescan=True)
"""
PLACE = {"part", "slot"}  # where pixels are kept depends on what came before


@pytest.fixture
def root(hospitals, tmp_path):
    """A copy of the hospitals that a test may change; without tables."""
    shutil.copytree(hospitals, tmp_path / "root", ignore=shutil.ignore_patterns("*.csv", "*.json"))
    return tmp_path / "root"


def store_of(root, folder):
    return Store(folder, Source(root), Decoding(64, workers=2, timeout_s=30.0))


def killed_run(root, folder, rng, operations):
    """Index in a process that is killed before, or a moment after, a random operation; the operation, or None."""
    due, dies = rng.integers(1, operations), rng.random() < 0.7
    command = [sys.executable, "-c", CHILD, root, folder, str(due), "dies" if dies else "lives"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = os.pidfd_open(process.pid)
    operation = process.stdout.readline().strip()  # empty when the process has ended before
    if operation and not dies:
        select.select([ended], [], [], rng.uniform(0.0, 0.3))
        process.kill()
    _, errors = process.communicate(timeout=120)
    os.close(ended)
    assert process.returncode in {0, -signal.SIGKILL}, errors[-3000:]
    return operation if process.returncode else None


def change(root, rng):
    """Do what happens to a hospital's folder between two scans: files appear, change and vanish, patients too."""
    patients = sorted(path for site in root.iterdir() for path in site.iterdir())
    if len(patients) > 24:
        place = rng.integers(len(patients) - 3)
        for patient in patients[place : place + 3]:
            shutil.rmtree(patient)
    files = sorted(root.rglob("*.dcm"))
    removed, changed, copied = (files[number] for number in rng.choice(len(files), 3, replace=False))
    shutil.copy(copied, copied.with_name(f"new-{rng.integers(10**6)}.dcm"))
    dataset = dcmread(changed)
    dataset.PixelData = bytes(reversed(dataset.PixelData)) + b"\0" * 2 * int(rng.integers(1, 9))
    dataset.save_as(changed)
    removed.unlink()


def same(store, fresh):
    """Compare two stores: every column that says something of an image, and every pixel."""
    first, second = store.open(), fresh.open()
    names = [name for path in sorted(store.snapshot().glob("*-00000.parquet")) for name in pq.read_schema(path).names]
    assert {"image", "patient", "low", "order", "group", "copies", "digest"} <= set(names)
    for name in set(names) - PLACE:
        np.testing.assert_array_equal(first.column(name), second.column(name), err_msg=name)
    rows = np.arange(len(first))
    for field in ("values", "low", "high", "hounsfield"):
        np.testing.assert_array_equal(getattr(first.read(rows), field), getattr(second.read(rows), field))
    assert store.summary() == fresh.summary()


def nothing_left(store):
    """No temporary file, no half-removed folder, no more indexes than the last two, and no pixel is damaged."""
    assert not [path for path in store.folder.rglob("*") if path.name.endswith(".tmp") or ".tmp" in str(path.parent)]
    indexes = list(store.journal.glob("index-*"))
    assert len(indexes) <= 2
    assert all((path / "summary.json").exists() for path in indexes)
    for part in store.journal.glob("[0-9]*-[0-9]*"):
        assert {"files.parquet", "rows.parquet", "sums.json"} <= {path.name for path in part.iterdir()}
        assert all((part / f"{layout}.bin").exists() for layout in json.loads((part / "sums.json").read_text()))
    alarms = []
    stop = progress.listen(lambda event: alarms.append(event) if getattr(event, "alarm", False) else None)
    store.open(verify=True)
    stop()
    assert not alarms


def scenario(root, tmp_path, seed, first_kills, later_kills):
    """Kill a first index and then rescans of changing files; returns the operations that were cut off."""
    rng = np.random.default_rng(seed)
    store, fresh = store_of(root, tmp_path / "store"), store_of(root, tmp_path / "fresh")
    site_secret(tmp_path / "store")
    (tmp_path / "fresh").mkdir()
    shutil.copy2(tmp_path / "store" / "site.secret", tmp_path / "fresh")
    cut = []
    for kills, operations in [(first_kills, 60), (later_kills, 45)]:
        enough = len(cut) + kills
        for _ in range(5 * kills):
            operation = killed_run(root, store.folder, rng, operations) if len(cut) < enough else None
            cut += [operation] if operation else []
            finished = operation is None  # a finished index leaves nothing to cut off before something changes
            if (finished or operations < 60) and len(cut) < enough:
                change(root, rng)
        assert len(cut) >= enough
        store.open(rescan=True)
        change(root, rng)
    store.open(rescan=True)
    same(store, fresh)
    nothing_left(store)
    return cut


def test_an_index_that_was_killed_three_times_equals_one_that_was_not(root, tmp_path):
    assert len(scenario(root, tmp_path, seed=0, first_kills=2, later_kills=1)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_index_that_was_killed_twenty_times_equals_one_that_was_not(root, tmp_path, seed):
    cut = scenario(root, tmp_path, seed, first_kills=6, later_kills=14)
    words = (operation.split()[0] for operation in cut)
    sys.stdout.write(f"\n{len(cut)} kills before or after: {dict(Counter(words))}\n")
    assert len(cut) == 20


def test_a_kill_while_an_old_part_is_removed_stops_nobody(root, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_FILES_IN_A_PART", 16)
    store = store_of(root, tmp_path / "store")
    before = len(store.open())
    for patient in sorted((root / "EAST").iterdir())[:2]:
        shutil.rmtree(patient)
    store.open(rescan=True)
    next(root.rglob("*.dcm")).unlink()
    subprocess.run([sys.executable, "-c", CHILD, root, store.folder, "0", "dies"], check=False)
    assert len(store.open(rescan=True)) == before - 17
    nothing_left(store)


@pytest.mark.parametrize("lost", ["*.bin", "sums.json", "files.parquet", "rows.parquet"])
def test_verify_repairs_a_part_of_which_a_file_is_gone(root, tmp_path, lost):
    store = store_of(root, tmp_path / "store")
    rows = len(store.open())
    next(store.journal.glob(f"[0-9]*-[0-9]*/{lost}")).unlink()
    images = store.open(verify=True)
    assert np.isfinite(images.read(np.arange(rows)).values).all()


def test_a_store_that_is_open_never_reads_the_pixels_of_a_later_scan(root, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_FILES_IN_A_PART", 16)
    store, new = store_of(root, tmp_path / "store"), root / "EAST" / "EAST-0000" / "new.dcm"
    store.open()
    files = sorted((root / "EAST").rglob("*.dcm"))
    shutil.copy(files[-1], new)
    images = store.open(rescan=True)
    images.read(np.arange(1))  # as training does; pixels of the new part are first needed much later
    (row,) = np.flatnonzero(images.column("image") == images.names_of(["EAST/EAST-0000/new.dcm"])[0])
    expected = store.open().read(np.array([row])).values
    for changed in (new, files[0]):
        changed.unlink()
        store.open(rescan=True)
    shutil.copy(files[-2], new)
    store.open(rescan=True)
    try:
        found = images.read(np.array([row])).values
    except DataError:
        return
    np.testing.assert_array_equal(found, expected)
