"""Pulling from a PACS that misbehaves, without a real one."""

import gzip
import re
import stat
import time

import pytest
from misbehaving_pacs import Answer, _cut, _file, _files, _hang, _pull, _status
from pydicom import dcmread

from fedssl import progress
from fedssl.data import dicomweb, dicomweb_client
from fedssl.errors import DataError


def test_everything_is_pulled_into_folders_that_only_the_owner_reads(pacs, tmp_path, heard):
    assert _pull(pacs, tmp_path / "m") == dicomweb.Pulled(6, 6, 0, {})
    files = _files(tmp_path / "m")
    assert {dcmread(path).SOPInstanceUID for path in files} == {uid for held in pacs.held.values() for uid in held}
    assert all(path.read_bytes() == _file(dcmread(path).SOPInstanceUID) for path in files)
    for path in files:
        assert re.fullmatch(r"[0-9a-f]{16}/[0-9a-f]{16}/[0-9a-f]{16}\.dcm", str(path.relative_to(tmp_path / "m")))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in path.parents[:2]} == {0o700}
    assert heard[-1] == progress.Done("pulling images", 6, 6)
    assert pacs.asked["host with port"] == sum(
        pacs.asked[kind] for kind in ("studies", "series", "instances", "instance")
    )


def test_a_complete_series_is_not_asked_for_its_instances_again(pacs, tmp_path):
    _pull(pacs, tmp_path)
    before = pacs.asked.copy()
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(6, 0, 6, {})
    assert pacs.asked["instances"] == before["instances"]
    assert pacs.asked["instance"] == before["instance"]


def test_only_what_is_missing_is_pulled_and_leftovers_of_a_killed_run_go(pacs, tmp_path):
    _pull(pacs, tmp_path)
    lost = _files(tmp_path)[2]
    lost.rename(lost.with_name(f".{lost.name}.1.tmp"))
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(6, 1, 5, {})
    assert lost in _files(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_an_error_that_passes_costs_nothing_but_a_pause_that_is_told(pacs, tmp_path, heard, status):
    pacs.troubles = {"search": iter([_status(status)] * 2), "instance": iter([_status(status, Retry_After="0")] * 2)}
    assert _pull(pacs, tmp_path).new == 6
    notes = [event.text for event in heard if isinstance(event, progress.Note)]
    assert any(f"({status}); attempt" in note for note in notes)


def test_the_pause_a_busy_server_asks_for_is_kept(pacs, tmp_path):
    pacs.troubles = {"search": iter([_status(429, Retry_After="1")])}
    start = time.monotonic()
    assert _pull(pacs, tmp_path).new == 6
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("trouble", [_cut, _hang])
def test_a_body_that_breaks_off_and_an_answer_that_never_comes_are_asked_for_again(pacs, tmp_path, trouble):
    pacs.troubles = {"instance": iter([trouble])}
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(6, 6, 0, {})
    assert all(path.read_bytes() == _file(dcmread(path).SOPInstanceUID) for path in _files(tmp_path))


def test_a_server_that_hangs_ends_in_a_sentence_and_in_bounded_time(pacs, tmp_path):
    pacs.troubles = {"search": iter([_hang] * 9)}
    start = time.monotonic()
    with pytest.raises(DataError, match=r"does not answer in time\. Try again later"):
        _pull(pacs, tmp_path, retries=1, timeout=(0.3, 0.3))
    assert time.monotonic() - start < 3


def test_a_server_that_drips_is_left(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb_client, "_SLOWEST_BYTES_PER_S", 1e9)

    def drip(answer):
        answer.send_response(200)
        for name, value in {"Content-Type": "multipart/related; boundary=XX", "Content-Length": "99"}.items():
            answer.send_header(name, value)
        answer.end_headers()
        for _ in range(9):
            answer.wfile.write(b"-")
            answer.wfile.flush()
            time.sleep(0.1)
        answer.close_connection = True

    pacs.troubles = {"instance": iter([drip])}
    result = _pull(pacs, tmp_path, retries=0, timeout=(0.3, 0.3))
    assert result.failed == {"the server sends too slowly": 1}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (lambda answer, _: Answer.instance(answer, _file("1.2.999")), "sends another image than"),
        (lambda answer, _: Answer.instance(answer, b"<html>no image</html>"), "else than a DICOM file"),
        (lambda answer, _: answer.send(b"<html></html>", "text/html"), "else than a DICOM file"),
        (lambda answer, body: Answer.instance(answer, body, b"\r\n--XX\r\n\r\n+\r\n--XX--"), "more than the one"),
        (lambda answer, _: _status(404)(answer), "knows no such resource (404)"),
        (lambda answer, _: _status(500)(answer), "answers with an error (500)"),
    ],
)  # fmt: skip
def test_a_bad_image_is_counted_with_its_reason_and_the_rest_comes(pacs, tmp_path, shape, reason):
    bad = "1.2.2.1.2"
    pacs.shape = lambda answer, body: (shape if answer.path.endswith(bad) else Answer.instance)(answer, body)
    result = _pull(pacs, tmp_path)
    assert (result.instances, result.new, sum(result.failed.values())) == (6, 5, 1)
    assert reason in next(iter(result.failed))
    assert len(_files(tmp_path)) == 5


def test_an_image_above_the_size_allowed_is_counted_and_not_kept(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb_client, "LARGEST_INSTANCE", 5000)
    result = _pull(pacs, tmp_path)
    assert result.failed == {"the server sends more bytes than allowed": 6}
    assert not _files(tmp_path)


@pytest.mark.parametrize("size", [1, 7, 2**18])
def test_a_boundary_is_found_however_the_bytes_arrive(size):
    body = b"\r\n--X" * 3 + bytes(range(256)) * 5
    message = b"preamble\r\n--XX\r\nContent-Type: a/b\r\n\r\n" + body + b"\r\n--XX--\r\nepilogue"
    blocks = iter([message[start : start + size] for start in range(0, len(message), size)])
    assert b"".join(dicomweb_client._part(blocks, b"\r\n--XX")) == body


def test_a_body_without_parts_and_one_that_is_compressed_on_the_way_are_taken(pacs, tmp_path):
    pacs.shape = lambda answer, body: answer.send(gzip.compress(body), "application/dicom", Content_Encoding="gzip")
    assert _pull(pacs, tmp_path).new == 6
    assert all(path.read_bytes() == _file(dcmread(path).SOPInstanceUID) for path in _files(tmp_path))


@pytest.mark.parametrize(("cap", "counts"), [(1, True), (2, False), (500, False)])
def test_a_server_that_caps_its_pages_or_does_not_count_loses_nothing(pacs, tmp_path, cap, counts):
    pacs.cap, pacs.counts_known = cap, counts
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(6, 6, 0, {})
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(6, 0, 6, {})


def test_a_server_without_paging_is_trusted_only_when_its_page_is_not_full(pacs, tmp_path, monkeypatch):
    pacs.offset_known = pacs.counts_known = False
    assert _pull(pacs, tmp_path).new == 6
    monkeypatch.setattr(dicomweb_client, "PAGE", 2)
    with pytest.raises(DataError, match="gives the same page whichever is asked for"):
        _pull(pacs, tmp_path / "again")


def test_an_answer_that_passes_over_a_filter_is_left_out_and_told(pacs, tmp_path, heard):
    with pytest.raises(DataError, match="nothing that matches"):
        _pull(pacs, tmp_path, {"Modality": "CT"})
    assert any(isinstance(event, progress.Note) and event.alarm and "Modality" in event.text for event in heard)
    assert pacs.asked["instance"] == 0
    assert _pull(pacs, tmp_path, {"Modality": "CT,MR", "StudyDate": "2020*"} | {"StudyDate": "20200101-"}).new == 6
