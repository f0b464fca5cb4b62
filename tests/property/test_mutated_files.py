"""Thousands of damaged files: each is read or refused with a reason, and the process that indexes them lives on."""

import io
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from fedssl.data.cache import ImageStore
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.store import Source, Store

BUNDLED = (  # every transfer syntax, colour, many frames, odd sizes, big endian, without meta information
    "CT_small", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_expb", "MR_small_implicit", "MR_truncated",
    "MR_small_padded", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "JPEG2000", "JPEG-lossy", "JPGExtended",
    "JPEGLSNearLossless_08", "JPEGLSNearLossless_16", "image_dfl", "no_meta", "ExplVR_BigEndNoMeta", "nested_priv_SQ",
    "SC_rgb_gdcm_KY", "SC_rgb_jls_lossy_sample", "SC_rgb_jpeg_dcmtk", "SC_rgb_jpeg_gdcm", "SC_rgb_rle", "badVR",
    "SC_rgb_rle_32bit", "SC_rgb_rle_16bit_2frame", "SC_rgb_small_odd", "SC_rgb_small_odd_big_endian",
    "SC_ybr_full_422_uncompressed", "SC_rgb_small_odd_jpeg", "SC_jpeg_no_color_transform", "693_J2KI",
    "GDCMJ2K_TextGBR", "SC_rgb_rle_2frame",
)  # fmt: skip
SIZES = (  # US attributes that decide how much memory an image takes
    b"\x28\x00\x10\x00", b"\x28\x00\x11\x00", b"\x28\x00\x00\x01", b"\x28\x00\x01\x01", b"\x28\x00\x02\x00",
    b"\x28\x00\x02\x01", b"\x28\x00\x03\x01", b"\x28\x00\x06\x00",
)  # fmt: skip
FRAMES = b"\x28\x00\x08\x00IS"


def originals(hospitals):
    """(suffix, content) of files of every kind."""
    files = [(".dcm", Path(get_testdata_file(f"{name}.dcm")).read_bytes()) for name in BUNDLED]
    files += [(".dcm", path.read_bytes()) for path in sorted(hospitals.rglob("*.dcm"))[::97]]
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (40, 48), dtype=np.uint8)
    deep = rng.integers(0, 65_535, (40, 48), dtype=np.uint16)
    for values, kind in [
        (grey, "png"),
        (np.stack([grey] * 3, 2), "jpeg"),
        (deep, "png"),
        (deep, "tiff"),
        (grey, "tiff"),
    ]:
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, kind)
        files.append((f".{kind}", stream.getvalue()))
    for dtype in (np.int16, np.float32, np.float64):
        volume = nib.Nifti1Image((rng.normal(size=(12, 10, 3)) * 100).astype(dtype), np.eye(4))
        files.append((".nii", volume.to_bytes()))
    return files


def cut(data, rng, other):
    return data[: rng.integers(len(data))]


def flip_header(data, rng, other):
    return flip(data, rng, 128, min(len(data), 1500))


def flip_body(data, rng, other):
    return flip(data, rng, len(data) // 3, len(data))


def flip(data, rng, first, last):
    changed = bytearray(data)
    for place in rng.integers(min(first, last - 1), last, rng.integers(1, 20)):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


def splice(data, rng, other):
    return data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]


def repeat(data, rng, other):
    start, place = rng.integers(len(data), size=2)
    return data[:place] + data[start : start + rng.integers(4, 300)] + data[place:]


def lengthen(data, rng, other):
    changed = bytearray(data)
    place = rng.integers(min(132, len(data) - 4), len(data) - 3)
    changed[place : place + 4] = rng.choice([b"\xff" * 4, rng.bytes(4), rng.bytes(2) + b"\0\0", b"\xff\xff\xff\x7f"])
    return bytes(changed)


def zero(data, rng, other):
    place, length = rng.integers(len(data)), rng.integers(1, 2000)
    return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]


def absurd(data, rng, other):
    """Give one attribute of the image's size another value, or NumberOfFrames another number."""
    changed = bytearray(data)
    for tag in (SIZES[number] for number in rng.permutation(len(SIZES))[:2]):
        place = data.find(tag + b"US")
        if place >= 0:
            value = rng.choice([0, 1, 2, 3, 7, 8, 12, 16, 32, 64, 255, 4096, 32_768, 65_535])
            struct.pack_into("<H", changed, place + 8, value)
    place = data.find(FRAMES)
    if place >= 0:
        length = data[place + 6]
        changed[place + 8 : place + 8 + length] = rng.choice([b"9" * length, b"0" * length, b"-" + b"1" * (length - 1)])
    return bytes(changed)


MUTATIONS = (cut, flip_header, flip_body, splice, repeat, lengthen, zero, absurd)


def write_mutated(root, sources, count, seed):
    """Write damaged files in patients' folders; returns how many files there are."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        suffix, content = sources[rng.integers(len(sources))]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            other = sources[rng.integers(len(sources))][1]
            content = MUTATIONS[rng.integers(len(MUTATIONS))](content, rng, other) or b"\0" * 8
        folder = root / f"WARD-{number % 20:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"CASE{number:05d}{suffix}").write_bytes(content)
    for number, (suffix, content) in enumerate(sources):
        (root / "WARD-000" / f"WHOLE{number:05d}{suffix}").write_bytes(content)
    return count + len(sources)


@dataclass(frozen=True)
class Run:
    store: Store
    images: ImageStore
    files: int
    seconds: float
    parent_mib: int
    warnings: list[str]


@pytest.fixture(scope="module", params=[300, pytest.param(5000, marks=pytest.mark.slow)])
def run(request, hospitals, tmp_path_factory):
    """A store over so many damaged files."""
    folder = tmp_path_factory.mktemp("mutated")
    files = write_mutated(folder / "root", originals(hospitals), request.param, seed=request.param)
    decoding = Decoding(16, burned_in="allow", memory_gb=4.0, timeout_s=10.0)
    store = Store(folder / "store", Source(folder / "root", "here"), decoding)
    before, start = held_mib(reset=True), time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        images = store.open()
    said = [str(warning.message) for warning in warned if warning.category is RuntimeWarning]
    done = Run(store, images, files, time.monotonic() - start, held_mib() - before, said)
    sys.stdout.write(table(done))
    return done


def held_mib(*, reset=False):
    """The most memory that this process held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def table(run):
    """Reasons with counts; numbers in them are left out."""
    digits = str.maketrans(dict.fromkeys("0123456789", "#"))
    reasons = Counter()
    for reason, count in run.store.summary()["unreadable"].items():
        reasons[" ".join(word.translate(digits).replace("##", "#").rstrip("#") for word in reason.split())] += count
    head = f"\n{run.files} files, {run.seconds:.1f} s, {len(run.images)} images, parent +{run.parent_mib} MiB\n"
    return head + "".join(f"{count:6d}  {reason}\n" for reason, count in reasons.most_common())


def test_every_damaged_file_is_an_image_or_has_a_reason_or_is_foreign(run):
    summary = run.store.summary()
    (site,) = summary["sites"]
    assert site["files"] + sum(summary["other_files"].values()) == run.files
    assert site["unreadable"] == sum(summary["unreadable"].values())
    assert site["files"] - site["unreadable"] == len(set(run.images.column("image").tolist()))
    assert (run.store.snapshot() / "unreadable.csv").read_text().count("\n") == site["unreadable"] + 1
    assert not any(reason.startswith("took longer") for reason in summary["unreadable"])


def test_no_reason_holds_a_path_or_a_value_of_a_tag(run, hospitals):
    values = {"WARD", "CASE", "WHOLE", ".dcm", ".nii", ".png", "/", str(run.store.folder)}
    warnings.simplefilter("ignore")  # pydicom
    for path in [*map(get_testdata_file, (f"{name}.dcm" for name in BUNDLED)), *sorted(hospitals.rglob("*.dcm"))[::97]]:
        for element in dcmread(path, force=True).iterall():
            if element.VR in {"PN", "UI", "LO", "DA", "TM", "SH"} and len(str(element.value)) > 4:
                values.add(str(element.value))
    reasons = "\n".join(run.store.summary()["unreadable"])
    assert not [value for value in values if not value.isdigit() and value in reasons]


def test_what_is_let_through_is_numbers_and_short_words(run):
    assert not run.warnings
    rows = np.arange(len(run.images))
    for some in np.array_split(rows, len(rows) // 1000 + 1):
        assert np.isfinite(run.images.read(some).shown()).all()
    for name in ("modality", "scanner", "description", "plane", "flags"):
        assert run.images.column(name).dtype.itemsize <= 4 * 256, name


def test_the_process_that_indexes_damaged_files_stays_small(run):
    assert run.parent_mib < 200


def test_a_second_scan_leaves_damaged_files_alone(run, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert len(run.store.open(rescan=True)) == len(run.images)


@pytest.mark.parametrize("number", ["99999999999999999999", "9999999999999999", "-99999999999", "inf", "1\\2", "1.5"])
def test_a_picture_is_kept_whatever_its_instance_number_says(number, tmp_path):
    content = Path(get_testdata_file("MR_small.dcm")).read_bytes()
    place = content.find(b"\x20\x00\x13\x00IS")
    text = number.encode() + b" " * (len(number) % 2)
    end = place + 8 + content[place + 6]
    (tmp_path / "root" / "patient").mkdir(parents=True)
    changed = content[: place + 6] + struct.pack("<H", len(text)) + text + content[end:]
    for name, data in [("first.dcm", content), ("odd.dcm", changed)]:
        (tmp_path / "root" / "patient" / name).write_bytes(data)
    store = Store(tmp_path / "store", Source(tmp_path / "root", "here"), Decoding(16, workers=1))
    assert sorted(store.open().column("order").tolist()) == [0, 1]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e38])
def test_a_voxel_that_is_no_number_leaves_the_others_finite(odd, tmp_path):
    values = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
    values[3, 3, 1] = odd
    (tmp_path / "root" / "patient").mkdir(parents=True)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "root" / "patient" / "volume.nii")
    store = Store(tmp_path / "store", Source(tmp_path / "root", "here"), Decoding(16, workers=1))
    shown = store.open().read(np.arange(3)).shown()
    assert np.isfinite(shown).all()
    assert (shown.std((1, 2, 3)) > 0.1).sum() >= 2
