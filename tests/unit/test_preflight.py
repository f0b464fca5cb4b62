"""What a hospital sees before it joins, with a real gate, real kits and images whose names must not be told."""

import contextlib
import getpass
import json
import os
import shlex
import shutil
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pydicom
import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fedssl
from fedssl.cli import app
from fedssl.cli_preflight import preflight as verb
from fedssl.deployment.gate.app import GateSettings
from fedssl.deployment.gate.doorkeeper import roll_of
from fedssl.deployment.gate.hello import Hello, Tls
from fedssl.deployment.gate.serving import gate_in_thread
from fedssl.deployment.identity.provision import provision
from fedssl.deployment.preflight import all_checks as room
from fedssl.deployment.preflight import checks as preflight_checks
from fedssl.deployment.preflight import images as preflight_images
from fedssl.deployment.preflight.all_checks import preflight, report_json, write_page
from fedssl.deployment.preflight.look import Look
from fedssl.deployment.preflight.report import Finding, Report, _shareable
from fedssl.deployment.settings import Consortium, ServerKit, SiteKit
from fedssl.errors import DataError

PLAN = (
    "encoder=tiny", "optim=adamw_fast", "data.edge=40", "augment.crops.global.edge=32", "augment.crops.local.edge=16",
    "augment.crops.local.count=1", "heads.num_prototypes=8", "heads.hidden=32", "heads.width=16",
    "training.batch_size=16", "training.threads=1", "federation.min_sites=3", "federation.rounds=2",
)  # fmt: skip
PRIVATE = (
    *PLAN,
    "privacy=patient",
    "privacy.patients=1000",
    "privacy.batch=16",
    "privacy.steps=2",
    "privacy.engine=loop",
)
CANARY = "Zebrowski"  # in every patient, folder and file
COMMAND = typer.Typer()
COMMAND.command()(verb)
HALF = timedelta(minutes=30)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """Kits of three sites, their keys signed; the server's gate listens."""
    folder = tmp_path_factory.mktemp("consortium")
    told = Consortium("lungs", "localhost", 9443, ("NORTH", "SOUTH", "WEST"), PLAN)
    provision(told, folder / "kits", all_in_one=True)
    server = ServerKit.read(folder / "kits" / "server")
    settings = replace(GateSettings.of(server), listen="127.0.0.1", port=0)
    with gate_in_thread(settings, lambda: roll_of(server)) as port:
        yield folder / "kits" / "sites", f"localhost:{port}"


@pytest.fixture(scope="module")
def images(hospitals, tmp_path_factory):
    """One hospital's images; every name in them is a patient's."""
    root = tmp_path_factory.mktemp("disk") / f"{CANARY}-export"
    for number, patient in enumerate(sorted((hospitals / "EAST").iterdir())):
        for image in sorted(patient.iterdir()):
            dataset = pydicom.dcmread(image)
            dataset.PatientID, dataset.PatientName = f"{CANARY}{number}", f"{CANARY}^Anna"
            target = root / f"{CANARY}_{number}" / f"{CANARY}-{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(target)
    return root


def change(folder, name, **values):
    path = folder / name
    path.write_text(yaml.safe_dump((yaml.safe_load(path.read_text()) or {}) | values))


@pytest.fixture
def folder(kits, images, tmp_path, monkeypatch):
    """A site's kit of which a test may change everything; agent: who runs the tests."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight_checks, "can_read", lambda _, user: user != "nobody")  # test_rights asks real users
    sites, address = kits
    copied = shutil.copytree(sites / "NORTH", tmp_path / "kit")
    change(copied, "site.yaml", server=address, data=str(images), agent_user=getpass.getuser(), relay_user="nobody")
    return copied


def index(folder):
    """Run the command that the report advises."""
    found = by_name(preflight(SiteKit.read(folder)))["index"]
    words = shlex.split(found.advice.removeprefix("Index them: "))
    assert words[0] == "env"
    assert words[1] == f"FEDSSL_CACHE={os.environ['FEDSSL_CACHE']}"
    done = CliRunner().invoke(app, words[3:])
    assert done.exit_code == 0, done.output
    return found


@pytest.fixture
def indexed(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "cache"))
    with only("plan", "index"):
        index(folder)
    return folder


@contextlib.contextmanager
def only(*names):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "CHECKS", {name: room.CHECKS[name] for name in names})
        yield


def look(folder, *names):
    with only(*names):
        return preflight(SiteKit.read(folder), images=8)


def by_name(report):
    return {one.name: one for one in report.findings}


def answer(**other):
    now = datetime.now(UTC)
    far = now + timedelta(days=300)
    given = {
        "consortium": "lungs", "site": "NORTH", "state": "admitted", "reason": "", "time": now,
        "version": fedssl.__version__, "plan": PLAN, "fingerprint": None, "superlink": "up", "certificate_until": far,
        "clock_difference_s": 0.2, "tls": Tls("TLSv1.3", "X", far),
    }  # fmt: skip
    return Hello(**(given | other))


@pytest.fixture
def says(monkeypatch):
    """Let the server say something else."""
    return lambda **other: monkeypatch.setattr(preflight_checks, "hello", lambda *_: answer(**other))


def test_a_site_in_order_is_ready_to_join_and_every_figure_is_what_a_count_by_hand_gives(indexed, images):
    report = preflight(SiteKit.read(indexed), images=8)
    found = by_name(report)
    assert report.ready, [(one.name, one.found) for one in report.findings]
    assert list(found) == list(room.CHECKS)
    assert report.sentence.startswith("Ready to join (warnings: server")  # nothing listens behind this gate
    assert found["server"].figures["superlink"] == "down"
    assert found["server"].figures["tls"] == "TLSv1.3"
    assert found["server"].figures["site_certificate_days"] in {363, 364}
    assert found["plan"].figures["fingerprint"] == found["plan"].figures["server"]
    figures = found["index"].figures
    files = [path for path in images.rglob("*") if path.is_file()]
    assert (figures["files"], figures["patients"]) == (len(files), len(list(images.iterdir())))
    assert figures["images"] == len(files)
    assert (figures["unreadable_share"], figures["refused_share"]) == (0.0, 0.0)
    assert 0 <= figures["days_since_scan"] < 0.1
    modalities = [pydicom.dcmread(path).Modality for path in files]
    for one in set(modalities):
        assert figures.get(f"images_{one}", modalities.count(one)) == modalities.count(one)
    assert found["decode"].figures["files_decoded"] == 8
    assert found["decode"].figures["files_failed"] == 0
    assert found["round"].figures["steps"] == figures["training_images"] // 16
    step, whole = found["round"].figures["step_s"], found["round"].figures["round_s"]
    assert whole >= step * found["round"].figures["steps"] > 0
    assert found["users"].state == ("ok" if os.getuid() == 0 else "unknown")


def test_a_trial_round_leaves_nothing_in_the_sites_memory_or_the_manifest(indexed):
    def there():
        return {path for path in [*indexed.rglob("*"), *(indexed.parent / "cache").rglob("*")] if path.is_file()}

    look(indexed, "plan", "policy", "index")
    before = there()
    assert by_name(look(indexed, "plan", "policy", "index", "decode", "round"))["round"].state == "ok"
    assert there() == before


def test_without_a_server_the_reason_is_said_once_and_everything_else_is_looked_at(folder):
    change(folder, "site.yaml", server="localhost:1")
    found = by_name(look(folder, "server", "version", "clock", "plan", "policy", "gpu"))
    assert found["server"].state == "fail"
    assert "Nothing listens at localhost port 1" in found["server"].found
    assert {found[name].state for name in ("version", "clock", "plan")} == {"unknown"}
    assert len(found["plan"].figures["fingerprint"]) == 12
    assert found["policy"].state == "ok"


@pytest.mark.parametrize(
    ("change_of_hello", "name", "state", "words"),
    [
        ({"superlink": "down"}, "server", "warn", "start the SuperLink"),
        ({"site": "SOUTH"}, "server", "fail", "site.yaml says NORTH"),
        ({"certificate_until": datetime.now(UTC) + timedelta(days=12, hours=1)}, "server", "warn", "ends in 12 days"),
        ({"clock_difference_s": 59.0}, "clock", "ok", "59.0 s behind"),
        ({"clock_difference_s": -61.0}, "clock", "warn", "61.0 s ahead of"),
        ({"clock_difference_s": 241.0}, "clock", "fail", "timedatectl set-ntp true"),
        ({"version": "9.9"}, "version", "fail", "Install fedssl 9.9"),
        ({"plan": (*PLAN, "optim.lr=0.5")}, "plan", "fail", "optim.lr=0.5 (only at the server)"),
        ({"plan": PLAN[:-1]}, "plan", "fail", "federation.rounds=2 (only here)"),
        ({"plan": (*PLAN, "federation.wait_s=7")}, "plan", "ok", "federation.wait_s=7 (only at the server)"),
        ({"fingerprint": "0123456789ab"}, "plan", "fail", "compare versions of fedssl"),
        ({"plan": (*PLAN, "optim.rate=1")}, "plan", "fail", "The server's plan cannot be composed here"),
    ],
)
def test_what_the_server_says_is_compared_with_what_is_here(folder, says, change_of_hello, name, state, words):
    says(**change_of_hello)
    found = by_name(look(folder, "server", "version", "clock", "plan"))[name]
    assert (found.state, words in f"{found.found} {found.advice}") == (state, True), found


def test_a_policy_that_refuses_the_plan_names_its_lines(folder):
    change(folder, "policy.yaml", encoders=["resnet50"], min_sites=9, tensors=["prototypes"])
    found = by_name(look(folder, "plan", "policy"))["policy"]
    assert found.state == "fail"
    text = (folder / "policy.yaml").read_text().splitlines()
    for key in ("encoders", "min_sites", "tensors"):
        number = 1 + next(n for n, line in enumerate(text) if line.startswith(f"{key}:"))
        assert f"line {number} of policy.yaml, {key}:" in found.found


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("upload_mb_per_message", "line 1 of policy.yaml, resources.upload_mb_per_message"),
        ("download_mb_per_message", "resources.download_mb_per_message of policy.yaml lets in 0.01 MB"),
    ],
)
def test_a_model_that_the_policy_would_keep_in_or_out_for_its_size_is_said_beforehand(folder, key, words):
    resources = {"upload_mb_per_message": 500, "download_mb_per_message": 500} | {key: 0.01}
    change(folder, "policy.yaml", resources=resources)
    found = by_name(look(folder, "plan", "policy"))["policy"]
    assert found.state == "fail"
    assert words.split(", ")[-1] in found.found


def test_closed_hours_are_no_failure_and_the_opening_is_named(folder):
    now = datetime.now().astimezone()
    later = [(now + HALF * count).strftime("%H:%M") for count in (2, 4)]
    change(folder, "policy.yaml", hours=[f"{later[0]}-{later[1]}"])
    found = by_name(look(folder, "plan", "policy"))["policy"]
    assert found.state == "warn"
    assert f"it opens again on {(now + 2 * HALF):%A at %H:%M}" in found.found


def test_a_plan_that_cannot_be_composed_stops_no_other_check(folder):
    change(folder, "site.yaml", plan=["encoder=huge"])
    found = by_name(preflight(SiteKit.read(folder), images=5))
    assert found["plan"].state == "fail"
    assert len(found) == 11
    assert {found[name].state for name in ("policy", "disk", "gpu", "index", "decode", "round")} == {"unknown"}


def test_a_trial_with_one_user_is_a_warning_and_no_failure(folder):
    with only("users"):
        report = preflight(SiteKit.read(folder), one_user=True)
    assert by_name(report)["users"].state == "warn"
    assert report.ready


def test_a_broken_policy_fails_and_the_rest_goes_on(folder):
    (folder / "policy.yaml").write_text("version: 1\nexpirs: 2030-01-01\n")
    found = by_name(look(folder, "plan", "policy", "gpu"))
    assert found["policy"].state == "fail"
    assert "do you mean expires" in found["policy"].found
    assert found["gpu"].state != "fail"


def test_images_that_were_not_indexed_are_not_indexed_now_and_the_command_is_the_right_one(
    folder, monkeypatch, tmp_path
):
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr("fedssl.data.store.ingest", lambda *_, **__: pytest.fail("it was indexed"))
    change(folder, "site.yaml", patient_from="file", burned_in="mask", workers=1)
    found = by_name(look(folder, "plan", "disk", "index", "decode", "round"))
    assert [found[name].state for name in ("index", "decode", "round")] == ["fail", "unknown", "unknown"]
    assert found["disk"].figures["needed_gb"] > 0
    monkeypatch.undo()
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "fresh"))
    with only("plan", "index"):
        advised = index(folder).advice
    assert "data.edge=40 data.burned_in=mask data.patient_from=file data.workers=1" in advised
    assert by_name(look(folder, "plan", "index"))["index"].state == "ok"


def test_too_few_images_are_said_in_the_agents_words(indexed):
    change(indexed, "site.yaml", plan=[*PLAN, "heads.num_prototypes=5000"])
    found = by_name(look(indexed, "plan", "index", "round"))
    assert found["index"].state == "fail"
    assert found["index"].found.startswith("This site has ")
    assert "fewer than the 5000 prototypes" in found["index"].found


def test_data_that_are_not_there_fail_without_their_path(folder):
    change(folder, "site.yaml", data="/nowhere/Zebrowski")
    found = by_name(look(folder, "plan", "index"))["index"]
    assert found.state == "fail"
    assert CANARY not in found.found


def test_a_round_that_would_miss_the_servers_deadline_fails(indexed):
    change(indexed, "site.yaml", plan=[*PLAN, "federation.deadline_s=0.001"])
    found = by_name(look(indexed, "plan", "index", "round"))["round"]
    assert found.state == "fail"
    assert "fewer local steps" in found.advice


def texts(report):
    return json.dumps(report_json(report), allow_nan=False)


def test_nothing_of_this_machine_and_no_patient_is_in_what_is_shared(indexed):
    change(indexed, "site.yaml", labels=f"/data/{CANARY}.csv", start=f"/data/{CANARY}.safetensors")
    for path in (indexed / "site.key", indexed / "policy.yaml"):
        whole = texts(preflight(SiteKit.read(indexed), images=8))
        own = [CANARY, str(indexed), indexed.parent.name, getpass.getuser(), "/cache", ".dcm", "/tmp"]
        assert [word for word in own if word in whole.replace("root=", "").replace("data.root", "")] == []
        path.unlink()  # and now with errors that would name it
    assert json.loads(whole)["ready"] is False


@given(
    st.lists(st.text("abÄ-_.0", min_size=1, max_size=8), min_size=1, max_size=4),
    st.sampled_from(["", "'", '"', "=", "("]),
)
def test_a_path_is_hidden_wherever_it_stands_in_a_sentence(parts, before):
    closing = {"(": ")", "=": "", "": ""}.get(before, before)
    own = "/srv/Our Images"
    text = f"It is {before}{own}/{'/'.join(parts)}{closing} and {before}/a/b{closing}."
    shared = _shareable(text, [(own, "DATA")])
    assert "/" not in shared
    assert shared.startswith(f"It is {before}DATA")
    assert _shareable("12 images/s at 0.5 MB/s, https://x and/or", []) == "12 images/s at 0.5 MB/s, https://x and/or"


def test_a_private_site_tells_no_count_of_patients_images_or_files(indexed, images, says):
    says(plan=PRIVATE)
    change(indexed, "site.yaml", plan=list(PRIVATE), patients=2000)
    change(indexed, "policy.yaml", tensors=["encoder.", "projector.", "prototypes", "potentials", "centre"])
    report = preflight(SiteKit.read(indexed), images=8)
    found = by_name(report)
    assert report.private
    assert found["index"].figures["images"] == found["index"].figures["patients"] == "not told: private"
    assert set(found["index"].figures) == {"days_since_scan", "images", "patients"}
    assert set(found["decode"].figures) == {"images_per_s", "cached_images_per_s"}
    assert found["disk"].figures["needed_gb"] == "not told: private"
    assert found["round"].figures["steps"] == 2  # privacy.steps, a public constant
    assert found["round"].state == "ok"
    count = len([path for path in images.rglob("*") if path.is_file()])
    assert f"{count} " not in " ".join(one.found for one in report.findings)


def test_what_a_private_site_cannot_use_is_said_here_alone(indexed, says, heard, monkeypatch):
    def fails(*_):
        raise DataError("has 17 images")

    monkeypatch.setattr(preflight_images, "build_agent", fails)
    says(plan=PRIVATE)
    change(indexed, "site.yaml", plan=list(PRIVATE))
    report = look(indexed, "plan", "index")
    assert "17" not in json.dumps(report_json(report)["findings"])
    assert any("has 17 images" in getattr(event, "text", "") for event in heard)


def test_one_check_that_breaks_or_hangs_stops_no_other_and_says_only_its_kind(folder, monkeypatch):
    def breaks(_):
        raise ValueError("/srv/images/Zebrowski.dcm")

    stop = threading.Event()

    def hangs(_):
        stop.wait(60)

    checks = {"server": (breaks, 5.0), "clock": (hangs, 0.05), "plan": room.CHECKS["plan"]}
    monkeypatch.setattr(room, "CHECKS", checks)
    report = preflight(SiteKit.read(folder))
    stop.set()
    assert [(one.name, one.state) for one in report.findings] == [
        ("server", "fail"), ("clock", "unknown"), ("plan", "unknown"),
    ]  # fmt: skip
    assert report.findings[0].found == "The check failed with an unforeseen ValueError."
    assert "took longer than" in report.findings[1].found
    assert report.sentence == "1 check failed: server."


@pytest.mark.skipif(os.getuid() != 0, reason="only root may try what others can read")
def test_a_relay_that_can_read_the_data_fails(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_checks, "can_read", lambda path, user: "export" in path.name or user != "nobody")
    found = by_name(look(folder, "users"))["users"]
    assert (found.state, found.found) == ("fail", "The relay's user can read the data.")
    monkeypatch.setattr(preflight_checks, "can_read", lambda *_: False)
    assert "The agent's user cannot read" in by_name(look(folder, "users"))["users"].found
    change(folder, "site.yaml", relay_user=getpass.getuser())
    assert by_name(look(folder, "users"))["users"].found == "Agent and relay are one user."
    change(folder, "site.yaml", agent_user="no-such-user", relay_user="nobody")
    found = by_name(look(folder, "plan", "users", "index"))
    assert (found["users"].state, found["index"].state) == ("fail", "unknown")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_root_looks_at_the_images_as_the_agents_user_and_is_root_again_afterwards(folder, monkeypatch):
    change(folder, "site.yaml", agent_user="nobody", relay_user="daemon")
    seen = []

    def who(_):
        seen.append((os.geteuid(), os.getegid()))
        return Finding("index", "ok", "")

    monkeypatch.setattr(room, "CHECKS", {"users": (who, 5.0), "index": (who, 5.0)})
    groups = os.getgroups()
    preflight(SiteKit.read(folder))
    assert seen[0] == (0, 0)
    assert seen[1][0] != 0
    assert seen[1][1] != 0
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, groups)


def test_the_page_holds_every_finding_needs_nothing_beside_it_and_runs_nothing(tmp_path):
    evil = "<script>alert(1)</script>"
    figures = {"a_b": 1234567, "c": 0.5, "d": True, "e": evil}
    states = ("ok", "warn", "fail", "unknown")
    findings = [Finding(f"check{n}", state, f"found {evil}", f"do {n}", figures) for n, state in enumerate(states)]
    report = Report("NORTH", "host:1", datetime.now(UTC), "0.1", "Linux", False, findings)
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for words in ("in order", "look at this", "mend this", "not known", "1 check failed: check2.", "do 3", "a b"):
        assert words in page


def test_the_command_writes_page_and_json_and_ends_with_2_where_a_check_failed(folder, tmp_path):
    with only("plan", "index"):
        done = CliRunner().invoke(COMMAND, [str(folder)])
        assert done.exit_code == (0 if "Ready to join" in done.output else 2)
        change(folder, "site.yaml", plan=[*PLAN, "encodr=x"])
        places = ["--page", str(tmp_path / "p.html"), "--json", str(tmp_path / "p.json"), "--format", "json"]
        failed = CliRunner().invoke(COMMAND, [str(folder), *places])
    assert failed.exit_code == 2
    assert json.loads(failed.stdout) == json.loads((tmp_path / "p.json").read_text())
    assert "1 check failed: plan." in (tmp_path / "p.html").read_text()
    assert (folder / "preflight.html").exists()
    assert json.loads((folder / "preflight.json").read_text())["site"] == "NORTH"


def test_a_servers_kit_is_none_to_join_with(kits):
    done = CliRunner().invoke(COMMAND, [str(kits[0].parent / "server")])
    assert done.exit_code == 2
    assert "is a server's kit" in done.stderr


def test_a_look_that_knows_no_plan_tells_no_count(folder):
    assert Look(SiteKit.read(folder), 1).private
