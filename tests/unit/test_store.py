"""From files to the store: the index, the cache, what is changed, damaged or hostile."""

import json
import os
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

from fedssl import progress
from fedssl.data.decoding.image import read_frames
from fedssl.data.decoding.record import fit_square
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.pseudonym import site_secret
from fedssl.data.store import Source, Store
from fedssl.errors import DataError, StorageError


@pytest.fixture
def copied(hospitals, tmp_path):
    """A root of two patients at one site that a test may damage."""
    for patient in sorted((hospitals / "EAST").iterdir())[:2]:
        shutil.copytree(patient, tmp_path / "root" / "EAST" / patient.name)
    return tmp_path / "root"


def store_of(root, folder, *, site="", patient_from="auto", edge=16, budget_gb=None, **decoding):
    return Store(folder, Source(root, site, patient_from), Decoding(edge, **decoding), budget_gb)


def sites_of(store):
    return {line["site"]: line for line in store.summary()["sites"]}


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


def test_ultrasound_without_a_statement_is_refused_masked_or_allowed_and_counted(copied, tmp_path):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0, region.RegionLocationMaxX1, region.RegionLocationMaxY1 = (
        0,
        64,
        127,
        127,
    )
    for number, path in enumerate(sorted(copied.rglob("*.dcm"))):
        dataset = dcmread(path)
        del dataset.BurnedInAnnotation
        dataset.PixelData = b"\x64" * len(dataset.PixelData)
        if number % 2:
            dataset.SequenceOfUltrasoundRegions = Sequence([region])
        dataset.save_as(path)
    with pytest.raises(DataError, match="may show text"):
        store_of(copied, tmp_path / "store").open()
    masked = store_of(copied, tmp_path / "store", burned_in="mask")
    images = masked.open()
    assert len(images) == 8
    assert sum(masked.summary()["unreadable"].values()) == 8
    allowed = store_of(copied, tmp_path / "store", burned_in="allow")
    assert len(allowed.open()) == 16
    assert allowed.summary()["text_risk_let_through"] == {"ultrasound without a statement": 16}


@pytest.mark.parametrize("kind", ["SCREENSAVE", ["DERIVED", "SECONDARY", "SCREEN SAVE"]])
def test_a_screenshot_is_refused_whatever_it_states_and_however_many_words_its_type_has(copied, tmp_path, kind):
    for path in copied.rglob("*.dcm"):
        dataset = dcmread(path)
        dataset.ImageType = kind
        dataset.save_as(path)
    with pytest.raises(DataError, match="screenshot"):
        store_of(copied, tmp_path / "store").open()


def test_near_copies_of_two_patients_in_one_folder_of_pictures_are_found(hospitals, tmp_path):
    folder = tmp_path / "root" / "album"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(hospitals.glob("EAST/*/003.dcm"))[:4]):
        image = Image.fromarray(dcmread(path).pixel_array)
        image.save(folder / f"{number}.png")
        image.save(folder / f"{number}.jpg", quality=95)
    images = store_of(tmp_path / "root", tmp_path / "store", site="a", patient_from="file", edge=96).open()
    assert len(set(images.column("group"))) == 4


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
