"""What the operator and the hospital see of a running consortium; run folders are made up by hand."""

import html.parser
import json
import os
import re
import time
from datetime import UTC, datetime, timedelta

import pytest
from typer import Typer
from typer.testing import CliRunner

from fedssl.cli_status import status as verb
from fedssl.deployment.settings import ServerKit, SiteKit
from fedssl.deployment.status.page import status_page, write_status_page
from fedssl.deployment.status.standing import as_json, read_status, site_status

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EVIL = "<script>alert(1)</script>\"' onload=x\x1b[31m\u202e"


def ago(**length):
    return (NOW - timedelta(**length)).isoformat(timespec="seconds")


def put(path, content, age_s=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    at = NOW.timestamp() - age_s
    os.utime(path, (at, at))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def round_row(number, loss, time, sites=("EAST", "NORTH"), failed=None, absent=None, signs=None, agreement=0.95):
    return {
        "round": number, "train/loss": loss, "time": time, "ssl/prototype_agreement": agreement,
        "ssl/collapse": signs or {}, "federation/sites": list(sites), "federation/failed": failed or {},
        "federation/absent": absent or {}, "privacy/epsilon": {}, "comm/bytes_up": 10, "comm/bytes_down": 10,
    }  # fmt: skip


def site_row(number, site, loss, **more):
    return {"round": number, "site": site, "loss": loss, "images": 640.0, **more}


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "kit"
    put(folder / "server.yaml", "name: lungs\nport: 9443\nplan: [federation.rounds=10]\n")
    (folder / "sites").mkdir()
    return ServerKit.read(folder)


@pytest.fixture
def running(kit):
    """Three rounds, finished 50, 30 and 10 minutes ago, of ten; begun 80 minutes ago."""
    put(kit.run / "environment.json", {}, age_s=80 * 60)
    put(kit.run / "config.resolved.yaml", "federation:\n  rounds: 10\n")
    put(
        kit.run / "round_metrics.jsonl",
        lines(
            round_row(1, 6.0, ago(minutes=50)), round_row(2, 5.0, ago(minutes=30)), round_row(3, 4.5, ago(minutes=10))
        ),
    )
    put(
        kit.run / "metrics.jsonl",
        lines(
            *(site_row(n, "EAST", 6.5 - n / 2, images_per_s=120.4) for n in (1, 2, 3)),
            *(site_row(n, "NORTH", 5.5 - n / 2, epsilon=n / 4, delta=1e-6) for n in (1, 2, 3)),
        ),
    )
    part = {"state": "up", "restarts": 0, "since": ago(minutes=81)}
    put(
        kit.state / "server.json",
        {"state": "running", "since": ago(seconds=3), "reason": "", "parts": {"superlink": part, "gate": part}},
        age_s=3,
    )
    seen = {"state": "admitted", "bytes_up": 45_000_000, "bytes_down": 1200}
    put(kit.state / "seen.json", {"EAST": {**seen, "time": ago(seconds=4)}, "NORTH": {**seen, "time": ago(seconds=9)}})
    return kit


def now_of(status):
    return [alarm.text for alarm in status.alarms if alarm.current]


def test_a_healthy_run_shows_rounds_times_and_sites_as_computed_by_hand(running):
    found = read_status(running, NOW)
    assert (found.name, found.state, found.round, found.rounds) == ("lungs", "running", 3, 10)
    assert found.sentence == "Running: 3 rounds of 10 finished, round 4 is under way."
    assert [(one.number, one.loss, one.seconds) for one in found.history] == [
        (1, 6, 1800),
        (2, 5, 1200),
        (3, 4.5, 1200),
    ]
    assert found.usual_s == 1200  # the median of 1800, 1200, 1200
    assert found.expected_end == NOW + timedelta(minutes=10 + 6 * 20)  # round 4 in 10 minutes, then six more
    east, north = found.sites
    assert (east.name, east.standing, east.words, east.last_round) == ("EAST", "in", "in round 3", 3)
    assert (east.last_seen_s, east.loss, east.images, east.images_per_s, east.epsilon) == (4, 5.0, 640, 120.4, None)
    assert (east.bytes_up, east.bytes_down) == (45_000_000, 1200)
    assert north.epsilons == ((1, 0.25), (2, 0.5), (3, 0.75))
    assert (north.epsilon, north.losses) == (0.75, ((1, 5.0), (2, 4.5), (3, 4.0)))
    assert [(part.name, part.state) for part in found.parts] == [("superlink", "up"), ("gate", "up")]
    assert found.agreement == 0.95
    assert now_of(found) == []
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["expected_end"] == "2026-03-01T14:10:00+00:00"


def test_no_round_for_longer_than_twice_the_usual_time_is_an_alarm_that_says_both(running):
    later = NOW + timedelta(hours=2, minutes=50)
    put(running.state / "server.json", {"state": "running"}, age_s=-170 * 60)
    put(running.state / "seen.json", {})
    assert now_of(read_status(running, later)) == ["No round finished for 3 h; usual 20 min."]
    assert now_of(read_status(running, NOW + timedelta(minutes=30))) == []  # twice the usual time, not longer


def test_a_round_that_is_over_time_is_not_expected_in_the_past(running):
    put(running.state / "server.json", {"state": "running"}, age_s=-20 * 60)
    late = NOW + timedelta(minutes=20)
    assert read_status(running, late).expected_end == late + timedelta(minutes=6 * 20)


def test_rounds_without_a_time_are_dated_by_the_files_of_the_run(running):
    rows = [round_row(n, 5.0, None) for n in (1, 2, 3)]
    put(running.run / "round_metrics.jsonl", lines(*rows))
    put(running.run / "checkpoints" / "last.safetensors", "x", age_s=20 * 60)
    found = read_status(running, NOW)
    assert [one.time for one in found.history] == [None, None, NOW - timedelta(minutes=20)]
    assert found.usual_s == 1200  # 60 minutes for three rounds


def test_a_missing_an_absent_a_silent_and_a_revoked_site_are_named_with_the_reason(running):
    row = round_row(3, 4.5, ago(minutes=10), ["EAST"], {"NORTH": "is out of memory"}, {"WEST": "is not connected"})
    put(running.run / "round_metrics.jsonl", lines(row))
    seen = {
        "EAST": {"time": ago(hours=2), "state": "admitted"}, "SOUTH": {"time": ago(seconds=1), "state": "revoked"},
        "NEW": {"time": ago(seconds=1), "state": "admitted"},
    }  # fmt: skip
    put(running.state / "seen.json", seen)
    found = read_status(running, NOW)
    assert {site.name: (site.standing, site.words) for site in found.sites} == {
        "EAST": ("missing", "silent for 2 h; was in round 3"),
        "NEW": ("waiting", "in no round yet"),
        "NORTH": ("missing", "missing from round 3: is out of memory"),
        "SOUTH": ("missing", "not admitted at the gate: revoked"),
        "WEST": ("missing", "does not take part: it is not connected"),
    }
    assert "Site NORTH: missing from round 3: is out of memory." in now_of(found)
    assert len(now_of(found)) == 4


def test_nobody_is_called_silent_while_the_server_itself_says_nothing(running):
    put(running.state / "seen.json", {"EAST": {"time": ago(hours=2), "state": "admitted"}})
    put(running.state / "server.json", {"state": "running"}, age_s=7200)
    found = read_status(running, NOW)
    assert found.sites[0].words == "in round 3"
    assert now_of(found) == ["The server has said nothing for 2 h: it was stopped, or hangs."]
    assert status_page(found).count("The server has said nothing") == 1


def test_collapse_and_drift_are_alarms_of_now_and_repeated_ones_of_the_log_are_counted(running):
    row = round_row(3, 4.5, ago(minutes=10), signs={"EAST": ["2 of 64 prototypes are used"]}, agreement=0.41)
    put(running.run / "round_metrics.jsonl", lines(row))
    events = [
        {"time": ago(minutes=50), "text": "2 sites take part: EAST, NORTH", "alarm": False},
        {"time": ago(minutes=40), "text": "Node 7 failed", "alarm": True},
        {"time": ago(minutes=30), "text": "Node 8 failed", "alarm": True},
        {"time": ago(minutes=20), "text": "Node 8 failed", "alarm": True},
        {"time": ago(minutes=10), "text": "Site WEST takes part from now on", "alarm": False},
    ]
    put(running.run / "events.jsonl", lines(*events))
    found = read_status(running, NOW)
    assert now_of(found)[0] == "Site EAST has collapsed in round 3: 2 of 64 prototypes are used."
    assert now_of(found)[1].startswith("The sites' prototypes drift apart: in round 3 they agree to 0.41")
    logged = [(one.text, one.count, one.time.minute) for one in found.alarms if not one.current]
    assert logged == [("Node 8 failed", 2, 40), ("Node 7 failed", 1, 20)]  # newest first; 11:40 and 11:20
    assert found.note == "Site WEST takes part from now on (2026-03-01 11:50 UTC)"


@pytest.mark.parametrize(
    ("server", "age", "outcome", "state", "says"),
    [
        (None, 0, None, "unknown", "3 rounds finished; whether a server runs is not known."),
        ("running", 3600, None, "silent", "The server has said nothing for 60 min: it was stopped, or hangs."),
        ("running", 1, {"state": "failed", "reason": "1 site only."}, "retrying", "is taken up again: 1 site only."),
        ("retrying", 1, None, "retrying", "is taken up again: why"),
        ("gave up", 9999, None, "gave up", "The server gave up after 3 rounds: why"),
        ("running", 9999, {"state": "done"}, "done", "Done after 3 rounds."),
        (None, 0, {"state": "failed", "reason": "disk"}, "failed", "The run ended after 3 rounds: disk"),
    ],
)
def test_the_state_follows_from_what_supervisor_and_run_said_last(running, server, age, outcome, state, says):
    if server is None:
        (running.state / "server.json").unlink()
    else:
        put(running.state / "server.json", {"state": server, "reason": "why"}, age_s=age)
    if outcome:
        put(running.run / "outcome.json", outcome)
    found = read_status(running, NOW)
    assert found.state == state
    assert says in found.sentence
    assert found.ended == (state in {"done", "gave up"})
    assert (found.expected_end is None) == (state not in {"unknown", "retrying"})
    alarmed = state not in {"unknown", "done"}
    assert (found.sentence in now_of(found)) == alarmed


def test_a_part_that_is_down_and_a_certificate_that_ends_soon_are_alarms(running):
    put(running.state / "server.json", {"state": "running", "parts": {"gate": {"state": "down", "restarts": 4}}})
    put(running.folder / "sites" / "EAST.crt", certificate(NOW + timedelta(days=12)))
    put(running.folder / "sites" / "NORTH.crt", certificate(NOW + timedelta(days=200)))
    put(running.folder / "server.crt", certificate(NOW - timedelta(days=1)))
    put(running.folder / "sites" / "WEST.crt", "no certificate")
    assert now_of(read_status(running, NOW)) == [
        "The gate is down.",
        "The certificate of the server expired on 2026-02-28. Renew it.",
        "The certificate of site EAST expires in 12 days, on 2026-03-13. Renew it in time.",
    ]


def certificate(end):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from fedssl.deployment.identity.certificates import new_key, pem

    key, name = new_key(), x509.Name([])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, end - timedelta(days=365), end)
    return pem(made.sign(key, hashes.SHA256())).decode()


def test_an_empty_kit_says_that_nothing_is_known(kit):
    found = read_status(kit, NOW)
    assert (found.state, found.round, found.rounds, found.sites, found.alarms) == ("not started", 0, 10, (), ())
    page = status_page(found)
    assert "neither a server nor a run has left a trace" in page
    assert "No site is known" in page


def test_files_that_are_cut_off_anywhere_never_stop_the_reader(running):
    put(running.run / "events.jsonl", lines({"time": ago(minutes=1), "text": "x", "alarm": True}))
    put(running.run / "outcome.json", {"state": "failed", "reason": "y", "time": ago(minutes=1)})
    paths = [path for folder in (running.run, running.state) for path in folder.iterdir()]
    for path in paths:
        whole = path.read_bytes()
        for length in {*range(0, len(whole), 23), len(whole) - 2}:
            path.write_bytes(whole[:length])
            status_page(read_status(running, NOW))
        path.write_bytes(whole)
    with (running.run / "round_metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "train/lo')
    assert read_status(running, NOW).round == 3


@pytest.mark.parametrize(
    "value", [None, [], {}, "x", 7, -3.5, True, 1e308, 10**400, float("nan"), "9999-12-31T23:59:59-23:59", [["x"]]]
)
def test_files_with_values_of_another_kind_never_stop_the_reader(running, value):
    paths = {
        running.run / "round_metrics.jsonl": round_row(3, 4.5, ago(minutes=10)),
        running.run / "metrics.jsonl": site_row(3, "EAST", 5.0, images_per_s=1.0, epsilon=0.5),
        running.run / "events.jsonl": {"time": ago(minutes=1), "text": "x", "alarm": True},
        running.run / "outcome.json": {"state": "failed", "reason": "y"},
        running.state / "seen.json": {"EAST": {"time": ago(seconds=1), "state": "admitted", "bytes_up": 1}},
        running.state / "server.json": {"state": "running", "reason": "", "parts": {"gate": {"state": "up"}}},
    }
    for path, content in paths.items():
        for key in content:
            put(path, {**content, key: value})
            found = read_status(running, NOW)
            json.dumps(as_json(found), allow_nan=False)
            status_page(found)
        put(path, [content])
        status_page(read_status(running, NOW))
        put(path, content)
    for content in (value, {"federation": value}, {"federation": {"rounds": value}}):
        put(running.run / "config.resolved.yaml", content)
        status_page(read_status(running, NOW))


@pytest.mark.parametrize("loss", [0.0, 7.25, -3.0, 9e14, 1e-14])
def test_a_curve_of_one_or_of_equal_values_is_drawn(running, loss):
    for count in (1, 2):
        put(running.run / "round_metrics.jsonl", lines(*(round_row(n, loss, None) for n in range(1, count + 1))))
        put(running.run / "metrics.jsonl", "")
        page = status_page(read_status(running, NOW))
        places = [float(number) for number in re.findall(r'points="([^"]+)"', page)[0].replace(",", " ").split()]
        assert all(0 <= place <= 420 for place in places)


class Elements(html.parser.HTMLParser):
    """Collects tags and attributes as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_hostile_names_and_reasons_are_text_on_the_page_and_no_control_letters(running):
    before = Elements(status_page(read_status(running, NOW)))
    row = round_row(3, 4.5, ago(minutes=10), ["EAST"], {EVIL: EVIL}, {EVIL + "2": EVIL}, {EVIL: [EVIL]})
    put(running.run / "round_metrics.jsonl", lines(row))
    put(running.run / "metrics.jsonl", lines(site_row(3, EVIL, 3.0), site_row(3, "EAST", 2.0, epsilon=1.0)))
    put(running.run / "events.jsonl", lines({"time": EVIL, "text": EVIL, "alarm": True}))
    part = {"state": EVIL, "since": EVIL}
    put(running.state / "server.json", {"state": EVIL, "reason": EVIL, "parts": {EVIL: part}})
    put(running.state / "seen.json", {EVIL: {"state": EVIL, "time": EVIL}})
    page = status_page(read_status(running, NOW))
    after = Elements(page)
    assert set(after.tags) - set(before.tags) <= {"ul", "li"}
    assert "script" not in after.tags
    assert after.attributes <= before.attributes
    assert "<script>alert(1)</script>" in after.text
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_needs_nothing_from_elsewhere_and_says_states_in_words(running, tmp_path):
    path = tmp_path / "out" / "status.html"
    write_status_page(path, read_status(running, NOW))
    page = path.read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert '<meta http-equiv="refresh" content="10">' in page
    seen = Elements(page)
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert "taking part" in seen.text
    assert page.count("<polyline") == 1 + 2 + 1  # mean loss, two sites' losses, one epsilon
    assert [one.name for one in path.parent.iterdir()] == ["status.html"]


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "NORTH"
    put(folder / "site.yaml", "site: NORTH\nserver: host:9443\ndata: images\nplan: []\n")
    return SiteKit.read(folder)


def entry(number, kind, hours, size, **more):
    own = {"number": number, "time": ago(hours=hours), "kind": kind, "run": "abc", "round": number}
    return own | {"content_bytes": size - 10, "frame_bytes": size, "metrics": {}, "epsilon": None, "reason": ""} | more


def test_a_hospital_sees_what_it_trained_refused_and_sent(site):
    manifest = lines(
        entry(0, "presence", 30, 100),
        entry(1, "train", 26, 1000, epsilon=0.5),
        entry(2, "train", 2, 2000, epsilon=0.75),
        entry(3, "refusal", 1, 50, reason="the policy admits two rounds a day"),
    )
    put(site.state / "egress" / "manifest.jsonl", manifest + '{"number": 4, "ki')
    agent = {"state": "waiting for the server's messages", "since": ago(minutes=5), "policy": "sha:1"}
    put(site.state / "agent.json", agent)
    found = site_status(site, NOW)
    assert (found.last_run, found.last_round, found.last_trained) == ("abc", 2, NOW - timedelta(hours=2))
    assert (found.messages, found.bytes_day, found.bytes_all, found.epsilon) == (4, 2050, 3150, 0.75)
    assert (found.last_refusal.round, found.last_refusal.reason) == (3, "the policy admits two rounds a day")
    assert (found.state, found.policy, found.alarms) == ("running", "sha:1", ())
    assert found.sentence == "The agent is waiting for the server's messages for 5 min."
    json.dumps(as_json(found), allow_nan=False)


def test_a_hospital_without_a_trace_unreachable_or_stopped_says_so(site):
    assert site_status(site, NOW).sentence.startswith("Not started")
    put(site.state / "site.json", {"state": "cannot reach the server", "reason": "port closed", "parts": {}})
    found = site_status(site, NOW)
    assert found.sentence == "The server cannot be reached: port closed"
    assert now_of(found) == [found.sentence]
    put(site.state / "site.json", {"state": "running", "parts": {"node": {"state": "down"}}})
    assert now_of(site_status(site, NOW)) == ["The node is down."]
    assert site_status(site, NOW + timedelta(hours=3)).state == "silent"


app = Typer()
app.command()(verb)


@app.command()
def other():
    """Make the first one a named verb."""


def called(*arguments):
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def test_the_verb_prints_tables_json_and_the_page(running, site, tmp_path):
    put(running.state / "server.json", {"state": "running"}, age_s=NOW.timestamp() - time.time())
    done = called(running.folder, "--html", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    assert "Running: 3 rounds of 10 finished" in done.output
    assert re.search(r"EAST +MISSING: silent for \d+ days", done.output)
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert json.loads(called(running.folder, "--format", "json").output)["round"] == 3
    assert "Left this hospital: 0 B" in called(site.folder).output


def test_the_verb_shows_a_hospital_what_left_it(site):
    put(site.state / "egress" / "manifest.jsonl", lines(entry(1, "train", 2, 2000, epsilon=0.75)))
    put(site.state / "agent.json", {"state": "answering", "since": ago(minutes=5), "policy": "sha:1"})
    done = called(site.folder)
    assert "Last round trained: 1 of run abc, 2026-03-01 10:00 UTC." in done.output
    assert "2.0 kB in all, in 1 messages" in done.output
    assert "as told to the server: 0.75" in done.output


def test_the_verb_writes_on_until_it_is_interrupted_and_that_is_no_failure(running, tmp_path, monkeypatch):
    slept = []

    def interrupted(seconds):
        slept.append(seconds)
        (tmp_path / "a.html").unlink()
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("fedssl.cli_status.time.sleep", interrupted)
    assert called(running.folder, "--every", "5", "--html", tmp_path / "a.html").exit_code == 0
    assert slept == [5, 5, 5]


def test_the_verb_stops_by_itself_when_the_run_is_done(running):
    put(running.run / "outcome.json", {"state": "done"})
    assert "Done after 3 rounds." in called(running.folder, "--every", "600").output


def test_a_folder_that_is_no_kit_and_a_page_of_a_site_are_refused_in_a_sentence(tmp_path, site):
    refused = called(tmp_path)
    assert refused.exit_code == 2
    assert "holds neither server.yaml nor site.yaml" in " ".join(refused.output.split())
    assert called(site.folder, "--html", tmp_path / "b.html").exit_code == 2
