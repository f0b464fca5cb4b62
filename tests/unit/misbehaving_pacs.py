"""A PACS on loopback that behaves as badly as a test wants."""

import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from pydicom import dcmread
from pydicom.data import get_testdata_file

from fedssl.data.dicomweb import pull

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
