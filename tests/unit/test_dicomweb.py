"""Pulling from a PACS that misbehaves: a small local server that does what real ones do on bad days."""

import gzip
import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from fedssl import progress
from fedssl.data import dicomweb, dicomweb_client
from fedssl.data.dicomweb import pull
from fedssl.data.dicomweb_client import matches
from fedssl.errors import ConfigError, DataError, StorageError

SECRET = b"s" * 32
QUICK = {"connections": 2, "retries": 3, "timeout": (1.0, 1.0), "pause": 0.01}


def _file(uid):
    dataset = dcmread(get_testdata_file("MR_small_RLE.dcm"))
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


class Pacs(ThreadingHTTPServer):
    """An archive of studies with one series each; what a test sets makes it misbehave."""

    daemon_threads = True

    def __init__(self, studies=2, instances=3):
        super().__init__(("127.0.0.1", 0), Answer)
        self.held = {f"1.2.{s}": [f"1.2.{s}.1.{i}" for i in range(1, instances + 1)] for s in range(1, studies + 1)}
        self.asked = Counter()
        self.troubles = {}  # how often the first requests of a kind ("search", "instance") get which answer
        self.cap = self.shape = self.claimed = None
        self.offset_known = self.counts_known = True
        self.patient = "PID-{}"
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"dicomweb+http://127.0.0.1:{self.server_port}/dicom-web"

    def trouble(self, kind):
        with self.lock:
            return next(self.troubles.get(kind, iter(())), None)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet

    def log_message(self, *_):
        pass

    def send(self, body, kind="application/dicom+json", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        pacs, address = self.server, urlsplit(self.path)
        parts = address.path.removeprefix("/dicom-web/").split("/")
        kind = "instance" if len(parts) == 6 else "search"
        with pacs.lock:
            pacs.asked[("studies", "series", "instances")[len(parts) // 2] if kind == "search" else kind] += 1
            pacs.asked["host with port"] += self.headers["Host"] == f"127.0.0.1:{pacs.server_port}"
        trouble = pacs.trouble(kind)
        if trouble:
            return trouble(self)
        if kind == "instance":
            return (pacs.shape or Answer.instance)(self, _file(parts[-1]))
        return self.search(parts, {key: value[0] for key, value in parse_qs(address.query).items()})

    def search(self, parts, query):
        pacs, count = self.server, (lambda n: {"vr": "IS", "Value": [n]}) if self.server.counts_known else lambda n: {}
        if len(parts) == 1:
            found = [
                {} if not study else
                {"0020000D": {"vr": "UI", "Value": [study]}, "00201206": count(1),
                 "00201208": count(pacs.claimed or len(held)),
                 "00100020": {"vr": "LO", "Value": [pacs.patient.format(study)]},
                 "00080020": {"vr": "DA", "Value": ["20200101"]}}
                for study, held in pacs.held.items()
            ]  # fmt: skip
        elif len(parts) == 3:
            held = pacs.held[parts[1]]
            found = [
                {"0020000E": {"vr": "UI", "Value": [f"{parts[1]}.1"]}, "00201209": count(pacs.claimed or len(held)),
                 "00080060": {"vr": "CS", "Value": ["MR"]}}
            ]  # fmt: skip
        else:
            found = [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in pacs.held[parts[1]]]
        start = int(query.get("offset", 0)) if pacs.offset_known else 0
        self.send(json.dumps(found[start : start + min(int(query["limit"]), pacs.cap or 9999)]).encode())

    def instance(self, body, tail=b"\r\n--XX--\r\n"):
        head = b"--XX\r\nContent-Type: application/dicom\r\n\r\n"
        self.send(head + body + tail, 'multipart/related; type="application/dicom"; boundary="XX"')


@pytest.fixture
def pacs():
    with Pacs() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def heard():
    events = []
    stop = progress.listen(events.append)
    yield events
    stop()


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch):
    for name in ("USER", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"FEDSSL_DICOMWEB_{name}", raising=False)


def _status(status, **headers):
    return lambda answer: answer.send(b"", status=status, **headers)


def _cut(answer):
    answer.send_response(200)
    answer.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=XX')
    answer.end_headers()
    answer.wfile.write(b"--XX\r\nContent-Type: application/dicom\r\n\r\n" + _file("1.2.1.1.1")[:3000])
    answer.close_connection = True


def _hang(answer):
    time.sleep(1.6)
    answer.close_connection = True


def _pull(pacs, folder, filters=None, **more):
    return pull(pacs.url, folder, SECRET, filters=filters or {}, **{**QUICK, **more})


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".pulling")


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
