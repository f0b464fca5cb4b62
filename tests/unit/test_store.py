"""From files to the store: what the index holds, and what a second scan touches."""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydicom import dcmread
from stores import store_of

from fedssl.data.decoding.image import read_frames
from fedssl.data.decoding.record import fit_square
from fedssl.data.pseudonym import site_secret


def test_the_index_holds_pseudonyms_and_never_a_patient_a_file_or_a_uid(hospitals, tmp_path):
    store = store_of(hospitals, tmp_path)
    store.open()
    text = b"".join(path.read_bytes() for path in store.snapshot().iterdir() if path.name != "unreadable.csv")
    table = pq.read_table(sorted(store.snapshot().glob("data-*")))
    text += json.dumps(table.drop_columns(["digest", "hash", "hash_turned"]).to_pylist()).encode()
    folders = [path for site in hospitals.iterdir() if site.is_dir() for path in site.iterdir()]
    headers = [dcmread(path / "000.dcm") for path in folders]
    secret = {path.name for path in folders} | {header.StudyInstanceUID for header in headers}
    assert secret
    assert not any(word.encode() in text for word in secret)
    assert len(set(table["patient"].to_pylist())) == len(folders)


def test_another_secret_gives_other_pseudonyms_and_the_same_rows(hospitals, tmp_path):
    first, second = (store_of(hospitals, tmp_path / name).open() for name in "ab")
    assert not set(first.column("patient")) & set(second.column("patient"))
    for name in ("site", "modality", "shuffle", "order", "group", "digest"):
        np.testing.assert_array_equal(first.column(name), second.column(name))


def test_the_sites_secret_can_be_read_by_its_owner_only(tmp_path):
    site_secret(tmp_path)
    assert stat.S_IMODE((tmp_path / "site.secret").stat().st_mode) == 0o600


def test_the_cache_holds_what_a_plain_loop_decodes(hospitals, tmp_path):
    store = store_of(hospitals, tmp_path, edge=24).open()
    files = sorted(path for path in hospitals.rglob("*.dcm"))
    place = {name: row for row, name in enumerate(store.column("image").tolist())}
    for path in files[::17]:
        dataset = dcmread(path)
        row = place[store.names_of([str(path.relative_to(hospitals))])[0]]
        got = store.read(np.array([row])).shown()[0, 0]
        if dataset.Modality == "CT":
            units = dataset.pixel_array.astype(np.float32) + float(dataset.RescaleIntercept)
            plain = (np.asarray(fit_square(units, 24, -1024.0)) - (40 - 200)) / 399.0
            np.testing.assert_allclose(got, plain.clip(0, 1), atol=2e-3)
        elif dataset.Modality == "CR":
            np.testing.assert_allclose(got, fit_square(read_frames(path)[0], 24, 0.0), atol=1e-4)


def test_a_second_opening_decodes_nothing_and_starts_no_process(copied, tmp_path, monkeypatch):
    store_of(copied, tmp_path / "store").open()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert len(store_of(copied, tmp_path / "store").open(rescan=True)) == 16


def test_a_rescan_touches_only_what_is_new_changed_or_gone(copied, tmp_path, monkeypatch):
    from fedssl.data.indexing import ingest

    store = store_of(copied, tmp_path / "store")
    store.open()
    files = sorted(copied.rglob("*.dcm"))
    files[0].unlink()
    files[3].write_bytes(files[4].read_bytes())
    shutil.copy(files[5], files[5].with_name("new.dcm"))
    asked = []
    decode = ingest.decode_all
    monkeypatch.setattr(ingest, "decode_all", lambda questions, **how: decode(_noted(questions, asked), **how))
    images = store.open(rescan=True)
    assert sorted(asked) == sorted([str(files[3]), str(files[5].with_name("new.dcm"))])
    assert len(images) == 16
    fresh = store_of(copied, tmp_path / "fresh").open()
    assert sorted(fresh.column("digest").tolist()) == sorted(images.column("digest").tolist())


def _noted(questions, asked):
    for question in questions:
        asked.append(question.request["path"])
        yield question


def test_without_rescan_the_last_index_stands(copied, tmp_path):
    store = store_of(copied, tmp_path / "store")
    store.open()
    next(copied.rglob("*.dcm")).unlink()
    assert len(store.open()) == 16
    assert len(store.open(rescan=True)) == 15


def test_colour_stays_colour_for_three_channels_and_becomes_luma_for_one(tmp_path):
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[..., 0], colours[:16, :, 1] = 200, 100
    (tmp_path / "root/a/p").mkdir(parents=True)
    Image.fromarray(colours).save(tmp_path / "root/a/p/x.png")
    Image.fromarray(colours[..., 1]).save(tmp_path / "root/a/p/y.png")
    store = store_of(tmp_path / "root", tmp_path / "store", edge=32)
    three = store.open(channels=3).read(np.array([0, 1])).shown()
    np.testing.assert_allclose(three[0].transpose(1, 2, 0), colours / 255.0, atol=1e-6)
    np.testing.assert_allclose(three[1], np.repeat(colours[None, ..., 1], 3, 0) / 255.0, atol=1e-6)
    one = store.open(channels=1).read(np.array([0])).shown()[0, 0]
    np.testing.assert_allclose(one, colours @ np.array([0.299, 0.587, 0.114]) / 255.0, atol=1e-5)


def test_a_written_index_is_parquet_that_others_can_read(copied, tmp_path):
    store = store_of(copied, tmp_path / "store")
    store.open()
    table = pq.read_table(next(store.snapshot().glob("data-*.parquet")))
    assert {"patient", "study", "series", "modality", "site", "label", "order"} <= set(table.column_names)
    assert (Path(tmp_path) / "store" / "site.secret").exists()
