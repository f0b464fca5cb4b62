"""Addresses, filters, credentials and servers that cannot be used, and what is said of them."""

import logging
import os
import shutil
import socket
import ssl
import subprocess
import time

import pytest
from misbehaving_pacs import QUICK, SECRET, Answer, Pacs, _cut, _files, _pull, _status

from fedssl import progress
from fedssl.data import dicomweb
from fedssl.data.dicomweb import pull
from fedssl.data.dicomweb_client import matches
from fedssl.errors import ConfigError, DataError, StorageError


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        ("CT", "CT", True), ("CT", "ct", True), ("CT", "MR", False), ("", "CT", False), ("CT\\SR", "CT", True),
        ("CHEST PA", "CHEST*", True), ("A[1]", "A[1]", True), ("CT", "CT,MR", True), ("A, B", "A, B", True),
        ("20200615", "20200101-20201231", True), ("20210101", "20200101-20201231", False), ("20200615", "-2020", False),
        ("20200615", "20200101-", True), ("20200615", "-20200101", False), ("", "-20200101", False),
    ],
)  # fmt: skip
def test_a_filter_matches_as_the_standard_says(found, wanted, fits):
    assert matches(found, wanted) is fits


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        ({"PatientName": "SECRET"}, "There are StudyDate, StudyDescription"),
        ({"Modalty": "CT"}, "No filter is called Modalty"),
        ({"Modality": " "}, "has no value"),
        ({"StudyDate": "last year"}, "Write YYYYMMDD"),
        ({"StudyDate": "-"}, "Write YYYYMMDD"),
    ],
)
def test_a_filter_nobody_can_use_is_refused_before_anything_is_asked(tmp_path, filters, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        pull("dicomweb+http://127.0.0.1:1/", tmp_path, SECRET, filters=filters)
    assert not any(value.strip() and value in str(caught.value) for value in filters.values() if value != "-")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("dicomweb+https://user:hunter2@pacs/dicom-web", "Set FEDSSL_DICOMWEB_USER"),
        ("https://pacs/dicom-web", r"Write dicomweb\+https://"),
        ("dicomweb+ftp://pacs/", r"Write dicomweb\+https://"),
        ("dicomweb+http:///dicom-web", r"Write dicomweb\+https://"),
        ("dicomweb+http://pacs/dicom-web?limit=1", r"Write dicomweb\+https://"),
    ],
)
def test_an_address_that_is_none_or_holds_a_password_is_refused(tmp_path, url, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        pull(url, tmp_path, SECRET, filters={})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [{"USER": "a"}, {"PASSWORD": "b"}, {"USER": "a", "PASSWORD": "b", "TOKEN": "c"}, {"TOKEN": "a\r\nb: c"}],
)
def test_credentials_that_cannot_be_used_are_refused_without_being_shown(tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"FEDSSL_DICOMWEB_{name}", value)
    with pytest.raises(ConfigError, match="FEDSSL_DICOMWEB_TOKEN, to what it expects"):
        pull("dicomweb+http://127.0.0.1:1/", tmp_path, SECRET, filters={})


def test_a_token_is_sent_and_a_netrc_is_not(pacs, tmp_path, monkeypatch):
    seen = set()
    pacs.shape = lambda answer, body: (seen.add(answer.headers["Authorization"]), Answer.instance(answer, body))
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    _pull(pacs, tmp_path / "without")
    monkeypatch.setenv("FEDSSL_DICOMWEB_TOKEN", "t0ken")
    _pull(pacs, tmp_path / "with")
    assert seen == {None, "Bearer t0ken"}


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (_status(401), "FEDSSL_DICOMWEB_USER and FEDSSL_DICOMWEB_PASSWORD"),
        (_status(403), "refuses access"),
        (_status(404), "DICOMweb root"),
        (_status(400), "does not understand the search"),
        (_status(302, Location="http://127.0.0.1:1/"), "Give the final address"),
        (lambda answer: answer.send(b"<html>Welcome</html>", "text/html"), "does not answer as DICOMweb does"),
        (lambda answer: answer.send(b'["x"]'), "does not answer as DICOMweb does"),
        (lambda answer: answer.send(b"[]"), "nothing that matches"),
        (lambda answer: answer.send(b"", status=204), "nothing that matches"),
    ],
)
def test_a_search_that_fails_ends_at_once_in_a_sentence_that_says_what_to_do(pacs, tmp_path, trouble, sentence):
    pacs.troubles = {"search": iter([trouble] * 9)}
    with pytest.raises(DataError, match=sentence):
        _pull(pacs, tmp_path, retries=9, pause=9.0)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("dicomweb+http://127.0.0.1:{closed}/", "does not accept connections"),
        ("dicomweb+http://no-such-host.invalid/", "host name that nobody knows"),
        ("dicomweb+https://127.0.0.1:{open}/", "REQUESTS_CA_BUNDLE"),
        ("dicomweb+http://127.0.0.1:99999/", "impossible address"),
    ],
)
def test_an_address_where_nobody_answers_is_not_asked_twice(pacs, tmp_path, url, sentence):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = url.format(closed=unused.getsockname()[1], open=pacs.server_port)
        with pytest.raises(DataError, match=sentence) as caught:
            pull(address, tmp_path, SECRET, filters={}, **{**QUICK, "retries": 9, "pause": 9.0})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_certificate_file_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="REQUESTS_CA_BUNDLE names no file"):
        pull("dicomweb+https://127.0.0.1:1/", tmp_path, SECRET, filters={})


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_hospitals_own_certificate_is_trusted_when_its_file_is_given_and_only_then(pacs, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=pacs", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    pacs.socket = context.wrap_socket(pacs.socket, server_side=True)
    monkeypatch.setattr(Pacs, "handle_error", lambda *_: None)
    url = pacs.url.replace("http:", "https:")
    with pytest.raises(DataError, match=r"no certificate that can be verified.*REQUESTS_CA_BUNDLE"):
        pull(url, tmp_path / "mirror", SECRET, filters={}, **QUICK)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert pull(url, tmp_path / "mirror", SECRET, filters={}, **QUICK).new == 6


def test_a_server_that_goes_away_stops_the_run_and_what_came_is_kept(pacs, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "_GIVE_UP_AFTER", 2)
    pacs.shape = lambda answer, body: _cut(answer) if "/1.2.2.1/" in answer.path else Answer.instance(answer, body)
    with pytest.raises(DataError, match="new images have come and are kept"):
        _pull(pacs, tmp_path, connections=1, retries=1)
    assert len(_files(tmp_path)) == 3


def test_a_series_that_cannot_be_listed_is_counted_whole(pacs, tmp_path):
    pacs.troubles = {"search": iter([None, _status(500)])}
    result = _pull(pacs, tmp_path, connections=1, retries=0)
    assert result == dicomweb.Pulled(6, 3, 0, {"the server answers with an error (500)": 3})


def test_images_that_are_counted_but_not_listed_are_missed_aloud(pacs, tmp_path):
    pacs.claimed = 5
    assert _pull(pacs, tmp_path) == dicomweb.Pulled(10, 6, 0, {"the server counts more images than it lists": 4})


def test_a_study_without_any_attribute_does_not_end_the_list(pacs, tmp_path):
    pacs.held = {"": [], **pacs.held}
    result = _pull(pacs, tmp_path, connections=1)
    assert result == dicomweb.Pulled(7, 6, 0, {"the server lists something without a valid UID": 1})


@pytest.mark.parametrize("uid", ["../../etc", "1.2/3", "", "1.2?x=y"])
def test_a_uid_that_is_none_never_becomes_an_address_or_a_file(pacs, tmp_path, uid):
    pacs.held["1.2.1"][1] = uid
    result = _pull(pacs, tmp_path)
    assert result.failed == {"the server lists something without a valid UID": 1}
    assert result.new == 5
    assert {path.parents[2] for path in _files(tmp_path)} == {tmp_path}


def test_a_study_without_a_patient_is_a_patient_of_its_own(pacs, tmp_path):
    pacs.patient = ""
    assert _pull(pacs, tmp_path).new == 6
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_a_mirror_that_cannot_be_written_says_so(pacs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        _pull(pacs, tmp_path / "file" / "mirror")


def test_a_long_silence_is_told(pacs, tmp_path, heard, monkeypatch):
    monkeypatch.setattr(dicomweb, "_SILENCE_S", 0.3)
    pacs.troubles = {"instance": iter([lambda answer: (time.sleep(0.8), _status(503)(answer))])}
    _pull(pacs, tmp_path)
    assert any("nothing has come for" in event.text for event in heard if isinstance(event, progress.Note))


def test_no_uid_or_patient_reaches_a_log_or_a_message(pacs, tmp_path, heard, caplog):
    caplog.set_level(logging.DEBUG)
    pacs.troubles = {"instance": iter([_status(503), _cut, _status(404)]), "search": iter([_status(503)])}
    result = _pull(pacs, tmp_path)
    said = caplog.text + repr(heard) + repr(result) + " ".join(map(os.fspath, _files(tmp_path)))
    assert result.failed
    assert "1.2.1" not in said
    assert "PID-" not in said
