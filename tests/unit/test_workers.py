"""Processes that decode: whatever a file does to its decoder costs that file and no other."""

import contextlib
import gzip
import os
import select
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames

from fedssl.data.decoding import workers
from fedssl.data.decoding.workers import Question, decode_all
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.store import Source, Store
from fedssl.errors import StorageError

MIB = 2**20
# A worker imports this before anything else. A file tells in its preamble what is to happen to its decoder.
SABOTEUR = r"""
import ctypes, itertools, os, signal, struct, sys, time
import pydicom
time.sleep(float(os.environ.get("SLOW_START", 0)))
read = pydicom.dcmread
def say(text, code=None):
    os.write(int(sys.argv[1]), text)
    os._exit(code) if code is not None else time.sleep(1e6)
class PanicException(BaseException):  # as decoders written in Rust raise it
    pass
ACTS = {
    "segfault": lambda: ctypes.string_at(0), "abort": os.abort, "exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "loop": lambda: sum(itertools.repeat(0)),
    "sleep": lambda: time.sleep(1e6), "hoard": lambda: [bytes(2**26) for _ in itertools.count()],
    "announce": lambda: (open(os.environ["ANNOUNCE"], "w").close(), sum(itertools.repeat(0))),
    "slow": lambda: time.sleep(1.5), "panic": lambda: exec("raise PanicException"),
    "linger": lambda: (os.close(int(sys.argv[1])), time.sleep(0.2), os._exit(5)),
    "half header": lambda: say(b"\0\0\0\x64{", code=0), "no json": lambda: say(b"\0\0\0\7no json"),
    "half pixels": lambda: say(b'\0\0\0\x11{"kind": "image"}'b"\0\0\2\0x", code=3),
    "no answer": lambda: say(b"\0\0\0\2{}\0\0\0\0"), "petabyte": lambda: say(struct.pack("!iQ", -1, 2**50)),
}
def dcmread(stream, *args, **how):
    ACTS.get(stream.getvalue()[:128].rstrip(b"\0").decode("latin-1"), int)()
    return read(stream, *args, **how)
pydicom.dcmread = dcmread
"""
CRASHED, SLOW = "crashed its decoder", "took longer than 3 s to decode"
FATES = {
    "segfault": f"{CRASHED} (SIGSEGV)", "abort": f"{CRASHED} (SIGABRT)", "exit": f"{CRASHED} (exit code 7)",
    "kill": f"{CRASHED} (SIGKILL)", "half header": f"{CRASHED} (exit code 0)",
    "half pixels": f"{CRASHED} (exit code 3)", "linger": f"{CRASHED} (exit code 5)", "loop": SLOW, "sleep": SLOW,
    "panic": "cannot be decoded (PanicException)", "hoard": "needs more memory than data.worker_memory_gb allows",
}  # fmt: skip


@pytest.fixture
def sabotaged(tmp_path, monkeypatch):
    """A folder whose files, written by ``marked``, can do harm to their decoder."""
    (tmp_path / "sitecustomize.py").write_text(SABOTEUR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def marked(folder, *marks):
    """Write one readable DICOM file for each mark."""
    content = Path(get_testdata_file("MR_small.dcm")).read_bytes()[128:]
    files = [folder / f"{number:04d}.dcm" for number in range(len(marks))]
    for path, mark in zip(files, marks, strict=True):
        path.write_bytes(mark.encode().ljust(128, b"\0") + content)
    return files


def asked(files):
    for path in files:
        size, modified = path.stat().st_size, path.stat().st_mtime_ns
        request = {"path": str(path), "modality": "", "trouble": "", "bytes": size, "modified_ns": modified}
        yield Question(request, path.name)


def decoded(files, *, count=2, memory_gb=2.0, timeout_s=3.0):
    return decode_all(asked(files), count=count, edge=16, burned_in="refuse", memory_gb=memory_gb, timeout_s=timeout_s)


def workers_of(parent):
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"decoding.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_decoder_that_dies_hangs_or_eats_memory_costs_exactly_its_own_file(sabotaged):
    marks = ["segfault", "", *FATES, *[""] * 20, "exit", "kill", "", "abort"]
    files = marked(sabotaged, *marks)
    answers = list(decoded(files))
    assert not workers_of(os.getpid())
    assert [answer.tag for answer in answers] == [path.name for path in files]
    found = {(mark, answer.found["reason"], len(answer.pixels)) for mark, answer in zip(marks, answers, strict=True)}
    assert found == {("", "", 16 * 16 * 2), *((mark, reason, 0) for mark, reason in FATES.items())}


@pytest.mark.parametrize("mark", ["no json", "no answer", "petabyte"])
def test_an_answer_that_is_no_answer_costs_only_its_file(sabotaged, mark):
    kinds = [answer.found.get("kind") for answer in decoded(marked(sabotaged, "", mark, ""))]
    assert kinds == ["image", "unreadable", "image"]


def test_no_process_is_left_when_the_consumer_stops_or_the_questions_fail(sabotaged):
    files = marked(sabotaged, *[""] * 20, "loop")
    answers = decoded(files)
    next(answers)
    assert workers_of(os.getpid())
    answers.close()
    assert not workers_of(os.getpid())
    with pytest.raises(FileNotFoundError):
        list(decoded([*files[:12], sabotaged / "gone.dcm"]))
    assert not workers_of(os.getpid())


def test_no_process_is_left_when_the_parent_cannot_write(sabotaged, tmp_path):
    (sabotaged / "patient").mkdir()
    marked(sabotaged / "patient", *[""] * 8)
    store = Store(tmp_path / "store", Source(sabotaged, "here"), Decoding(16), budget_gb=1e-9)
    with pytest.raises(StorageError, match="budget"):
        store.open()
    assert not workers_of(os.getpid())


def test_when_the_parent_is_killed_its_idle_and_its_busy_processes_end(sabotaged, tmp_path, monkeypatch):
    marked(sabotaged, "", "", "announce")
    os.mkfifo(tmp_path / "announced")
    monkeypatch.setenv("ANNOUNCE", str(tmp_path / "announced"))
    program = (
        "import sys; from pathlib import Path; from fedssl.data.store import *\n"
        "Store(Path(sys.argv[2]), Source(Path(sys.argv[1]), 'here'), Decoding(16, workers=2, timeout_s=1.0)).open()\n"
    )
    announced = os.open(tmp_path / "announced", os.O_RDONLY | os.O_NONBLOCK)
    parent = subprocess.Popen([sys.executable, "-c", program, sabotaged, tmp_path / "store"])
    assert select.select([announced], [], [], 30.0)[0]  # a decoder works on the last file
    handles = [os.pidfd_open(process) for process in workers_of(parent.pid)]
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    assert len(handles) == 2
    assert all(select.select([handle], [], [], 20.0)[0] for handle in handles)


def test_answers_keep_the_order_of_the_questions_and_few_wait_behind_a_slow_file(sabotaged):
    files = marked(sabotaged, "slow", *[""] * 300)
    given = []
    answers = decoded(given.append(path) or path for path in files)
    first = next(answers)
    assert len(given) <= 2 * (workers._AHEAD + workers._DEPTH)
    assert [first.tag, *(answer.tag for answer in answers)] == [path.name for path in files]


def test_time_in_which_a_process_starts_is_not_held_against_a_file(sabotaged, monkeypatch):
    monkeypatch.setenv("SLOW_START", "1.2")
    assert [answer.found["reason"] for answer in decoded(marked(sabotaged, "", ""), timeout_s=1.0)] == ["", ""]


def dicom(path, source="MR_small.dcm", **facts):
    dataset = dcmread(get_testdata_file(source))
    for name, value in facts.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def zeros(mib):
    """Deflate ``mib`` MiB of zeros without holding them: every flushed piece stands for itself."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return (stream.compress(bytes(MIB)) + stream.flush(zlib.Z_FULL_FLUSH)) * mib


def deflated(path, padding):
    """A deflated file of 1.1 GiB; ``padding`` moves its transfer syntax away from the start."""
    syntax = b"1.2.840.10008.1.2.1.99"
    layout = f"<HH2sHI{padding}xHH2sH{len(syntax)}s"
    meta = struct.pack(layout, 2, 1, b"OB", 0, padding, 2, 0x10, b"UI", len(syntax), syntax)
    path.write_bytes(bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + zeros(1100))


def jpeg(path, source, place, layout, *size):
    """A file whose compressed frame says at ``place`` that it is larger than the header does."""
    stream = bytearray(next(generate_frames(dcmread(get_testdata_file(source)).PixelData, number_of_frames=1)))
    struct.pack_into(layout, stream, stream.find(place) + len(place), *size)
    dicom(path, source, Rows=16, Columns=16, PixelData=encapsulate([bytes(stream)]))


def png(path):
    size = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    data = b"IDAT\x78\x9c" + zeros(382)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (size, data)
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def volume(path, *shape, extension=0):
    """A NIfTI header of that shape with few values behind it, or with ``extension`` MiB of zeros before them."""
    header = nib.Nifti1Header()
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["datatype"], header["bitpix"], header["magic"], header["vox_offset"] = 4, 16, b"n+1", 352 + extension * MIB
    start = header.binaryblock + struct.pack("<4Bii", extension > 0, 0, 0, 0, extension * MIB, 6) + bytes(192)
    compressed = gzip.compress(start) + gzip.compress(bytes(MIB)) * extension
    path.write_bytes(compressed if path.suffix == ".gz" else start)


ABSURD = {
    "pixels.dcm": lambda path: dicom(path, Rows=65_535, Columns=65_535, SamplesPerPixel=3),
    "frames.dcm": lambda path: dicom(path, NumberOfFrames=2**31 - 1),
    "short.dcm": lambda path: dicom(path, Rows=16_384, Columns=16_384, NumberOfFrames=90_000),
    "deflated.dcm": lambda path: deflated(path, 4_000),
    "jpeg2000.dcm": lambda path: jpeg(path, "MR_small_jp2klossless.dcm", b"\x51\0\x29\0\0", ">2I", 60_000, 60_000),
    "jpeg.dcm": lambda path: jpeg(path, "SC_rgb_jpeg_gdcm.dcm", b"\xff\xc3\0\x11\x08", ">2H", 65_500, 65_500),
    "png.png": png,
    "cube.nii": lambda path: volume(path, 32_767, 32_767, 32_767),
    "long.nii": lambda path: volume(path, 64, 64, 32_000, 32_000),
    "large.nii.gz": lambda path: volume(path, 16_000, 16_000, 1),
    "extension.nii.gz": lambda path: volume(path, 16, 16, 4, extension=400),
}


def peak_mib(process):
    """The most that a process has held since this was last asked."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


@pytest.mark.parametrize("name", ABSURD)
def test_a_file_that_announces_more_than_it_holds_is_refused_without_the_memory_for_it(tmp_path, name):
    dicom(tmp_path / "0.dcm")
    ABSURD[name](tmp_path / name)
    files = [tmp_path / file for file in ("0.dcm", name, "0.dcm")]
    with contextlib.closing(decoded(files, count=1, memory_gb=8.0, timeout_s=30.0)) as answers:
        first = next(answers).found
        (worker,) = workers_of(os.getpid())
        usual = peak_mib(worker)
        refused = next(answers).found
        more = peak_mib(worker) - usual
        assert [first["kind"], next(answers).found["kind"]] == ["image", "image"]
    assert refused["reason"].startswith(("is ", "holds ", "cannot be decoded ("))
    assert more < 128, f"{more} MiB were taken before the file was refused ({refused['reason']})"
