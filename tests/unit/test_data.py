"""From files to batches: DICOM and raster pixels, the index, the cache, splits and batches."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydicom import dcmread

from fedssl.data import image
from fedssl.data.batches import Batches
from fedssl.data.cache import load_store, open_store, read_index, select
from fedssl.data.hospitals import UNSEEN_SITE, write_hospitals
from fedssl.data.index import build_index, summarise, unreadable_reasons, usable
from fedssl.data.pseudonym import site_secret
from fedssl.data.splits import test_mask as mask_of_test_patients
from fedssl.errors import DataError


@pytest.fixture
def copied(hospitals, tmp_path):
    """A root of two patients at one site that a test may damage."""
    for patient in sorted((hospitals / "EAST").iterdir())[:2]:
        shutil.copytree(patient, tmp_path / "root" / "EAST" / patient.name)
    return tmp_path / "root"


def _first(root, pattern):
    return sorted(root.glob(pattern))[0]


def _by_modality(hospitals, site, modality):
    return next(
        p for p in sorted((hospitals / site).rglob("*.dcm")) if dcmread(p, stop_before_pixels=True).Modality == modality
    )


def test_ct_is_shown_through_its_window(hospitals):
    path = _by_modality(hospitals, "HARBOUR", "CT")
    dataset = dcmread(path)
    houndsfield = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    expected = np.clip((houndsfield - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1)  # PS3.3, C.11.2.1.2.1
    np.testing.assert_allclose(image.read_frames(path)[0], expected, atol=1e-6)


def test_monochrome1_is_inverted_so_that_bone_is_white_at_every_site(hospitals):
    path = _by_modality(hospitals, "SOUTH", "CR")
    dataset = dcmread(path)
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    grey = image.read_frames(path)[0]
    assert np.corrcoef(grey.ravel(), dataset.pixel_array.ravel())[0, 1] < -0.99
    assert grey[: grey.shape[0] // 12, :3].mean() < grey[grey.shape[0] // 2, grey.shape[1] // 2]


def test_eight_bit_images_keep_their_full_range(brain_mr):
    path = _first(brain_mr, "DU/*/0*.dcm")
    dataset = dcmread(path)
    np.testing.assert_allclose(image.read_frames(path)[0], dataset.pixel_array / 255.0, atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "L"), ("png", "I;16"), ("tif", "I;16"), ("tif", "F"), ("jpg", "RGB")]
)
def test_png_jpeg_and_tiff_of_8_and_16_bits_keep_their_gradient(tmp_path, suffix, mode):
    ramp = np.tile(np.linspace(0, 1, 64), (48, 1))
    pixels = {"L": (ramp * 255).astype(np.uint8), "I;16": (ramp * 4095).astype(np.uint16), "F": ramp.astype(np.float32)}
    array = np.repeat(pixels["L"][..., None], 3, 2) if mode == "RGB" else pixels[mode]
    Image.fromarray(array).save(tmp_path / f"ramp.{suffix}")
    grey = image.read_frames(tmp_path / f"ramp.{suffix}")[0]
    np.testing.assert_allclose(grey, ramp, atol=0.03)


def test_a_multi_page_tiff_gives_every_page(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 128, 255)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert [round(float(frame.mean()), 1) for frame in image.read_frames(tmp_path / "pages.tiff")] == [0.0, 0.5, 1.0]


def test_the_square_keeps_the_aspect_ratio_and_pads_with_black():
    square = image.fit_square(np.ones((20, 80), np.float32), 40)
    assert square.shape == (40, 40)
    assert (square[15:25] == 65535).all()
    assert (square[:15] == 0).all()
    assert (square[25:] == 0).all()


def test_the_index_holds_pseudonyms_and_never_a_patient_id(hospitals, tmp_path):
    table = build_index(hospitals, site_secret(tmp_path))
    own = {name for name in table.column_names if name != "file"}
    text = json.dumps(table.select(sorted(own)).to_pylist())
    ids = {path.name for site in hospitals.iterdir() if site.is_dir() for path in site.iterdir()}
    assert ids
    assert not any(patient in text for patient in ids)
    assert len(set(table["patient"].to_pylist())) == len(ids)


def test_another_secret_gives_other_pseudonyms_but_the_same_splits_and_batches(hospitals, tmp_path):
    first = open_store(hospitals, tmp_path / "a", edge=16)
    second = open_store(hospitals, tmp_path / "b", edge=16)
    assert not set(first.column("patient")) & set(second.column("patient"))
    orders = [
        np.concatenate(list(Batches(select(s, s.column("rows") > 0), 16, 2.0, seed=1).positions()))
        for s in (first, second)
    ]
    np.testing.assert_array_equal(*orders)
    masks = [mask_of_test_patients(s, test_fraction=0.3, unseen_sites=[UNSEEN_SITE]) for s in (first, second)]
    np.testing.assert_array_equal(*masks)


def test_the_sites_secret_can_be_read_by_its_owner_only(tmp_path):
    site_secret(tmp_path)
    assert stat.S_IMODE((tmp_path / "site.secret").stat().st_mode) == 0o600


def test_truncated_empty_and_foreign_files_become_rows_with_a_reason_and_the_rest_goes_on(copied, tmp_path):
    files = sorted(copied.rglob("*.dcm"))
    files[0].write_bytes(files[0].read_bytes()[:-4000])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"this is not a DICOM file at all" * 20)
    (files[3].parent / "empty.png").write_bytes(b"")
    store = open_store(copied, tmp_path / "store", edge=16)
    assert len(store) == len(files) - 3
    table = read_index(tmp_path / "store", edge=16)
    reasons = unreadable_reasons(table)
    assert sum(reasons.values()) == 4
    assert reasons["is empty (0 bytes)"] == 2
    assert not any(str(copied) in reason or "EAST-" in reason for reason in reasons)
    assert summarise(table)[0]["unreadable"] == 4


def test_the_cache_holds_what_a_plain_loop_decodes(copied, tmp_path):
    store = open_store(copied, tmp_path / "store", edge=24)
    for row, file in enumerate(store.column("file")):
        np.testing.assert_array_equal(store.pixels[row], image.fit_square(image.read_frames(copied / file)[0], 24))


def test_a_second_opening_decodes_nothing(copied, tmp_path, monkeypatch):
    open_store(copied, tmp_path / "store", edge=16)
    monkeypatch.setattr(image, "read_frames", lambda path: pytest.fail("decoded again"))
    assert len(open_store(copied, tmp_path / "store", edge=16, rescan=True)) == 16


def test_a_changed_file_is_seen_by_the_next_scan(copied, tmp_path):
    open_store(copied, tmp_path / "store", edge=16)
    sorted(copied.rglob("*.dcm"))[0].unlink()
    assert len(open_store(copied, tmp_path / "store", edge=16)) == 16
    assert len(open_store(copied, tmp_path / "store", edge=16, rescan=True)) == 15


def test_a_full_disk_leaves_no_half_written_cache(copied, tmp_path):
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from pathlib import Path; from fedssl.data.cache import open_store; from fedssl.errors import StorageError\n"
        "try: open_store(Path(sys.argv[1]), Path(sys.argv[2]), edge=128)\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    arguments = [sys.executable, "-c", program, str(copied), str(tmp_path / "store")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "The disk is full" in done.stdout
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix in {".npy", ".tmp", ".parquet"}]


def test_a_cache_that_does_not_fit_its_index_is_refused(copied, tmp_path):
    open_store(copied, tmp_path / "store", edge=16)
    index, pixels = _first(tmp_path / "store", "index-*"), _first(tmp_path / "store", "pixels-*")
    np.save(pixels, np.load(pixels)[:-1])
    with pytest.raises(DataError, match="does not fit its index"):
        load_store(index, pixels)


def test_a_folder_without_images_is_explained(tmp_path):
    with pytest.raises(DataError, match="No image was found"):
        build_index(tmp_path, b"x")


def test_files_without_a_patient_are_refused_with_the_remedy(mednist, tmp_path):
    with pytest.raises(DataError, match=r"data\.patient_from=file"):
        build_index(mednist, b"x")
    table = usable(build_index(mednist, b"x", patient_from="file"))
    assert table.num_rows == 6000
    assert len(set(table["patient"].to_pylist())) == 6000


def test_a_manifest_names_patients_sites_and_labels(copied, tmp_path):
    files = [str(path.relative_to(copied)) for path in sorted(copied.rglob("*.dcm"))]
    lines = [
        f"{file},P{number % 3},{'north' if number % 3 else 'south'},{number % 2}" for number, file in enumerate(files)
    ]
    (copied / "manifest.csv").write_text("\n".join(["image,patient_id,site,label", *lines, "gone.dcm,P1,north,1"]))
    table = build_index(copied / "manifest.csv", b"x")
    assert table.num_rows == 17
    assert unreadable_reasons(table) == {"is missing": 1}
    assert set(usable(table)["site"].to_pylist()) == {"north", "south"}
    assert set(usable(table)["label"].to_pylist()) == {"0", "1"}
    assert len(open_store(copied / "manifest.csv", tmp_path / "store", edge=16)) == 16


def test_a_folder_of_patients_is_not_taken_for_a_folder_of_sites(hospitals, tmp_path):
    with pytest.raises(DataError, match="look like patients"):
        build_index(hospitals / "EAST", b"x")
    table = build_index(hospitals / "EAST", b"x", site="east")
    assert set(table["site"].to_pylist()) == {"east"}
    assert len(set(table["patient"].to_pylist())) > 3


def test_a_corrected_manifest_takes_effect_though_no_image_changed(copied, tmp_path):
    files = [str(path.relative_to(copied)) for path in sorted(copied.rglob("*.dcm"))]
    for label in "ab":
        lines = [f"{file},P{number % 3},{label}" for number, file in enumerate(files)]
        (copied / "m.csv").write_text("\n".join(["image,patient_id,label", *lines]))
        store = open_store(copied / "m.csv", tmp_path / "store", edge=16, rescan=True)
        assert set(store.column("label")) == {label}
        assert len(set(store.column("patient"))) == 3


def test_an_image_listed_twice_in_a_manifest_is_refused(copied):
    file = next(copied.rglob("*.dcm")).relative_to(copied)
    (copied / "m.csv").write_text(f"image,patient_id\n{file},A\n{file},B\n")
    with pytest.raises(DataError, match="more than once"):
        build_index(copied / "m.csv", b"x")


def test_dicom_files_named_by_their_uid_are_found(copied):
    for number, path in enumerate(sorted(copied.rglob("*.dcm"))):
        path.rename(path.with_name(f"1.2.840.{number}"))
    assert usable(build_index(copied, b"x")).num_rows == 16


def test_a_manifest_without_patients_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("image,site\na.png,x\n")
    with pytest.raises(DataError, match="patient_id"):
        build_index(tmp_path / "m.csv", b"x")


def test_no_patient_is_in_both_splits_and_an_unseen_site_is_all_test(hospitals, tmp_path):
    store = open_store(hospitals, tmp_path, edge=16)
    test = mask_of_test_patients(store, test_fraction=0.3, unseen_sites=[UNSEEN_SITE])
    patients, sites = store.column("patient"), store.column("site")
    assert not set(patients[test]) & set(patients[~test])
    assert test[sites == UNSEEN_SITE].all()
    for site in set(sites) - {UNSEEN_SITE}:
        held_out, total = len(set(patients[test & (sites == site)])), len(set(patients[sites == site]))
        assert held_out == round(0.3 * total)


def test_a_round_sees_every_image_and_carries_an_incomplete_batch_over(hospitals, tmp_path):
    store = open_store(hospitals, tmp_path, edge=16)
    images = select(store, store.column("site") == "EAST")
    batches = Batches(images, batch_size=16, epochs=2.0, seed=5)
    seen = np.concatenate(list(batches.positions()))
    assert len(batches) == 2 * len(images) // 16
    counts = np.bincount(seen, minlength=len(images))
    assert counts.max() <= 2
    assert counts.sum() == 16 * len(batches)
    np.testing.assert_array_equal(seen, np.concatenate(list(batches.positions())))


def test_batches_hold_the_pixels_of_their_positions(hospitals, tmp_path):
    store = open_store(hospitals, tmp_path, edge=16)
    images = select(store, store.column("site") == "WEST")
    batches = Batches(images, batch_size=8, epochs=1.0, seed=0)
    for positions, batch in zip(batches.positions(), batches, strict=True):
        np.testing.assert_allclose(batch[:, 0].numpy(), store.pixels[images.rows[positions]] / 65535.0, atol=1e-6)


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


def test_a_written_index_is_parquet_that_others_can_read(copied, tmp_path):
    open_store(copied, tmp_path / "store", edge=16)
    table = pq.read_table(_first(tmp_path / "store", "index-*.parquet"))
    assert {"patient", "study", "series", "modality", "site", "label", "reason"} <= set(table.column_names)
    assert Path(tmp_path / "store" / "site.secret").exists()
