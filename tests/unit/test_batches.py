"""Splits and batches of a store, and the synthetic hospitals that fill it."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from pydicom import dcmread

from fedssl.data.batches import Batches
from fedssl.data.cache import select
from fedssl.data.hospitals import UNSEEN_SITE, write_hospitals
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.splits import test_mask as mask_of_test_patients
from fedssl.data.store import Source, Store


@pytest.fixture(scope="module")
def store(hospitals, tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"), Source(hospitals), Decoding(16)).open()


def test_another_secret_gives_the_same_splits_and_batches(store, hospitals, tmp_path):
    stores = [store, Store(tmp_path, Source(hospitals), Decoding(16)).open()]
    orders = [
        np.concatenate([rows for rows, _ in Batches(select(s, s.column("rows") > 0), 16, 2.0, seed=1).positions()])
        for s in stores
    ]
    np.testing.assert_array_equal(*orders)
    masks = [mask_of_test_patients(s, test_fraction=0.3, unseen_sites=[UNSEEN_SITE]) for s in stores]
    np.testing.assert_array_equal(*masks)


def test_no_patient_is_in_both_splits_and_an_unseen_site_is_all_test(store):
    test = mask_of_test_patients(store, test_fraction=0.3, unseen_sites=[UNSEEN_SITE])
    patients, sites = store.column("patient"), store.column("site")
    assert not set(patients[test]) & set(patients[~test])
    assert test[sites == UNSEEN_SITE].all()
    for site in set(sites) - {UNSEEN_SITE}:
        held_out, total = len(set(patients[test & (sites == site)])), len(set(patients[sites == site]))
        assert held_out == round(0.3 * total)


def test_patients_that_share_an_image_are_never_split_even_across_sites(hospitals, tmp_path):
    root = tmp_path / "root"
    for site in ("EAST", "WEST"):
        shutil.copytree(hospitals / site, root / site)
    east, west = (sorted((root / site).iterdir()) for site in ("EAST", "WEST"))
    for one, other in zip(east, west, strict=False):
        shutil.copy(one / "003.dcm", other / "copy.dcm")
    images = Store(tmp_path / "store", Source(root, patient_from="auto"), Decoding(32)).open()
    groups, digests = images.column("group"), np.array([digest.hex() for digest in images.column("digest")])
    test = mask_of_test_patients(images, test_fraction=0.3, unseen_sites=[])
    for digest in set(digests.tolist()):
        assert len(set(groups[digests == digest])) == 1
    assert not set(digests[test].tolist()) & set(digests[~test].tolist())
    assert 0 < test.mean() < 0.7


def test_a_round_sees_every_image_and_carries_an_incomplete_batch_over(store):
    images = select(store, store.column("site") == "EAST")
    batches = Batches(images, batch_size=16, epochs=2.0, seed=5)
    seen = np.concatenate([rows for rows, _ in batches.positions()])
    assert len(batches) == 2 * len(images) // 16
    counts = np.bincount(seen, minlength=len(images))
    assert counts.max() <= 2
    assert counts.sum() == 16 * len(batches)
    np.testing.assert_array_equal(seen, np.concatenate([rows for rows, _ in batches.positions()]))


def test_batches_hold_the_pixels_of_their_positions(store):
    images = select(store, store.column("site") == "HARBOUR")
    batches = Batches(images, batch_size=8, epochs=1.0, seed=0)
    for (positions, _), batch in zip(batches.positions(), batches, strict=True):
        expected = store.read(images.rows[positions])
        np.testing.assert_array_equal(batch.values.numpy(), expected.values)
        np.testing.assert_allclose(batch.shown().numpy(), expected.shown(), atol=1e-6)


def test_synthetic_hospitals_are_equal_for_a_seed_and_say_that_they_are_synthetic(tmp_path):
    first, second = (write_hospitals(tmp_path / name, seed=1, scale=0.05) for name in "ab")
    other = write_hospitals(tmp_path / "c", seed=2, scale=0.05)
    files = [path.relative_to(first) for path in sorted(first.rglob("*.dcm"))]
    assert [(first / file).read_bytes() for file in files] == [(second / file).read_bytes() for file in files]
    assert (first / files[0]).read_bytes() != (other / files[0]).read_bytes()
    dataset = dcmread(first / files[0])
    assert "Synthetic" in dataset.ImageComments
    assert dataset.PatientName == f"SYNTHETIC^{dataset.PatientID}"
    assert json.loads((first / "synthetic.json").read_text())["synthetic"] is True


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools (Debian) is not installed")
def test_synthetic_images_are_valid_dicom(tmp_path):
    root = write_hospitals(tmp_path, seed=0, scale=0.05)
    for path in sorted(root.rglob("000.dcm")):
        checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        assert "Error" not in checked.stderr, checked.stderr
