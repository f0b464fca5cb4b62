"""Files, folders and disks that go wrong: reported, survived, repaired."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from stores import store_of

from fedssl import progress
from fedssl.errors import DataError, StorageError


def test_truncated_empty_and_foreign_files_become_rows_with_a_reason_and_the_rest_goes_on(copied, tmp_path):
    files = sorted(copied.rglob("*.dcm"))
    files[0].write_bytes(files[0].read_bytes()[:-4000])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"this is not a DICOM file at all" * 20)
    (files[3].parent / "empty.png").write_bytes(b"")
    (files[3].parent / "notes.txt").write_text("nothing to see")
    store = store_of(copied, tmp_path / "store")
    assert len(store.open()) == len(files) - 3
    summary = store.summary()
    assert sum(summary["unreadable"].values()) == 4
    assert summary["unreadable"]["is empty (0 bytes)"] == 2
    assert summary["other_files"] == {".txt": 1}
    assert not any(str(copied) in reason or "EAST-" in reason for reason in summary["unreadable"])
    assert sites_of(store)["EAST"]["unreadable"] == 4
    listed = (store.snapshot() / "unreadable.csv").read_text()
    assert listed.count("\n") == 5
    assert stat.S_IMODE((store.snapshot() / "unreadable.csv").stat().st_mode) == 0o600


def test_loops_dead_links_pipes_and_odd_names_are_reported_and_end(copied, tmp_path):
    patient = next((copied / "EAST").iterdir())
    (patient / "loop").symlink_to(copied, target_is_directory=True)
    (patient / "gone.dcm").symlink_to(tmp_path / "nothing")
    os.mkfifo(patient / "pipe.dcm")
    os.close(os.open(os.fsencode(patient) + b"/caf\xe9.dcm", os.O_CREAT))
    store = store_of(copied, tmp_path / "store")
    assert len(store.open()) == 16
    reasons = store.summary()["unreadable"]
    assert reasons["is a link to a folder above it"] == 1
    assert reasons["is a link to nothing"] == 1
    assert reasons["is no regular file"] == 1
    assert reasons["has a name that is no text; rename it"] == 1


def test_a_file_that_changes_while_it_is_read_is_taken_by_the_next_scan(copied, tmp_path):
    from fedssl.data.decoding.burned_in import Policy
    from fedssl.data.decoding.worker import answer

    path = next(copied.rglob("*.dcm"))
    request = {"path": str(path), "modality": "", "trouble": "", "bytes": 1, "modified_ns": 1}
    header, pixels = answer(request, 16, Policy.REFUSE)
    found = json.loads(header)
    assert found["reason"] == "changed while it was read"
    assert found["again"]
    assert pixels == b""


def test_a_file_that_took_too_long_is_tried_again_only_with_more_time(copied, tmp_path, monkeypatch):
    slow = next(copied.rglob("*.dcm"))
    saboteur = tmp_path / "saboteur"
    saboteur.mkdir()
    (saboteur / "sitecustomize.py").write_text(
        "import os, time, builtins\n"
        "real = os.open\n"
        f"os.open = lambda path, *rest: (str(path).endswith({slow.name!r}) and {str(slow.parent.name)!r} in str(path)\n"
        "                                and time.sleep(60)) or real(path, *rest)\n"
    )
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(saboteur))
        store = store_of(copied, tmp_path / "store", timeout_s=1.0)
        assert len(store.open()) == 15
        assert store.summary()["unreadable"] == {"took longer than 1 s to decode": 1}
    assert len(store.open(rescan=True)) == 15
    assert len(store_of(copied, tmp_path / "store", timeout_s=30.0).open(rescan=True)) == 16


def test_a_folder_that_may_not_be_read_is_reported(copied, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the super-user may read every folder")
    locked = copied / "EAST" / "locked"
    locked.mkdir(mode=0o000)
    store = store_of(copied, tmp_path / "store")
    store.open()
    assert any("cannot be read" in reason for reason in store.summary()["unreadable"])


def test_a_full_disk_leaves_no_half_written_part(copied, tmp_path):
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from pathlib import Path; from fedssl.data.store import Store, Source\n"
        "from fedssl.errors import StorageError\n"
        "from fedssl.data.indexing.ingest import Decoding\n"
        "try: Store(Path(sys.argv[2]), Source(Path(sys.argv[1])), Decoding(128)).open()\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    arguments = [sys.executable, "-c", program, str(copied), str(tmp_path / "store")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "The disk is full" in done.stdout
    assert not [path for path in (tmp_path / "store").rglob("*") if path.suffix in {".bin", ".tmp", ".parquet"}]


def test_the_budget_removes_unused_caches_first_and_then_stops_with_a_sentence(copied, tmp_path):
    small, middle = store_of(copied, tmp_path / "s", edge=16), store_of(copied, tmp_path / "s", edge=24)
    small.open()
    in_use = middle.open()
    pixels = 16 * 32 * 32
    with pytest.raises(StorageError, match=r"budget of .* GB.*data\.budget_gb"):
        store_of(copied, tmp_path / "s", edge=32, budget_gb=(pixels - 1) / 1e9).open()
    assert not small.journal.exists()
    assert in_use.read(np.arange(16)).values.shape == (16, 1, 24, 24)
    del in_use
    assert len(store_of(copied, tmp_path / "s", edge=32, budget_gb=pixels / 1e9).open()) == 16
    assert not middle.journal.exists()


def test_a_damaged_cache_is_found_and_repaired_by_verify(copied, tmp_path):
    store = store_of(copied, tmp_path / "store")
    before = store.open().read(np.arange(16)).values
    shard = next(store.journal.glob("*/*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 0xFF
    shard.write_bytes(content)
    alarms = []
    stop = progress.listen(lambda event: alarms.append(event) if getattr(event, "alarm", False) else None)
    images = store.open(verify=True)
    stop()
    assert len(alarms) == 1
    np.testing.assert_array_equal(images.read(np.arange(16)).values, before)


def test_a_cut_or_removed_cache_is_refused_with_the_remedy(copied, tmp_path):
    store = store_of(copied, tmp_path / "store")
    images = store.open()
    shard = next(store.journal.glob("*/*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="--verify"):
        images.read(np.array([0]))


def sites_of(store):
    return {line["site"]: line for line in store.summary()["sites"]}
