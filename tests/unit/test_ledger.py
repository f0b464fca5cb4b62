"""The privacy ledger: what was spent is never forgotten, whatever happens to the file, the clock or the disk."""

import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedssl.cli_privacy import privacy_app
from fedssl.errors import ConfigError, PrivacyError, StorageError
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.site import ledger as ledger_module
from fedssl.site import ledger_summary
from fedssl.site.ledger import Ledger, default_ledger, folder_name
from fedssl.site.ledger_file import read_chain

SPEND = Spend(sigma=2.0, rate=0.1, steps=4)  # 0.1 by the dumb accountant
DIGEST = hashlib.sha256(b"what left").hexdigest()
COMMAND = typer.Typer()
COMMAND.add_typer(privacy_app)


def dumb_epsilon(spends, delta):
    return math.sqrt(sum(one.steps * (one.rate / one.sigma) ** 2 for one in spends)) * 1e-6 / delta


@pytest.fixture
def dumb(monkeypatch):
    """An accountant that costs no time: the square root of steps (rate / sigma)^2."""
    monkeypatch.setattr(ledger_module, "epsilon_of", dumb_epsilon)
    monkeypatch.setattr(ledger_summary, "epsilon_of", dumb_epsilon)


@pytest.fixture
def ledger(tmp_path, dumb):
    return Ledger(tmp_path / "state" / "ledger.jsonl", tmp_path / "cache" / "anchor.json", site="NORTH", delta=1e-6)


@pytest.fixture
def filled(ledger):
    """Five rounds of two runs, the last without a release: 10 entries."""
    for number in range(5):
        reservation = ledger.reserve(f"run{number % 2}", number, SPEND, cap=9.0)
        if number < 4:
            ledger.release(reservation, DIGEST)
    return ledger


def again(ledger):
    return Ledger(ledger.path, ledger.anchor, site=ledger.site, delta=ledger.delta)


def lines_of(ledger):
    return ledger.path.read_bytes().splitlines(keepends=True)


def sealed_anew(entries):
    """What somebody would write who changes entries and makes all hashes fit."""
    lines, previous = [], "0" * 64
    for entry in entries:
        rest = {name: value for name, value in entry.items() if name != "hash"} | {"previous": previous}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        lines.append(json.dumps(rest | {"hash": previous}, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return lines


def refused(ledger):
    """Every method refuses; gives what is said."""
    said = set()
    for use in (
        lambda: again(ledger).reserve("run9", 1, SPEND, cap=9.0),
        lambda: again(ledger).release(("run0", 4), DIGEST),
        lambda: again(ledger).reserved("run0", 4),
        lambda: again(ledger).spends(),
        lambda: again(ledger).epsilon(),
        lambda: again(ledger).head,
        lambda: again(ledger).check_known(""),
    ):
        with pytest.raises(PrivacyError) as caught:
            use()
        said.add(str(caught.value))
    (text,) = said
    assert str(ledger.path.parent.parent) not in text
    return text


def test_the_first_reservation_opens_a_ledger_that_only_its_owner_can_read(ledger):
    assert (ledger.entries(), ledger.head, ledger.epsilon(), ledger.spends()) == ([], "", 0.0, [])
    assert not ledger.path.parent.exists()
    reservation = ledger.reserve("run", 1, SPEND, cap=1.0)
    assert (reservation.run, reservation.round_number, reservation.spend, reservation.number) == ("run", 1, SPEND, 1)
    assert reservation.epsilon == pytest.approx(0.1)
    assert [entry["kind"] for entry in ledger.entries()] == ["open", "reserve"]
    for path in (ledger.path, ledger.anchor):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_every_entry_holds_the_hash_of_the_one_before_it(filled):
    previous = "0" * 64
    for number, line in enumerate(lines_of(filled)):
        entry = json.loads(line)
        own = entry.pop("hash")
        assert (entry["number"], entry["previous"]) == (number, previous)
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert own == hashlib.sha256(text.encode()).hexdigest()
        previous = own
    assert filled.head == f"9:{previous}"


def test_a_reservation_above_the_cap_is_refused_before_a_byte_is_written(ledger):
    for number in range(4):
        ledger.reserve("run", number, SPEND, cap=0.2)
    before = ledger.path.read_bytes(), ledger.anchor.read_bytes()
    with pytest.raises(PrivacyError) as caught:
        ledger.reserve("other", 0, Spend(2.0, 0.1, 1), cap=0.2)
    for found in ("epsilon 0.2 ", "Spent is 0.2000", "make it 0.2062", "round 0 of run other", "fedssl privacy plan"):
        assert found in str(caught.value)
    assert (ledger.path.read_bytes(), ledger.anchor.read_bytes()) == before
    ledger.reserve("other", 0, Spend(2.0, 0.1, 1), cap=0.21)


@pytest.mark.parametrize("cap", [0.05, 0.0, -1.0, math.nan, -math.inf])
def test_a_cap_that_allows_nothing_refuses_the_first_round(ledger, cap):
    with pytest.raises(PrivacyError, match="Refused before"):
        ledger.reserve("run", 0, SPEND, cap=cap)
    assert ledger.entries() == []


@pytest.mark.parametrize("epsilon", [math.nan, math.inf])
def test_a_cost_that_is_no_number_is_refused_even_without_a_cap(ledger, monkeypatch, epsilon):
    monkeypatch.setattr(ledger_module, "epsilon_of", lambda spends, delta: epsilon)
    with pytest.raises(PrivacyError, match="Refused before"):
        ledger.reserve("run", 0, SPEND, cap=math.inf)
    assert ledger.entries() == []


def test_a_second_run_on_the_same_patients_adds_up(ledger):
    for number in range(2):
        ledger.reserve("first", number, SPEND, cap=1.0)
    last = ledger.reserve("second", 0, SPEND, cap=1.0)
    assert last.epsilon == ledger.epsilon() == pytest.approx(math.sqrt(3) * 0.1)
    assert ledger.epsilon("first") == pytest.approx(math.sqrt(2) * 0.1)
    assert ledger.epsilon("second") == pytest.approx(0.1)
    assert (ledger.spends(), ledger.spends("second")) == ([SPEND] * 3, [SPEND])


def test_a_run_has_a_cap_of_its_own(ledger):
    ledger.reserve("first", 0, SPEND, cap=1.0, run_cap=0.12)
    ledger.reserve("second", 0, SPEND, cap=1.0, run_cap=0.12)
    with pytest.raises(PrivacyError, match=r"\(the pilot\): this run may spend epsilon 0.15 "):
        ledger.reserve("second", 1, Spend(2.0, 0.1, 6), cap=1.0, run_cap=0.15, what="the pilot")
    assert len(ledger.spends()) == 2


def test_the_same_round_again_is_a_new_release_and_costs_again(ledger):
    first = ledger.reserve("run", 3, SPEND, cap=1.0)
    second = ledger.reserve("run", 3, SPEND, cap=1.0)
    assert second.epsilon == pytest.approx(math.sqrt(2) * first.epsilon)
    assert ledger.reserved("run", 3) == second
    assert ledger.reserved("run", 4) is None


def test_another_delta_or_another_site_is_refused_by_name(filled):
    with pytest.raises(PrivacyError, match="delta 1e-06 and was asked to count at 1e-05"):
        Ledger(filled.path, filled.anchor, site="NORTH", delta=1e-5).reserve("run", 9, SPEND, cap=9.0)
    with pytest.raises(PrivacyError, match="belongs to site NORTH, not to SOUTH"):
        Ledger(filled.path, filled.anchor, site="SOUTH", delta=1e-6).reserve("run", 9, SPEND, cap=9.0)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError):
            Ledger(filled.path, filled.anchor, site="NORTH", delta=delta)
    assert len(filled.entries()) == 10


@pytest.mark.parametrize(("run", "number"), [("", 0), ("x" * 201, 0), ("run", -1)])
def test_a_round_without_a_usable_name_is_refused(ledger, run, number):
    with pytest.raises(PrivacyError, match="counted from 0"):
        ledger.reserve(run, number, SPEND, cap=1.0)


def test_only_what_was_reserved_is_released_and_only_once(ledger):
    first = ledger.reserve("run", 1, SPEND, cap=1.0)
    second = ledger.reserve("run", 1, SPEND, cap=1.0)
    for nothing in (("run", 2), ("other", 1), ledger_module.Reservation(0, "run", 1, SPEND, 0.1)):
        with pytest.raises(PrivacyError, match="nothing in the privacy ledger was reserved"):
            ledger.release(nothing, DIGEST)
    ledger.release(("run", 1), DIGEST)
    before = ledger.head
    ledger.release(second, DIGEST)
    assert ledger.head == before
    with pytest.raises(PrivacyError, match="something else was released"):
        ledger.release(second, "0" * 64)
    ledger.release(first, "0" * 64)
    assert ledger.reserved("run", 1).released == DIGEST
    for digest in ("", "abc", DIGEST.upper()):
        with pytest.raises(PrivacyError, match="64 hexadecimal digits"):
            ledger.release(first, digest)


def changed(number, **fields):
    return lambda lines: [
        json.dumps(json.loads(line) | (fields if at == number else {}), sort_keys=True, separators=(",", ":")).encode()
        + b"\n"
        for at, line in enumerate(lines)
    ]


def rewritten(change):
    """A change by somebody who makes all hashes fit again."""

    def damage(lines):
        entries = [json.loads(line) for line in lines]
        change(entries)
        return sealed_anew(entries)

    return damage


def number_anew(entries, removed):
    del entries[removed]
    for number, entry in enumerate(entries):
        entry["number"] = number


DAMAGES = {
    "sigma edited": (changed(3, sigma=20.0), "Entry 3 .*hash"),
    "epsilon edited": (changed(7, epsilon=0.01), "Entry 7 .*hash"),
    "delta edited": (changed(0, delta=1e-3), "Entry 0 .*hash"),
    "time edited": (changed(2, time="2001-01-01T00:00:00+00:00"), "Entry 2 .*hash"),
    "kind edited": (changed(5, kind="forget"), "Entry 5 .*hash"),
    "field added": (changed(5, remark="x"), "Entry 5 .*hash"),
    "blanks added": (lambda lines: [*lines[:4], lines[4].replace(b',"', b', "'), *lines[5:]], "Entry 4 .*hash"),
    "first line deleted": (lambda lines: lines[1:], "Entry 0 .*it is entry 1"),
    "middle line deleted": (lambda lines: lines[:4] + lines[5:], "Entry 4 .*it is entry 5"),
    "last line deleted": (lambda lines: lines[:-1], "Entry 9 .*not there"),
    "half of the lines deleted": (lambda lines: lines[:5], "Entry 9 .*not there"),
    "reordered": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "Entry 3 .*it is entry 4"),
    "duplicated": (lambda lines: [*lines[:5], lines[4], *lines[5:]], "Entry 5 .*it is entry 4"),
    "last one duplicated": (lambda lines: [*lines, lines[-1]], "Entry 10 .*it is entry 9"),
    "blank line": (lambda lines: [*lines[:5], b"\n", *lines[5:]], "Entry 5 .*not JSON"),
    "no JSON in the middle": (lambda lines: [*lines[:5], b"{[\n", *lines[5:]], "Entry 5 .*not JSON"),
    "too deep": (lambda lines: [*lines[:5], b"[" * 100_000 + b"\n", *lines[5:]], "Entry 5 .*not JSON"),
    "a list": (lambda lines: [*lines, b"[1]\n"], "Entry 10 .*lacks"),
    "not even a number": (lambda lines: [*lines, lines[-1].replace(b'"steps":4', b'"steps":NaN')], "Entry 10 .*hash"),
    "truncated in a line": (lambda lines: [*lines[:-1], lines[-1][:40]], "Entry 9 .*not there"),
    "newline lost": (lambda lines: [*lines[:-1], lines[-1][:-1]], "Entry 9 .*not there"),
    "empty": (lambda lines: [], "missing or empty.* 10 entries"),
    "forged, not chained": (
        lambda lines: [*lines, sealed_anew([json.loads(lines[-1]) | {"number": 10}])[0]],
        "Entry 10 .*follow",
    ),
    "sigma edited, hashes made to fit": (
        rewritten(lambda entries: entries[3].update(sigma=20.0)),
        "Entry 9 .*not the one",
    ),
    "entry removed, hashes made to fit": (rewritten(lambda entries: number_anew(entries, 8)), "Entry 9 .*not there"),
    "id edited, hashes made to fit": (rewritten(lambda entries: entries[0].update(ledger="f" * 32)), "another was put"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_flagged_with_the_number_of_the_first_bad_entry_and_nothing_is_written(filled, damage):
    change, said = DAMAGES[damage]
    filled.path.write_bytes(b"".join(change(lines_of(filled))))
    before = filled.path.read_bytes(), filled.anchor.read_bytes()
    assert re.search(said, refused(filled))
    assert (filled.path.read_bytes(), filled.anchor.read_bytes()) == before


def impossible(number, **fields):
    return lambda entries: entries[number].update(fields)


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, impossible(0, delta=0.0)),
        (0, impossible(0, kind="release")),
        (1, impossible(1, kind="open")),
        (1, impossible(1, kind="forget")),
        (1, impossible(1, kind=["reserve"])),
        (1, impossible(1, sigma=-1.0)),
        (1, impossible(1, sigma=2)),
        (1, impossible(1, steps=True)),
        (1, impossible(1, rate=1.5)),
        (1, impossible(1, steps=-4)),
        (1, impossible(1, epsilon=-0.1)),
        (3, impossible(3, epsilon=0.01)),
        (1, impossible(1, time="yesterday")),
        (1, impossible(1, time="2026-01-01T00:00:00")),
        (1, impossible(1, round=-1)),
        (1, impossible(1, more=1)),
        (2, impossible(2, reservation=2)),
        (2, impossible(2, reservation=0)),
        (2, impossible(2, reservation=-9)),
        (2, impossible(2, round=7)),
        (4, impossible(4, reservation=1, run="run0", round=0)),
        (2, impossible(2, sha256="abc")),
        (1, lambda entries: entries[1].pop("rate")),
    ],
)
def test_what_cannot_be_is_refused_even_where_all_hashes_fit_and_the_anchor_is_gone(filled, number, change):
    entries = filled.entries()
    change(entries)
    filled.path.write_bytes(b"".join(sealed_anew(entries)))
    filled.anchor.unlink()
    assert f"Entry {number} of the privacy ledger is damaged" in refused(filled)


def test_an_untouched_file_written_by_the_tests_own_forger_is_accepted(filled):
    before = filled.path.read_bytes()
    assert b"".join(sealed_anew(filled.entries())) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ledger of four entries that the properties below change byte by byte."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "epsilon_of", dumb_epsilon)
        ledger = Ledger(folder / "a" / "ledger.jsonl", folder / "b" / "anchor.json", site="Süd 1", delta=1e-6)
        ledger.release(ledger.reserve("run", 1, SPEND, cap=1.0), DIGEST)
        ledger.reserve("run", 2, SPEND, cap=1.0)
    return ledger, ledger.path.read_bytes(), ledger.entries()


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_single_changed_byte_is_detected_or_leaves_the_entries_as_they_were(small, place, value):
    ledger, whole, entries = small
    data = bytearray(whole)
    data[place % len(data)] = value
    ledger.path.write_bytes(data)
    try:
        assert read_chain(ledger.path, ledger.anchor).entries == entries
    except PrivacyError:
        assert bytes(data) != whole
    try:  # without the anchor no more than the last entry can be lost
        assert read_chain(ledger.path, None).entries in (entries, entries[:-1])
    except PrivacyError:
        assert bytes(data) != whole


def test_a_ledger_cut_at_any_byte_is_refused_or_was_never_longer_for_its_anchor(small, tmp_path):
    ledger, whole, entries = small
    anchors = []
    for last in entries:
        anchors.append(tmp_path / f"{last['number']}.json")
        known = {"ledger": entries[0]["ledger"], "number": last["number"], "hash": last["hash"]}
        anchors[-1].write_text(json.dumps(known))
    for length in range(len(whole) + 1):
        ledger.path.write_bytes(whole[:length])
        there = whole[:length].count(b"\n")
        for known, anchor in enumerate(anchors):
            if known < there:
                chain = read_chain(ledger.path, anchor)
                assert (chain.entries, chain.anchored) == (entries[:there], known)
                assert chain.torn == (not whole[:length].endswith(b"\n"))
            else:
                with pytest.raises(PrivacyError):
                    read_chain(ledger.path, anchor)


def test_an_entry_that_a_killed_process_did_not_finish_is_cut_off_and_the_next_one_takes_its_place(filled, heard):
    whole, entries = filled.path.read_bytes(), filled.entries()
    for rest in (b'{"epsilon":0.2', b'{"epsilon"\0\0\0\n', b"\xff"):
        filled.path.write_bytes(whole + rest)
        assert again(filled).entries() == entries
        assert filled.path.read_bytes() == whole + rest
        with pytest.raises(PrivacyError):
            again(filled).reserve("run", 9, SPEND, cap=0.1)
        assert filled.path.read_bytes() == whole
    filled.path.write_bytes(whole + b"{")
    assert again(filled).reserve("run", 9, SPEND, cap=9.0).number == 10
    assert again(filled).entries()[:10] == entries
    assert "had not finished was removed" in heard[0].text
    assert not any(event.alarm for event in heard)


def test_a_first_entry_that_was_not_finished_is_no_ledger_yet(ledger):
    ledger.path.parent.mkdir(parents=True)
    ledger.path.write_bytes(b'{"delta":1e-0')
    assert ledger.epsilon() == 0.0
    assert ledger.reserve("run", 0, SPEND, cap=1.0).number == 1


def test_a_process_that_dies_between_ledger_and_anchor_has_spent_and_the_anchor_catches_up(filled, monkeypatch, heard):
    old = filled.anchor.read_bytes()
    filled.reserve("run", 5, SPEND, cap=9.0)
    filled.anchor.write_bytes(old)
    assert again(filled).epsilon() == pytest.approx(math.sqrt(6) * 0.1)
    assert filled.anchor.read_bytes() == old
    again(filled).release(("run", 5), DIGEST)
    assert json.loads(filled.anchor.read_text())["hash"] == filled.head.split(":")[1]
    assert heard == []


def test_an_older_copy_of_the_ledger_is_refused_by_its_anchor(filled, tmp_path):
    shutil.copy(filled.path, tmp_path / "backup")
    filled.reserve("run", 5, SPEND, cap=9.0)
    shutil.copy(tmp_path / "backup", filled.path)
    said = refused(filled)
    assert "older copy" in said
    assert "Restore the newest copy" in said


def test_an_older_copy_that_went_on_without_its_anchor_is_refused_by_the_newer_anchor(filled, tmp_path):
    shutil.copy(filled.path, tmp_path / "backup")
    filled.release(("run0", 4), DIGEST)
    newer = filled.anchor.read_bytes()
    shutil.copy(tmp_path / "backup", filled.path)
    filled.anchor.unlink()
    for _ in range(2):
        filled.reserve("run", 5, SPEND, cap=9.0)
    filled.anchor.write_bytes(newer)
    assert "went on from an older copy" in refused(filled)


def test_an_older_copy_of_ledger_and_anchor_is_refused_by_whoever_remembers_the_head(filled, tmp_path):
    shutil.copy(filled.path, tmp_path / "ledger")
    shutil.copy(filled.anchor, tmp_path / "anchor")
    old = filled.head
    filled.reserve("run", 5, SPEND, cap=9.0)
    new = filled.head
    for head in ("", old, new):
        filled.check_known(head)
    shutil.copy(tmp_path / "ledger", filled.path)
    shutil.copy(tmp_path / "anchor", filled.anchor)
    filled.check_known(old)
    with pytest.raises(PrivacyError, match="older copy was restored"):
        filled.check_known(new)
    filled.reserve("run", 6, SPEND, cap=9.0)
    assert filled.head.split(":")[0] == new.split(":")[0]
    with pytest.raises(PrivacyError, match="older copy was restored"):
        filled.check_known(new)
    for head in ("x", "-1:" + "0" * 64, "1:" + "0" * 63, f"\u0661:{'0' * 64}", f"{'9' * 5000}:{'0' * 64}"):
        with pytest.raises(PrivacyError, match="cannot be read"):
            filled.check_known(head)


def test_whoever_remembers_a_head_is_not_answered_by_a_site_that_lost_everything(ledger):
    with pytest.raises(PrivacyError, match="0 entries"):
        ledger.check_known("3:" + "a" * 64)


@pytest.mark.parametrize("anchor", [None, b"", b"{}", b"[]", b"{", b'{"ledger":"x","number":1e999,"hash":"y"}'])
def test_a_lost_anchor_is_an_alarm_and_written_anew(filled, heard, anchor):
    before = filled.anchor.read_bytes()
    filled.anchor.unlink()
    if anchor is not None:
        filled.anchor.write_bytes(anchor)
    assert again(filled).epsilon() == pytest.approx(math.sqrt(5) * 0.1)
    assert heard == []
    again(filled).reserve("run", 5, SPEND, cap=9.0)
    (note,) = heard
    assert note.alarm
    assert "anchor of the privacy ledger is lost" in note.text
    assert json.loads(filled.anchor.read_text())["number"] == json.loads(before)["number"] + 1


def test_an_anchor_that_is_many_entries_behind_is_an_alarm(filled, heard):
    old = filled.anchor.read_bytes()
    for number in range(3):
        filled.reserve("run", number, SPEND, cap=9.0)
    filled.anchor.write_bytes(old)
    filled.reserve("run", 3, SPEND, cap=9.0)
    (note,) = heard
    assert note.alarm
    assert "was 3 entries behind" in note.text


def test_a_missing_ledger_is_refused_while_its_anchor_is_there(filled):
    filled.path.unlink()
    assert "missing or empty" in refused(filled)
    assert not filled.path.exists() or filled.path.read_bytes() == b""


def test_a_clock_that_goes_backwards_changes_nothing(filled, monkeypatch):
    start = datetime.fromisoformat("2030-05-05T12:00:00+00:00")
    clock = (start - timedelta(days=days) for days in itertools.count())
    monkeypatch.setattr(ledger_module, "_now", lambda: next(clock).isoformat())
    for number in range(5, 9):
        filled.release(filled.reserve("run", number, SPEND, cap=9.0), DIGEST)
    assert filled.epsilon() == pytest.approx(math.sqrt(9) * 0.1)
    assert filled.reserved("run", 8).number == 16


def test_epsilon_never_falls_even_where_the_accountant_does(ledger, monkeypatch):
    values = iter([0.5, 0.4, 0.6])
    monkeypatch.setattr(ledger_module, "epsilon_of", lambda spends, delta: next(values))
    found = [ledger.reserve("run", number, SPEND, cap=1.0).epsilon for number in range(3)]
    assert found == [0.5, 0.5, 0.6]
    assert ledger.epsilon() == 0.6


def test_epsilon_is_that_of_the_real_accountant_over_all_that_was_reserved(tmp_path):
    ledger = Ledger(tmp_path / "a" / "ledger.jsonl", tmp_path / "b" / "anchor.json", site="NORTH", delta=1e-6)
    spends = [Spend(1.0, 0.01, 20), Spend(1.2, 0.02, 10), Spend(1.0, 0.01, 20), Spend(3.0, 0.01, 5)]
    seen = []
    for number, spend in enumerate(spends):
        reservation = ledger.reserve(f"run{number // 2}", number, spend, cap=8.0)
        assert reservation.epsilon == epsilon_of(spends[: number + 1], 1e-6)
        seen.append(reservation.epsilon)
    assert seen == sorted(set(seen))
    assert ledger.epsilon() == epsilon_of(ledger.spends(), 1e-6)
    assert ledger.epsilon("run1") == epsilon_of(spends[2:], 1e-6) < ledger.epsilon()
    with pytest.raises(PrivacyError, match="Refused before"):
        ledger.reserve("run2", 0, Spend(1.0, 0.01, 2000), cap=ledger.epsilon() + 0.1)


def test_a_full_disk_leaves_the_ledger_as_it_was(filled):
    whole = filled.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, limits[1]))
    try:
        with pytest.raises(StorageError, match="disk is full: the privacy ledger could not be written whole"):
            filled.reserve("run", 5, SPEND, cap=9.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert filled.path.read_bytes() == whole
    assert filled.reserve("run", 5, SPEND, cap=9.0).number == 10


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_reservation_is_not_given_where_the_disk_fails_and_may_only_cost_too_much(filled, monkeypatch, broken):
    def fails(*arguments, **settings):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{broken}", fails)
        with pytest.raises(StorageError, match="could not be written"):
            filled.reserve("run", 5, SPEND, cap=9.0)
    assert len(again(filled).spends()) in {5, 6}
    assert again(filled).reserve("run", 5, SPEND, cap=9.0).number in {10, 11}


def test_the_entry_is_on_the_disk_before_the_anchor_knows_it(ledger, monkeypatch):
    seen, fsync = [], os.fsync

    def watched(descriptor):
        fsync(descriptor)
        seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(str(ledger.path.parents[1])))

    ledger.reserve("run", 0, SPEND, cap=1.0)
    monkeypatch.setattr("os.fsync", watched)
    ledger.reserve("run", 1, SPEND, cap=1.0)
    assert seen == ["/state/ledger.jsonl", f"/cache/.anchor.json.{os.getpid()}.tmp", "/cache"]


RESERVES = """
import sys
from pathlib import Path
from fedssl.errors import PrivacyError
from fedssl.privacy.accounting import Spend
from fedssl.site import ledger
ledger.epsilon_of = lambda spends, delta: 0.25 * sum(1 for _ in spends)
own = ledger.Ledger(Path(sys.argv[1]), Path(sys.argv[2]), site="NORTH", delta=1e-6)
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    try:
        print(own.reserve(sys.argv[3], number, Spend(1.0, .1, 1), cap=12.0).number)
    except PrivacyError as error:
        assert "Refused before" in str(error), error
"""


def test_processes_that_reserve_at_once_never_pass_the_cap_and_never_lose_an_entry(ledger):
    command = [sys.executable, "-c", RESERVES, ledger.path, ledger.anchor]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b", "c")]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    given = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(int(number) for numbers in given for number in numbers) == list(range(1, 49))
    assert ledger.epsilon() == 12.0


def test_the_ledger_imports_neither_torch_nor_opacus():
    program = "import sys, fedssl.site.ledger, fedssl.cli_privacy\n"
    program += "print([name for name in ('torch', 'opacus', 'numpy', 'flwr') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_site_has_a_folder_of_its_own_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    sites = ["NORTH", "north", "Süd 1", "Süd_1", "a/b", "../x", "..", ".", "", " ", "x" * 64, "x" * 63 + "y", "\u4e2d"]
    names = [folder_name(site) for site in sites]
    assert len({name.lower() for name in names}) == len(sites)
    for site, name in zip(sites, names, strict=True):
        path, anchor = default_ledger(site)
        assert path == tmp_path / "state" / "ledgers" / name / "ledger.jsonl"
        assert anchor == tmp_path / "cache" / "ledger-anchors" / name / "anchor.json"
        assert all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in name)
    assert folder_name("Su\u0308d") == folder_name("S\u00fcd")


def test_the_state_folder_is_where_the_system_keeps_state(tmp_path, monkeypatch):
    for name, value in (("FEDSSL_STATE", ""), ("XDG_STATE_HOME", str(tmp_path)), ("HOME", "/home/someone")):
        monkeypatch.setenv(name, value)
    assert default_ledger("A")[0].is_relative_to(tmp_path / "fedssl" / "ledgers")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert str(default_ledger("A")[0]).startswith("/home/someone/.local/state/fedssl/ledgers/A-")


def show(*arguments):
    return CliRunner().invoke(COMMAND, ["privacy", "ledger", *map(str, arguments)])


@pytest.fixture
def machine(tmp_path, monkeypatch, dumb):
    """A machine with the ledgers of two sites."""
    monkeypatch.setenv("FEDSSL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    found = {}
    for site in ("NORTH", "Süd 1"):
        found[site] = Ledger(*default_ledger(site), site=site, delta=1e-6)
        for number in (1, 2, 2):
            found[site].release(found[site].reserve("abc", number, SPEND, cap=1.0), DIGEST)
    found["NORTH"].reserve("def", 1, Spend(4.0, 0.2, 1), cap=1.0)
    return found


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_the_command_shows_what_each_run_has_spent_and_writes_nothing(machine, tmp_path):
    with machine["NORTH"].path.open("ab") as stream:
        stream.write(b'{"torn')
    before = tree(tmp_path)
    result = show("NORTH", "--format", "json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["ledgers"]
    assert (found["site"], found["delta"], found["entries"]) == ("NORTH", 1e-6, 8)
    assert found["epsilon"] == found["epsilon_replayed"] == pytest.approx(math.sqrt(3 * 0.01 + 0.0025))
    assert found["head"] == machine["NORTH"].head
    assert found["runs"] == [
        {
            "run": "abc", "rounds": 2, "reserved": 3, "released": 3, "steps": 12, "sigma": [2.0], "rate": [0.1],
            "epsilon": pytest.approx(math.sqrt(3) * 0.1),
        },
        {
            "run": "def", "rounds": 1, "reserved": 1, "released": 0, "steps": 1, "sigma": [4.0], "rate": [0.2],
            "epsilon": pytest.approx(0.05),
        },
    ]  # fmt: skip
    assert [note.split(".")[0] for note in found["notes"]] == [
        "Reservations without a release: 1",
        "The last entry is unfinished: its process was killed",
    ]
    text = show().output
    for word in ("NORTH", "Süd 1", "abc", "def", "head 7:", "0.1732", "Note: Reservations without a release: 1."):
        assert word in text
    assert tree(tmp_path) == before


def test_the_command_says_what_is_odd_but_allowed(machine, monkeypatch):
    north = machine["NORTH"]
    monkeypatch.setattr(ledger_module, "_now", lambda: "2001-01-01T00:00:00+00:00")
    old = north.anchor.read_bytes()
    north.reserve("abc", 3, SPEND, cap=1.0)
    north.anchor.write_bytes(old)
    monkeypatch.setattr(ledger_summary, "epsilon_of", lambda spends, delta: 2.0)
    said = " ".join(show("NORTH").output.split())
    assert "The clock went backwards before entries 8. It decides nothing." in said
    assert "The anchor knows entries up to 7 only" in said
    assert "The accountant of this version makes it epsilon 2.0000" in said
    north.anchor.unlink()
    assert "No anchor" in show("NORTH").output


def test_the_command_ends_with_code_6_and_still_shows_the_ledgers_that_hold(machine):
    machine["NORTH"].path.write_bytes(machine["NORTH"].path.read_bytes().replace(b'"sigma":2.0', b'"sigma":9.0'))
    result = show()
    assert result.exit_code == 6
    said = " ".join(result.output.split())
    assert "Süd 1: epsilon 0.1732" in said
    assert "Entry 1 of the privacy ledger is damaged: its hash does not fit its content." in said
    assert json.loads(show("--format", "json").stdout)["refused"][0].startswith("NORTH-")
    assert show("Süd 1").exit_code == 0
    machine["Süd 1"].path.unlink()
    assert "missing or empty" in show("Süd 1").output
    assert show().output.count("missing or empty") == 1


def test_the_command_reads_a_ledger_that_came_from_elsewhere(machine, tmp_path):
    folder = tmp_path / "runs" / "mine" / "ledgers" / "A"
    folder.mkdir(parents=True)
    shutil.copy(machine["NORTH"].path, folder)
    for where in (tmp_path / "runs" / "mine", folder.parent, folder, folder / "ledger.jsonl"):
        result = show(where)
        assert result.exit_code == 0
        assert "No anchor" in result.output
    shutil.copy(machine["Süd 1"].anchor, folder)
    assert show(folder).exit_code == 6
    shutil.copy(machine["NORTH"].anchor, folder)
    assert "No anchor" not in show(folder).output
    assert "No anchor" not in show(machine["NORTH"].path).output


def test_the_command_finds_a_ledger_that_a_site_keeps_elsewhere_by_its_anchor(machine, tmp_path):
    place = tmp_path / "elsewhere" / "ledger.jsonl"
    Ledger(place, default_ledger("EAST")[1], site="EAST", delta=1e-6).reserve("run", 0, SPEND, cap=1.0)
    for arguments in [("EAST",), (place,), ()]:
        result = show(*arguments)
        assert result.exit_code == 0
        assert "EAST: epsilon 0.1000" in result.output
        assert "No anchor" not in result.output
    place.unlink()
    assert show().exit_code == show("EAST").exit_code == 6


def test_the_command_says_when_there_is_nothing(tmp_path, monkeypatch, dumb):
    monkeypatch.setenv("FEDSSL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    assert "no private round was reserved" in show().output
    assert json.loads(show("--format", "json").stdout) == {"ledgers": [], "refused": []}
    assert show("NOWHERE").exit_code == show(tmp_path).exit_code == 2
    with pytest.raises(PrivacyError):
        Ledger(*default_ledger("NORTH"), site="NORTH", delta=1e-6).reserve("run", 0, SPEND, cap=0.0)
    assert show().exit_code == 0
    assert list(tmp_path.rglob("*.jsonl"))
