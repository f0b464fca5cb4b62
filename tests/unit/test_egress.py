"""The egress manifest: whatever left a hospital is in it, and whoever takes something out of it is noticed."""

import csv
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedssl.cli_egress import egress as verb
from fedssl.errors import PolicyError, StorageError
from fedssl.packing import pack
from fedssl.site import egress as egress_module
from fedssl.site.egress import (
    Egress,
    bytes_since,
    default_egress,
    describe_counts,
    describe_state,
    summary,
    verify,
)

DIGEST = hashlib.sha256(b"what left").hexdigest()
START = "0" * 64
COMMAND = typer.Typer()
COMMAND.command()(verb)


def message(number=1, run="study", kind="train", **more):
    """A message of 7 bytes of arrays in a frame of 100 bytes and its number."""
    counts = describe_counts({"mass": np.zeros(7, np.uint8)})
    fields = {"kind": kind, "run": run, "round": number, "counts": counts, "metrics": {"loss": 0.1 * number}}
    return fields | {"frame_bytes": 100 + number, "sha256": DIGEST} | more


@pytest.fixture
def manifest(tmp_path):
    return Egress(tmp_path / "state" / "manifest.jsonl", tmp_path / "cache" / "anchor.json", "NORTH")


@pytest.fixture
def filled(manifest):
    """Six messages of two runs; the last is a refusal."""
    for number in range(5):
        manifest.append(message(number, f"run{number % 2}", epsilon=0.5 * number or None))
    manifest.append(message(5, "run1", "refusal", reason="has too few images", counts=[]))
    return manifest


def again(manifest):
    return Egress(manifest.path, manifest.anchor, manifest.site)


def lines_of(manifest):
    return manifest.path.read_bytes().splitlines(keepends=True)


def refused(manifest):
    """Nothing is appended and nothing is read; gives what is said."""
    before = manifest.path.read_bytes(), manifest.anchor.read_bytes()
    said = set()
    for use in (
        lambda: again(manifest).append(message(9)),
        lambda: manifest.append(message(9)),
        lambda: verify(manifest.path, manifest.anchor),
        lambda: bytes_since(again(manifest), datetime(2020, 1, 1, tzinfo=UTC)),
    ):
        with pytest.raises(PolicyError) as caught:
            use()
        said.add(str(caught.value))
    assert (manifest.path.read_bytes(), manifest.anchor.read_bytes()) == before
    (text,) = said
    assert str(manifest.path.parent.parent) not in text
    return text


# ---------------------------------------------------------------- what a tensor is


def state_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(4, 3, 2, generator=generator),
        "encoder.scale": torch.randn((), generator=generator),
        "prototypes": torch.randn(5, 4, generator=generator),
    }


def travelling(state, precision="float32", reference=None):
    arrays, layout = pack(state, precision, reference)
    return {name: array.numpy() for name, array in arrays.items()}, dict(layout)


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_every_tensor_is_described_by_exactly_the_bytes_that_travel(precision, difference):
    state, reference = state_of(), state_of(1)
    arrays, layout = travelling(state, precision, reference if difference else None)
    halved = difference and precision != "float32"
    found = describe_state(arrays, layout)
    assert [entry["name"] for entry in found] == list(state)
    for entry, (name, value) in zip(found, state.items(), strict=True):
        sent = (value - reference[name] if halved else value).to(getattr(torch, precision))
        data = bytes(sent.reshape(-1).view(torch.uint8).tolist())
        squares = [float(one) ** 2 for one in sent.double().flatten()]
        assert entry == {
            "name": name, "dtype": precision, "shape": list(value.shape), "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(), "norm": pytest.approx(sum(squares) ** 0.5, rel=1e-12),
            "difference": halved,
        }  # fmt: skip
    assert sum(entry["bytes"] for entry in found) == sum(array.nbytes for array in arrays.values())


def test_other_dtypes_travel_as_they_are_beside_narrowed_ones():
    state = {"w": torch.ones(2, 2), "steps": torch.tensor([3, 4]), "used": torch.tensor([True]), "w2": torch.ones(3)}
    found = {entry["name"]: entry for entry in describe_state(*travelling(state, "bfloat16"))}
    told = {name: (one["dtype"], one["shape"], one["bytes"], one["norm"]) for name, one in found.items()}
    assert told == {
        "w": ("bfloat16", [2, 2], 8, 2.0), "w2": ("bfloat16", [3], 6, pytest.approx(3**0.5)),
        "steps": ("int64", [2], 16, 5.0), "used": ("bool", [1], 1, 1.0),
    }  # fmt: skip
    assert found["steps"]["sha256"] == hashlib.sha256(np.array([3, 4], "<i8").tobytes()).hexdigest()


def test_a_number_that_is_none_is_said_to_be_so_and_survives_the_file(manifest):
    state = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([-float("inf")]), "c": torch.zeros(0)}
    tensors = describe_state(*travelling(state))
    manifest.append(message(tensors=tensors, metrics={"loss": float("nan"), "best": np.float32("inf")}))
    (entry,) = verify(manifest.path, manifest.anchor)
    assert [one["norm"] for one in entry["tensors"]] == ["nan", "inf", 0.0]
    assert entry["metrics"] == {"loss": "nan", "best": "inf"}


def test_counts_are_described_by_the_bytes_in_the_order_that_numpy_writes():
    usage = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    mass, usage_entry = describe_counts({"mass": np.array([3.0, 4.0], np.float32), "usage": usage})
    assert (mass["norm"], mass["bytes"], mass["dtype"], mass["difference"]) == (5.0, 8, "float32", False)
    assert usage_entry["shape"] == [2, 3]
    assert usage_entry["sha256"] == hashlib.sha256(usage.T.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays, layout: arrays.update(hidden=np.zeros(9)), "arrays of float32, hidden, and .* names float32"),
        (lambda arrays, layout: arrays.clear(), "arrays of nothing"),
        (lambda arrays, layout: arrays.update(float32=np.zeros(46, np.float32)), "46 values does not fit the 45"),
        (lambda arrays, layout: arrays.update(float32=np.zeros((45, 1), np.float32)), "45 values does not fit"),
        (lambda arrays, layout: arrays.update(float32=np.zeros(45, np.float64)), "travels as float32.* are float64"),
        (lambda arrays, layout: layout.update(precision="bfloat16"), "travels as bfloat16.* are float32"),
        (lambda arrays, layout: layout.update(precision="float8"), "travels as float8"),
        (lambda arrays, layout: layout.update(layout="{"), "layout cannot be read"),
        (lambda arrays, layout: layout.update(layout="[]"), "layout cannot be read"),
        (lambda arrays, layout: layout.pop("difference"), "layout cannot be read"),
        (lambda arrays, layout: layout.update(layout='{"float32":[["a",[-45,-1]]]}'), "does not fit"),
        (lambda arrays, layout: layout.update(layout='{"float32":[["a",[40]],["a",[5]]]}'), "names a tensor twice"),
    ],
)  # fmt: skip
def test_what_the_layout_does_not_name_cannot_be_described_and_does_not_leave(change, said):
    arrays, layout = travelling(state_of())
    change(arrays, layout)
    with pytest.raises(PolicyError, match=said):
        describe_state(arrays, layout)


def test_an_array_without_numbers_cannot_be_described():
    with pytest.raises(PolicyError, match="tensor names holds no numbers"):
        describe_counts({"names": np.array(["patient"])})


# ---------------------------------------------------------------- the chain


def test_a_message_is_entered_whole_in_a_file_that_only_its_owner_can_read(manifest):
    entry = manifest.append(message(3, facts={"examples": np.int64(12), "independent": False, "key": b"\xff"}))
    assert entry["content_bytes"] == 7
    assert entry == verify(manifest.path, manifest.anchor)[0]
    assert entry["facts"] == {"examples": 12, "independent": False, "key": "ff"}
    assert (entry["site"], entry["kind"], entry["run"], entry["round"]) == ("NORTH", "train", "study", 3)
    assert (entry["epsilon"], entry["reason"], entry["tensors"], entry["frame_bytes"]) == (None, "", [], 103)
    assert datetime.now(UTC) - datetime.fromisoformat(entry["time"]) < timedelta(minutes=1)
    for path in (manifest.path, manifest.anchor):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_every_entry_holds_the_hash_of_the_one_before_it(filled):
    previous = START
    for number, line in enumerate(lines_of(filled)):
        entry = json.loads(line)
        own = entry.pop("hash")
        assert (entry["number"], entry["previous"]) == (number, previous)
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert own == hashlib.sha256(text.encode()).hexdigest()
        previous = own
    assert json.loads(filled.anchor.read_text()) == {"site": "NORTH", "number": 5, "hash": previous}


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "gossip"}, {"sha256": "abc"}, {"frame_bytes": -1}, {"content_bytes": 6}, {"more": 1}, {"round": "1"}],
)
def test_a_message_that_is_described_impossibly_is_refused(manifest, wrong):
    with pytest.raises(PolicyError, match="incomplete or impossible"):
        manifest.append(message(**wrong))
    for name in ("kind", "sha256", "frame_bytes"):
        with pytest.raises(PolicyError, match="incomplete or impossible"):
            manifest.append({key: value for key, value in message().items() if key != name})
    assert not manifest.path.exists()


def unchained(entry):
    rest = {name: value for name, value in entry.items() if name != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    whole = rest | {"hash": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def sealed_anew(entries):
    """What somebody would write who changes entries and makes all hashes fit."""
    lines, previous = [], START
    for number, entry in enumerate(entries):
        lines.append(unchained(entry | {"previous": previous, "number": number}))
        previous = json.loads(lines[-1])["hash"]
    return lines


def forged(number, **fields):
    def damage(lines):
        entries = [json.loads(line) for line in lines]
        entries[number].update(fields)
        return sealed_anew(entries)

    return damage


DAMAGES = {
    "size edited": (lambda lines: [*lines[:2], lines[2].replace(b":102", b":101"), *lines[3:]], "Entry 2 .*hash"),
    "blank added": (lambda lines: [*lines[:4], lines[4].replace(b',"', b', "'), *lines[5:]], "Entry 4 .*hash"),
    "first line removed": (lambda lines: lines[1:], "Entry 0 .*it is entry 1"),
    "middle line removed": (lambda lines: lines[:3] + lines[4:], "Entry 3 .*it is entry 4"),
    "lines swapped": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "Entry 2 .*it is entry 3"),
    "line doubled": (lambda lines: [*lines, lines[-1]], "Entry 6 .*it is entry 5"),
    "no JSON": (lambda lines: [*lines[:2], b"{[\n", *lines[3:]], "Entry 2 .*not JSON"),
    "too deep": (lambda lines: [*lines[:2], b"[" * 100_000 + b"\n", *lines[3:]], "Entry 2 .*not JSON"),
    "a list": (lambda lines: [*lines, b"[1]\n"], "Entry 6 .*lacks"),
    "last line removed": (lambda lines: lines[:-1], "Entry 5 .*not there: 5 entries"),
    "half removed": (lambda lines: lines[:3], "Entry 5 .*not there: 3 entries"),
    "end cut": (lambda lines: [*lines[:-1], lines[-1][:40]], "Entry 5 .*not there"),
    "newline lost": (lambda lines: [*lines[:-1], lines[-1][:-1]], "Entry 5 .*not there"),
    "not chained": (lambda lines: [*lines, unchained(json.loads(lines[-1]) | {"number": 6})], "Entry 6 .*not follow"),
    "emptied": (lambda lines: [], "missing or empty.* 6 entries"),
    "written anew": (forged(3, frame_bytes=9), "Entry 5 .*not the one"),
    "of another site": (forged(3, site="SOUTH"), "Entry 3 .*another site"),
    "message taken out": (lambda lines: sealed_anew(json.loads(line) for line in lines[1:]), "Entry 5 .*not there"),
    "impossible time": (forged(1, time="yesterday"), "Entry 1 .*values are impossible"),
    "time without zone": (forged(1, time="2026-01-01T00:00:00"), "Entry 1 .*values are impossible"),
    "impossible size": (forged(1, content_bytes=True), "Entry 1 .*values are impossible"),
    "impossible tensor": (forged(1, tensors=[{"name": "w"}]), "Entry 1 .*values are impossible"),
    "tensor that is none": (forged(1, tensors=["w"]), "Entry 1 .*values are impossible"),
    "more than it holds": (forged(1, content_bytes=3), "Entry 1 .*values are impossible"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_its_entry_and_nothing_more_is_entered(filled, damage):
    change, said = DAMAGES[damage]
    filled.path.write_bytes(b"".join(change(lines_of(filled))))
    text = refused(filled)
    assert re.search(said, text)
    assert "Nothing leaves this hospital" in text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A manifest of four entries that the properties below change."""
    folder = tmp_path_factory.mktemp("small")
    manifest = Egress(folder / "a" / "manifest.jsonl", folder / "b" / "anchor.json", "Süd 1")
    anchors = []
    for number in range(4):
        manifest.append(message(number))
        anchors.append(manifest.anchor.read_bytes())
    return manifest, manifest.path.read_bytes(), verify(manifest.path, manifest.anchor), anchors


def noticed(small, data):
    manifest, whole, entries, anchors = small
    manifest.anchor.write_bytes(anchors[-1])
    manifest.path.write_bytes(data)
    if data == whole:
        assert verify(manifest.path, manifest.anchor) == entries
        return
    for use in (lambda: verify(manifest.path, manifest.anchor), lambda: again(manifest).append(message(9))):
        with pytest.raises(PolicyError):
            use()
    assert manifest.path.read_bytes() == data
    with pytest.raises(PolicyError):
        manifest.append(message(9))
    try:  # without the anchor entries at the end may be missing, or the last look unfinished; no other
        found = verify(manifest.path, None)
    except PolicyError:
        return
    kept = b"".join(whole.splitlines(keepends=True)[: len(found)])
    assert found == entries[: len(found)]
    assert data.startswith(kept)
    assert b"\n" not in data[len(kept) : -1]


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(deadline=None)
def test_a_single_changed_byte_is_noticed(small, place, value):
    data = bytearray(small[1])
    data[place % len(data)] = value
    noticed(small, bytes(data))


@given(begin=st.integers(0, 10**6), length=st.integers(1, 3000))
@settings(deadline=None)
def test_bytes_taken_out_anywhere_are_noticed(small, begin, length):
    begin %= len(small[1])
    noticed(small, small[1][:begin] + small[1][begin + length :])


@given(order=st.lists(st.integers(0, 3), max_size=6))
@settings(deadline=None)
def test_lines_in_any_other_order_or_number_are_noticed(small, order):
    lines = small[1].splitlines(keepends=True)
    noticed(small, b"".join(lines[number] for number in order))


def test_a_manifest_cut_at_any_byte_is_refused_or_was_never_longer_for_its_anchor(small):
    manifest, whole, entries, anchors = small
    for length, (known, anchor) in itertools.product(range(0, len(whole) + 1, 7), enumerate(anchors)):
        manifest.path.write_bytes(whole[:length])
        manifest.anchor.write_bytes(anchor)
        there = whole[:length].count(b"\n")
        if known < there:
            assert verify(manifest.path, manifest.anchor) == entries[:there]
        else:
            with pytest.raises(PolicyError):
                verify(manifest.path, manifest.anchor)


def test_an_older_copy_is_refused_whether_or_not_it_went_on(filled, tmp_path):
    shutil.copy(filled.path, tmp_path / "backup")
    filled.append(message(6))
    newer = filled.anchor.read_bytes()
    shutil.copy(tmp_path / "backup", filled.path)
    assert "older copy" in refused(filled)
    filled.anchor.unlink()
    for number in range(2):
        again(filled).append(message(number))
    filled.anchor.write_bytes(newer)
    assert "went on from an older copy" in refused(filled)


def test_a_missing_manifest_is_refused_while_its_anchor_is_there(filled):
    filled.path.unlink()
    with pytest.raises(PolicyError, match="missing or empty"):
        filled.append(message(6))
    with pytest.raises(PolicyError, match="missing or empty"):
        verify(filled.path, filled.anchor)


def test_another_site_does_not_write_here(filled):
    with pytest.raises(PolicyError, match="belongs to site NORTH, not to SOUTH"):
        Egress(filled.path, filled.anchor, "SOUTH").append(message(6))
    assert len(verify(filled.path, filled.anchor)) == 6


def test_a_change_in_the_middle_is_noticed_by_a_process_that_had_verified_the_file_before(filled):
    lines = lines_of(filled)
    os.utime(filled.path, ns=(0, 0))
    assert filled.append(message(6))["number"] == 6
    before = filled.path.stat()
    with filled.path.open("r+b") as stream:
        stream.write(lines[0].replace(b":100", b":999"))
    os.utime(filled.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "Entry 0" in refused(filled)


# ---------------------------------------------------------------- kills, full disks, two processes


def test_an_entry_that_a_killed_process_did_not_finish_is_cut_off_with_a_note(filled, heard):
    whole, anchor, entries = filled.path.read_bytes(), filled.anchor.read_bytes(), verify(filled.path, filled.anchor)
    for rest in (b'{"counts":[', b'{"counts"\0\0\0\n', b"\xff", lines_of(filled)[0][:-1]):
        filled.path.write_bytes(whole + rest)
        filled.anchor.write_bytes(anchor)
        own = again(filled)
        assert len(own.sent()) == 6
        assert filled.path.read_bytes() == whole + rest
        assert own.append(message(6))["number"] == 6
        assert verify(filled.path, filled.anchor)[:6] == entries
        (note,) = heard
        assert "had not finished was removed" in note.text
        assert not note.alarm
        heard.clear()


def test_a_first_entry_that_was_not_finished_is_no_manifest_yet(manifest):
    manifest.path.parent.mkdir(parents=True)
    manifest.path.write_bytes(b'{"counts')
    assert manifest.sent() == []
    assert manifest.append(message())["number"] == 0
    assert len(verify(manifest.path, manifest.anchor)) == 1


def killed(*arguments):
    raise KeyboardInterrupt


def test_a_process_that_dies_between_entry_and_anchor_is_caught_up_with_silently(filled, monkeypatch, heard):
    with monkeypatch.context() as patch:
        patch.setattr(egress_module, "write_anchor", killed)
        with pytest.raises(KeyboardInterrupt):
            filled.append(message(6))
    assert len(verify(filled.path, filled.anchor)) == 7
    assert json.loads(filled.anchor.read_text())["number"] == 5
    for own in (again(filled), filled):
        own.append(message(7))
    assert [entry["number"] for entry in verify(filled.path, filled.anchor)] == list(range(9))
    assert json.loads(filled.anchor.read_text())["number"] == 8
    assert heard == []


@pytest.mark.parametrize("anchor", [None, b"", b"[]", b"{", b'{"number":1e999,"hash":"y"}', b'{"number":-1,"hash":""}'])
def test_a_lost_anchor_is_an_alarm_and_written_anew(filled, heard, anchor):
    filled.anchor.unlink()
    if anchor is not None:
        filled.anchor.write_bytes(anchor)
    assert len(verify(filled.path, filled.anchor)) == 6
    filled.append(message(6))
    (note,) = heard
    assert note.alarm
    assert "anchor of the egress manifest is lost" in note.text
    assert json.loads(filled.anchor.read_text())["number"] == 6


def test_an_anchor_that_is_many_entries_behind_is_an_alarm(filled, heard):
    old = filled.anchor.read_bytes()
    for number in range(3):
        filled.append(message(number))
    filled.anchor.write_bytes(old)
    filled.append(message(9))
    (note,) = heard
    assert note.alarm
    assert "was 3 entries behind" in note.text


def test_a_manifest_without_an_anchor_is_possible(tmp_path, heard):
    own = Egress(tmp_path / "a" / "manifest.jsonl", None, "NORTH")
    for number in range(3):
        own.append(message(number))
    assert len(verify(own.path, None)) == 3
    assert heard == []


def test_a_full_disk_leaves_the_manifest_as_it_was(filled):
    whole = filled.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, limits[1]))
    try:
        with pytest.raises(StorageError, match="disk is full: the egress manifest could not be written whole"):
            filled.append(message(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert filled.path.read_bytes() == whole
    assert filled.append(message(6))["number"] == 6


def test_the_entry_is_on_the_disk_before_the_anchor_knows_it_and_before_append_returns(filled, monkeypatch):
    seen, fsync = [], os.fsync

    def watched(descriptor):
        fsync(descriptor)
        seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(str(filled.path.parents[1])))

    monkeypatch.setattr("os.fsync", watched)
    filled.append(message(6))
    assert seen == ["/state/manifest.jsonl", f"/cache/.anchor.json.{os.getpid()}.tmp", "/cache"]


APPENDS = """
import sys
from pathlib import Path
from fedssl.site.egress import Egress
own = Egress(Path(sys.argv[1]), Path(sys.argv[2]), "NORTH")
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    own.append({"kind": "train", "run": sys.argv[3], "round": number, "frame_bytes": 1, "sha256": "0" * 64})
"""


def test_processes_that_append_at_once_lose_no_entry(manifest):
    command = [sys.executable, "-c", APPENDS, manifest.path, manifest.anchor]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b")]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0, 0]
    entries = verify(manifest.path, manifest.anchor)
    for run in ("a", "b"):
        assert [entry["round"] for entry in entries if entry["run"] == run] == list(range(40))
    assert json.loads(manifest.anchor.read_text())["number"] == 79


def read_so_far():
    """Bytes that this process has asked the system to read."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this kernel does not count what a process reads")
def test_ten_thousand_messages_are_entered_without_reading_the_manifest_again(manifest, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # durability is tested above
    manifest.append(message())
    line, before = len(lines_of(manifest)[0]), read_so_far()
    for number in range(10_000):
        manifest.append(message(number))
    assert bytes_since(manifest, datetime(2020, 1, 1, tzinfo=UTC)) == 101 + sum(100 + n for n in range(10_000))
    each = (read_so_far() - before) / 10_001
    assert line < each < line + 400  # its last line, and the anchor
    assert len(manifest.path.read_bytes()) > 10_000 * line


# ---------------------------------------------------------------- sums, and the verb


def test_the_bytes_of_a_day_are_those_of_its_messages(manifest, monkeypatch):
    times = iter(["2026-03-01T08:00:00+00:00", "2026-03-01T20:00:00+00:00", "2026-03-02T07:00:00+00:00"])
    monkeypatch.setattr(egress_module, "_now", lambda: next(times))
    for number in (1, 2, 3):
        manifest.append(message(number))
    entries = verify(manifest.path, manifest.anchor)
    for hour, expected in ((0, 306), (8, 306), (9, 205), (21, 103), (48, 0)):
        since = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=hour)
        assert bytes_since(manifest, since) == bytes_since(again(manifest), since) == expected
        assert bytes_since(entries, since) == bytes_since(iter(entries), since) == expected
    berlin = datetime.fromisoformat("2026-03-01T21:00:00+01:00")
    assert bytes_since(entries, berlin) == 205


def test_the_bytes_of_nothing_are_none_and_no_file_is_made(manifest):
    assert bytes_since(manifest, datetime(2020, 1, 1, tzinfo=UTC)) == bytes_since([], datetime.now(UTC)) == 0
    assert not manifest.path.parent.exists()


def test_a_summary_adds_up_what_each_run_sent(filled):
    entries = verify(filled.path, filled.anchor)
    found = summary(iter(entries))
    first, last = entries[0]["time"], entries[-1]["time"]
    assert found == {
        "site": "NORTH",
        "head": f"5:{entries[-1]['hash']}",
        "runs": [
            {
                "run": "run0", "rounds": 3, "messages": 3, "refusals": 0, "content_bytes": 21, "frame_bytes": 306,
                "first": first, "last": entries[4]["time"], "epsilon": 2.0,
            },
            {
                "run": "run1", "rounds": 2, "messages": 3, "refusals": 1, "content_bytes": 14, "frame_bytes": 309,
                "first": entries[1]["time"], "last": last, "epsilon": 1.5,
            },
        ],
        "total": {
            "rounds": 5, "messages": 6, "refusals": 1, "content_bytes": 35, "frame_bytes": 615, "first": first,
            "last": last, "epsilon": 2.0,
        },
    }  # fmt: skip
    assert summary([])["total"]["messages"] == 0


def test_every_site_and_every_kit_has_a_manifest_and_an_anchor_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    path, anchor = default_egress("NORTH")
    assert path.is_relative_to(tmp_path / "state" / "egress")
    assert anchor.is_relative_to(tmp_path / "cache" / "egress-anchors")
    assert default_egress("NORTH", tmp_path / "kit")[0] == tmp_path / "kit" / "egress" / "manifest.jsonl"
    pairs = [default_egress(site, place) for site in ("A", "a/b", "a_b") for place in (None, tmp_path / "1", tmp_path)]
    assert len({anchor for _, anchor in pairs}) == 9
    monkeypatch.delenv("FEDSSL_CACHE")
    alone = default_egress("NORTH", tmp_path / "kit")[1]
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "kit" / "cache"))  # as the agent sets it
    assert alone == default_egress("NORTH", tmp_path / "kit")[1]


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A hospital's kit with a manifest of three messages, the first with twelve tensors."""
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "site.yaml").write_text("site: NORTH\nserver: host:1\ndata: images\nplan: []\n")
    own = Egress(*default_egress("NORTH", folder / "state"), "NORTH")
    state = {f"layer{number}": torch.full((2, 2), float(number)) for number in range(12)}
    facts = {"examples": 120, "independent": False}
    own.append(message(1, tensors=describe_state(*travelling(state, "bfloat16")), facts=facts, epsilon=1.25))
    own.append(message(2))
    own.append(message(0, "other", "refusal", reason="has too few images", counts=[]))
    return folder, own


def show(folder, *arguments):
    return CliRunner().invoke(COMMAND, [str(folder), *map(str, arguments)])


def test_the_verb_shows_runs_and_ends_with_the_head(kit):
    folder, own = kit
    result = show(folder)
    assert result.exit_code == 0, result.output
    head = verify(own.path, own.anchor)[-1]["hash"]
    assert result.stdout.splitlines()[-1] == f"NORTH: 3 messages, chain verified, head 2:{head}"
    for word in ("study", "other", "1.25", "203 B"):
        assert word in result.output
    assert "layer0" not in result.output
    assert "No anchor" not in result.output


def test_the_verb_shows_a_round_with_its_first_ten_tensors(kit):
    folder, own = kit
    said = show(folder, "--round", 1).output
    for word in ("layer9", "and 2 more", "bfloat16", "2 x 2", "examples 120", "loss 0.1", "epsilon: 1.25", "mass"):
        assert word in said
    assert "layer10" not in said
    assert verify(own.path, own.anchor)[0]["tensors"][9]["sha256"] in said
    said = show(folder, "--messages", "--run", "other").output
    assert "reason: has too few images" in said
    assert "layer0" not in said
    assert "study" not in said
    assert "3 messages, chain verified" in said


def test_the_verb_gives_all_to_programs_and_writes_nothing(kit, tmp_path):
    folder, own = kit
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = json.loads(show(folder, "--format", "json").stdout)
    entries = verify(own.path, own.anchor)
    assert found == summary(entries) | {"notes": [], "entries": entries}
    assert json.loads(show(folder, "--format", "json", "--round", 2).stdout)["entries"] == entries[1:2]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_export_has_one_row_a_tensor(kit, tmp_path):
    folder, own = kit
    assert show(folder, "--csv", tmp_path / "left.csv").exit_code == 0
    with (tmp_path / "left.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    entries = verify(own.path, own.anchor)
    expected = [(entry, one) for entry in entries for one in (*entry["tensors"], *entry["counts"])]
    assert len(rows) == len(expected) == 14
    for row, (entry, one) in zip(rows, expected, strict=True):
        assert (row["number"], row["time"], row["site"]) == (str(entry["number"]), entry["time"], "NORTH")
        assert (row["name"], row["sha256"], row["bytes"]) == (one["name"], one["sha256"], str(one["bytes"]))
        assert (row["message_sha256"], row["shape"]) == (DIGEST, "x".join(map(str, one["shape"])))
    assert [row["part"] for row in rows] == ["state"] * 12 + ["counts"] * 2
    assert stat.S_IMODE((tmp_path / "left.csv").stat().st_mode) == 0o600


def test_the_verb_ends_with_code_7_and_names_the_damaged_entry(kit, tmp_path):
    folder, own = kit
    own.path.write_bytes(own.path.read_bytes().replace(b'"examples":120', b'"examples":121'))
    result = show(folder, "--csv", tmp_path / "left.csv")
    assert result.exit_code == 7
    assert "Entry 0 of the egress manifest is damaged: its hash does not fit its content." in result.output
    assert "verified" not in result.output
    assert not (tmp_path / "left.csv").exists()
    own.path.unlink()
    assert show(folder).exit_code == 7


def test_the_verb_says_what_is_odd_but_allowed(kit):
    folder, own = kit
    old = own.anchor.read_bytes()
    own.append(message(3))
    own.anchor.write_bytes(old)
    with own.path.open("ab") as stream:
        stream.write(b'{"torn')
    said = show(folder).output
    assert "Note: The last entry is unfinished" in said
    assert "The anchor knows entries up to 2 only" in said
    own.anchor.unlink()
    assert "No anchor" in show(folder).output


def test_the_verb_says_when_nothing_has_left(tmp_path):
    (tmp_path / "site.yaml").write_text("site: NORTH\nserver: host:1\ndata: images\nplan: []\n")
    result = show(tmp_path)
    assert (result.exit_code, result.stdout.strip()) == (
        0, "Nothing has left NORTH: its egress manifest has no entry.",
    )  # fmt: skip
    assert show(tmp_path / "nowhere").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["site.yaml"]


def test_a_dry_run_shows_what_would_leave_under_a_heading_that_nothing_did(kit, monkeypatch):
    folder, own = kit
    before = own.path.read_bytes()
    would = message(1, tensors=describe_state(*travelling(state_of())), content_bytes=187)
    room = ModuleType("fedssl.deployment.dry_run")
    room.dry_run = lambda site: would | {"run": site.site}
    monkeypatch.setitem(sys.modules, room.__name__, room)
    result = show(folder, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Nothing left. This is what would:\nMessage: train, run NORTH, round 1; 187 B")
    assert "prototypes" in result.output
    assert json.loads(show(folder, "--dry-run", "--format", "json").stdout) == {"dry_run": would | {"run": "NORTH"}}
    assert own.path.read_bytes() == before


def test_the_verb_and_the_manifest_import_neither_torch_nor_flower():
    program = "import sys, fedssl.site.egress, fedssl.cli_egress\n"
    program += "print([name for name in ('torch', 'opacus', 'flwr', 'hydra') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
