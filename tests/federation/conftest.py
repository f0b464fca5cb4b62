"""A real PACS for the tests: Orthanc with its DICOMweb plugin on loopback, filled through STOW-RS."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import requests
from dicomweb_client.web import DICOMwebClient
from pydicom import dcmread
from pydicom.data import get_testdata_file

USER, PASSWORD = "fedssl", "only-for-this-test"
ORTHANC = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PLUGIN = next(Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb.so"), None)
COMPRESSED = [
    "MR_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm", "693_J2KI.dcm", "emri_small_RLE.dcm", "SC_rgb_jpeg_gdcm.dcm",
    "JPEG-LL.dcm", "ExplVR_BigEnd.dcm", "image_dfl.dcm", "CT_small.dcm", "OBXXXX1A_rle.dcm",
]  # fmt: skip


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def _die_with_the_tests():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even if pytest itself is killed


def _wait_until_it_answers(process, address, log):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            requests.get(f"{address}/studies?limit=1", auth=(USER, PASSWORD), timeout=1).raise_for_status()
        except requests.RequestException:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"Orthanc did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The http root of an empty Orthanc that wants a password and dies with the module."""
    if not (ORTHANC and PLUGIN):
        pytest.skip("Orthanc or its DICOMweb plugin is not installed (Debian: orthanc-dicomweb)")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    settings = {
        "Name": "fedssl-test", "HttpPort": port, "DicomServerEnabled": False, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}, "Plugins": [str(PLUGIN)],
        "StorageDirectory": str(folder / "store"), "IndexDirectory": str(folder / "store"),
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [ORTHANC, folder / "orthanc.json"], stdout=stream, stderr=stream, preexec_fn=_die_with_the_tests
        )
    try:
        address = f"http://127.0.0.1:{port}/dicom-web"
        _wait_until_it_answers(process, address, log)
        yield address
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(folder / "store", ignore_errors=True)


@pytest.fixture(scope="module")
def sent(archive, hospitals):
    """What the archive holds: path by SOPInstanceUID, after it was stored."""
    paths = [Path(get_testdata_file(name)) for name in COMPRESSED] + sorted(hospitals.rglob("*.dcm"))
    session = requests.Session()
    session.auth = (USER, PASSWORD)
    client, held = DICOMwebClient(archive, session), {}
    for path in paths:
        # As it lies on the disk: pydicom would write some of these files in another way.
        body = b"--XX\r\nContent-Type: application/dicom\r\n\r\n" + path.read_bytes() + b"\r\n--XX--"
        kind = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=XX'}
        session.post(f"{archive}/studies", data=body, headers=kind, timeout=20).raise_for_status()
        held[dcmread(path, stop_before_pixels=True).SOPInstanceUID] = path
    extra = dcmread(get_testdata_file("MR_small_RLE.dcm"))
    extra.SOPInstanceUID = extra.file_meta.MediaStorageSOPInstanceUID = f"{extra.SOPInstanceUID}.1"
    client.store_instances([extra])  # one by the client library, too
    assert len(held) == len(paths)
    return held, extra


@pytest.fixture(scope="module")
def headers(sent):
    """The headers of all that was sent."""
    return [dcmread(path, stop_before_pixels=True) for path in sent[0].values()] + [sent[1]]


@pytest.fixture
def url(archive, sent, monkeypatch):
    monkeypatch.setenv("FEDSSL_DICOMWEB_USER", USER)
    monkeypatch.setenv("FEDSSL_DICOMWEB_PASSWORD", PASSWORD)
    monkeypatch.delenv("FEDSSL_DICOMWEB_TOKEN", raising=False)
    return f"dicomweb+{archive}"
