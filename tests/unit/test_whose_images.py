"""Patients, sites and manifests: whose the images are."""

import shutil
import subprocess

import pytest
from pydicom import dcmread
from stores import store_of

from fedssl.errors import DataError


def test_a_folder_without_images_is_explained(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="No image was found"):
        store_of(tmp_path / "root", tmp_path / "store").open()
    with pytest.raises(DataError, match="neither a folder nor a manifest"):
        store_of(tmp_path / "nowhere", tmp_path / "store").open()


def test_files_without_a_patient_are_refused_with_the_remedy(mednist, tmp_path):
    for kind in ("Hand", "CXR"):
        (tmp_path / "few" / kind).mkdir(parents=True)
        for path in sorted((mednist / kind).iterdir())[:20]:
            shutil.copy(path, tmp_path / "few" / kind)
    with pytest.raises(DataError, match=r"data\.patient_from=file"):
        store_of(tmp_path / "few", tmp_path / "store").open()
    images = store_of(tmp_path / "few", tmp_path / "store", patient_from="file").open()
    assert len(set(images.column("patient"))) == len(images) == 40


def test_a_file_of_nobody_is_left_out_with_its_reason_and_the_rest_is_used(copied, tmp_path):
    for number, path in enumerate(sorted(copied.rglob("*.dcm"))):
        dataset = dcmread(path)
        if number % 5 == 0:
            del dataset.PatientID
        dataset.save_as(copied / "EAST" / f"{number}.dcm")
        path.unlink()
    store = store_of(copied, tmp_path / "store")
    images = store.open()
    assert len(images) == 12
    assert len(set(images.column("patient"))) == 2
    assert list(store.summary()["unreadable"].values()) == [4]
    assert "belongs to no known patient" in next(iter(store.summary()["unreadable"]))


def test_files_without_patient_id_join_the_only_patient_of_their_folder(copied, tmp_path):
    files = sorted(copied.rglob("*.dcm"))
    for path in files[::3]:
        dataset = dcmread(path)
        del dataset.PatientID
        dataset.save_as(path)
    images = store_of(copied, tmp_path / "store").open()
    assert len(set(images.column("patient"))) == 2


def test_patients_of_a_folder_with_nameless_images_count_as_one_for_splits(copied, tmp_path):
    folder = next((copied / "EAST").iterdir())
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = dcmread(path)
        dataset.PatientID = ["", "one", "two"][number % 3]
        dataset.save_as(path)
    images = store_of(copied, tmp_path / "store").open()
    assert len(set(images.column("patient"))) == 4
    assert len(set(images.column("group"))) == 2


def test_a_manifest_names_patients_sites_and_labels(copied, tmp_path):
    files = [str(path.relative_to(copied)) for path in sorted(copied.rglob("*.dcm"))]
    lines = [
        f"{file},P{number % 3},{'north' if number % 3 else 'south'},{number % 2}" for number, file in enumerate(files)
    ]
    (copied / "manifest.csv").write_text("\n".join(["image,patient_id,site,label", *lines, "gone.dcm,P1,north,1"]))
    store = store_of(copied / "manifest.csv", tmp_path / "store")
    images = store.open()
    assert len(images) == 16
    assert store.summary()["unreadable"] == {"is missing": 1}
    assert set(images.column("site")) == {"north", "south"}
    assert set(images.column("label")) == {"0", "1"}
    assert len(set(images.column("patient"))) == 3


def test_a_corrected_manifest_takes_effect_though_no_image_changed(copied, tmp_path, monkeypatch):
    files = [str(path.relative_to(copied)) for path in sorted(copied.rglob("*.dcm"))]
    for label in "ab":
        lines = [f"{file},P{number % 3},{label}" for number, file in enumerate(files)]
        (copied / "m.csv").write_text("\n".join(["image,patient_id,label", *lines]))
        images = store_of(copied / "m.csv", tmp_path / "store").open(rescan=True)
        assert set(images.column("label")) == {label}
        assert len(set(images.column("patient"))) == 3
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))


def test_a_manifest_keeps_leading_zeros_and_a_corrected_site_moves_the_images(copied, tmp_path):
    files = [str(path.relative_to(copied)) for path in sorted(copied.rglob("*.dcm"))]
    for site in ("north", "3"):
        lines = [f"./{file},{'007' if number % 2 else '7'},{site}" for number, file in enumerate(files)]
        (copied / "m.csv").write_text("\n".join(["image,patient_id,site", *lines]))
        images = store_of(copied / "m.csv", tmp_path / "store").open(rescan=True)
        assert set(images.column("site")) == {site}
        assert len(set(images.column("patient"))) == 2


def test_a_manifest_without_a_header_line_does_not_print_its_first_patient(copied, tmp_path):
    (copied / "m.csv").write_text("A/DOE_JOHN/1.dcm,DOE_JOHN\nA/DOE_JOHN/2.dcm,DOE_JOHN\n")
    with pytest.raises(DataError, match="is the header line missing") as caught:
        store_of(copied / "m.csv", tmp_path / "store").open()
    assert "DOE" not in str(caught.value)


def test_a_bad_manifest_is_refused(copied, tmp_path):
    file = next(copied.rglob("*.dcm")).relative_to(copied)
    for text, said in [
        (f"image,patient_id\n{file},A\n{file},B\n", "more than once"),
        ("image,site\na.png,x\n", "patient_id"),
        (f"image,patient_id\n{file},A\n./{file},B\n", "more than once"),
    ]:
        (copied / "m.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            store_of(copied / "m.csv", tmp_path / "store").open()


def test_a_folder_of_patients_is_not_taken_for_a_folder_of_sites(hospitals, tmp_path):
    with pytest.raises(DataError, match="look like patients"):
        store_of(hospitals / "EAST", tmp_path / "store").open()
    images = store_of(hospitals / "EAST", tmp_path / "store", site="east").open()
    assert set(images.column("site")) == {"east"}
    assert len(set(images.column("patient"))) > 3


def test_dicom_files_named_by_their_uid_are_found(copied, tmp_path):
    for number, path in enumerate(sorted(copied.rglob("*.dcm"))):
        path.rename(path.with_name(f"1.2.840.{number}"))
    assert len(store_of(copied, tmp_path / "store").open()) == 16
