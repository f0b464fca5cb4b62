"""Pulling from a real PACS."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from pydicom import dcmread
from pydicom.uid import JPEG2000, ExplicitVRBigEndian, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from fedssl import progress
from fedssl.data.dicomweb import Pulled, pull
from fedssl.errors import DataError

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def _mirror(tmp_path_factory):
    return tmp_path_factory.mktemp("pulled") / "mirror"


@pytest.fixture
def mirror(url, _mirror, sent):
    """The mirror of everything, pulled once."""
    if not _mirror.exists():
        count = len(sent[0]) + 1
        assert pull(url, _mirror, SECRET, filters={}) == Pulled(count, count, 0, {})
    return _mirror


def _names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.dcm")}


def test_everything_stored_is_pulled_byte_for_byte_in_its_own_transfer_syntax(mirror, sent):
    held, extra = sent
    pulled = {dcmread(path, stop_before_pixels=True).SOPInstanceUID: path for path in mirror.rglob("*.dcm")}
    assert set(pulled) == {*held, extra.SOPInstanceUID}
    assert [uid for uid in held if pulled[uid].read_bytes() != held[uid].read_bytes()] == []
    assert dcmread(pulled[extra.SOPInstanceUID]).PixelData == extra.PixelData
    syntaxes = {dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID for path in pulled.values()}
    assert {JPEG2000, JPEGLSLossless, JPEGLosslessSV1, RLELossless, ExplicitVRBigEndian} <= syntaxes


def test_a_second_pull_fetches_nothing_and_changes_nothing(mirror, url):
    before = {path: path.stat().st_mtime_ns for path in mirror.rglob("*.dcm")}
    assert pull(url, mirror, SECRET, filters={}) == Pulled(len(before), 0, len(before), {})
    assert {path: path.stat().st_mtime_ns for path in mirror.rglob("*.dcm")} == before


def test_only_the_files_that_were_deleted_are_pulled_again(mirror, url, tmp_path):
    shutil.copytree(mirror, tmp_path / "mirror")
    gone = sorted((tmp_path / "mirror").rglob("*.dcm"))[::7]
    for path in gone:
        path.unlink()
    count = len(_names(mirror))
    assert pull(url, tmp_path / "mirror", SECRET, filters={}) == Pulled(count, len(gone), count - len(gone), {})
    assert _names(tmp_path / "mirror") == _names(mirror)


@pytest.mark.parametrize(
    "filters",
    [
        {"Modality": "CT"},
        {"Modality": "CT,NM"},
        {"ModalitiesInStudy": "MR", "Modality": "M*"},
        {"StudyDate": "20040101-20041231"},
        {"BodyPartExamined": "WHOLE BODY"},
        {"Modality": "MR", "StudyDate": "20000101-"},
    ],
)
def test_filters_choose_the_series_that_match_and_no_other(url, headers, tmp_path, filters):
    if "BodyPartExamined" in filters:
        filters = {"BodyPartExamined": "WHOLE*"}  # this Orthanc does not decode spaces in a query
    pull(url, tmp_path, SECRET, filters=filters)
    expected = {dataset.SOPInstanceUID for dataset in headers if _fits(dataset, filters)}
    assert expected
    found = {dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in tmp_path.rglob("*.dcm")}
    assert found == expected


def _fits(dataset, filters):
    oracle = {
        "CT": lambda value: value == "CT",
        "CT,NM": lambda value: value in {"CT", "NM"},
        "MR": lambda value: value == "MR",
        "M*": lambda value: value.startswith("M"),
        "WHOLE*": lambda value: value.startswith("WHOLE"),
        "20040101-20041231": lambda value: value[:4] == "2004",
        "20000101-": lambda value: value >= "20000101",
    }
    keys = {"ModalitiesInStudy": "Modality"}  # the files sent have one modality a study
    return all(oracle[wanted](str(dataset.get(keys.get(key, key)) or "")) for key, wanted in filters.items())


def test_filters_that_nothing_matches_are_an_error(url, tmp_path):
    with pytest.raises(DataError, match="nothing that matches"):
        pull(url, tmp_path, SECRET, filters={"Modality": "PT"})


def test_a_pull_that_was_killed_goes_on_and_ends_with_the_same_mirror(mirror, url, tmp_path):
    program = (
        "import sys; from pathlib import Path; from fedssl.data.dicomweb import pull\n"
        f"pull({url!r}, Path(sys.argv[1]), {SECRET!r}, filters={{}}, connections=1)"
    )
    folder = tmp_path / "mirror"
    process = subprocess.Popen([sys.executable, "-c", program, folder])
    deadline = time.monotonic() + 20
    while len(_names(folder)) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    total, came = len(_names(mirror)), len(_names(folder))
    assert 5 <= came < total
    assert pull(url, folder, SECRET, filters={}) == Pulled(total, total - came, came, {})
    assert {name: (folder / name).read_bytes() for name in _names(folder)} == {
        name: (mirror / name).read_bytes() for name in _names(mirror)
    }
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("password", ["wrong", ""])
def test_a_wrong_password_or_none_says_which_variables_to_set(url, tmp_path, monkeypatch, password):
    monkeypatch.setenv("FEDSSL_DICOMWEB_PASSWORD", password)
    if not password:
        monkeypatch.delenv("FEDSSL_DICOMWEB_USER")
    start = time.monotonic()
    with pytest.raises(DataError, match="Set FEDSSL_DICOMWEB_USER and FEDSSL_DICOMWEB_PASSWORD"):
        pull(url, tmp_path, SECRET, filters={})
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda url: url.replace("/dicom-web", "/wado"), "Check that the address is the DICOMweb root"),
        (lambda url: url.replace("/dicom-web", ""), "Check that the address is the DICOMweb root"),
        (lambda url: re.sub(r":\d+/", ":1/", url), "does not accept connections"),
        (lambda url: url.replace("http:", "https:"), "REQUESTS_CA_BUNDLE"),
    ],
)
def test_a_wrong_address_ends_at_once_in_a_sentence(url, tmp_path, wrong, sentence):
    start = time.monotonic()
    with pytest.raises(DataError, match=sentence):
        pull(wrong(url), tmp_path, SECRET, filters={})
    assert time.monotonic() - start < 5


def test_no_patient_uid_or_password_is_in_a_folder_name_a_log_or_a_message(url, headers, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    events = []
    stop = progress.listen(events.append)
    result = pull(url, tmp_path / "mirror", SECRET, filters={})
    stop()
    captured = capfd.readouterr()
    names = "\n".join(_names(tmp_path / "mirror"))
    said = "\n".join([caplog.text, captured.out, captured.err, repr(events), repr(result), names])
    assert events[-1] == progress.Done("pulling images", result.instances, result.instances)
    keywords = ("PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    for dataset in headers:
        values = {keyword: str(dataset.get(keyword) or "").strip("^ ") for keyword in keywords}
        assert [keyword for keyword, value in values.items() if value and value in said] == []
    assert os.environ["FEDSSL_DICOMWEB_PASSWORD"] not in said
