"""What a hospital sees before it joins: no check stops another, and what is shared names nobody."""

import json
from datetime import date

import pytest
import yaml
from typer.testing import CliRunner

from fedssl.answering import forget_sites
from fedssl.build_images import image_store
from fedssl.cli import app
from fedssl.config import load
from fedssl.deployment import hello as greeting
from fedssl.deployment import preflight_checks
from fedssl.deployment.preflight import preflight, report_json, write_page
from fedssl.deployment.settings import SiteKit
from fedssl.errors import FederationError


@pytest.fixture
def kit(hospitals, tiny, tmp_path):
    """A kit whose images are indexed, as the guide says; nothing listens at its server."""
    folder = tmp_path / "kit"
    folder.mkdir()
    plan = [text for text in tiny if not text.startswith("data.root")] + [
        "heads.num_prototypes=4",
        "training.local_steps=2",
    ]
    own = {"site": "EAST", "server": "localhost:1", "data": str(hospitals / "EAST"), "plan": plan}
    (folder / "site.yaml").write_text(yaml.safe_dump(own))
    (folder / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "expires": date(2030, 1, 1)}))
    image_store(load([f"data.root={hospitals / 'EAST'}", "data.edge=40"]), site="EAST", rescan=True).open(rescan=True)
    forget_sites()
    yield SiteKit.read(folder)
    forget_sites()


def change(kit, **values):
    path = kit.folder / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    return SiteKit.read(kit.folder)


def by_name(report):
    return {one.name: one for one in report.findings}


def test_without_a_server_all_other_checks_are_made_and_the_server_is_named(kit):
    report = preflight(kit, images=5, one_user=True)
    found = by_name(report)
    assert found["server"].state == "fail"
    assert not report.ready
    states = {name: one.state for name, one in found.items()}
    assert states["policy"] == states["index"] == states["decode"] == states["round"] == states["disk"] == "ok", states
    assert states["users"] == "warn"
    assert states["clock"] == states["plan"] == states["version"] == "unknown"


def test_the_number_of_images_is_that_of_the_index_and_the_time_of_a_round_is_steps_times_a_step(kit, hospitals):
    found = by_name(preflight(kit, images=5, one_user=True))
    images = len(list((hospitals / "EAST").rglob("*.dcm")))
    assert str(images) in found["index"].found or found["index"].figures["images"] <= images
    assert "A round takes about" in found["round"].found


def test_images_that_were_never_indexed_are_not_scanned_but_the_command_is_told(kit, tmp_path, hospitals, monkeypatch):
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path / "empty"))
    found = by_name(preflight(kit, images=5, one_user=True))["index"]
    assert found.state == "fail"
    assert "fedssl index" in found.found + found.advice


def test_a_policy_that_refuses_the_plan_is_told_with_the_line(kit):
    (kit.folder / "policy.yaml").write_text("version: 1\nexpires: 2030-01-01\nmethods: [simclr]\n")
    found = by_name(preflight(kit, images=5, one_user=True))["policy"]
    assert found.state == "fail"
    assert "line 3 of policy.yaml, methods" in found.found


def test_a_plan_that_cannot_be_composed_is_told_and_stops_no_other_check(kit):
    found = by_name(preflight(change(kit, plan=["encoder=huge"]), images=5, one_user=True))
    assert found["plan"].state in {"fail", "unknown"} or found["policy"].state == "fail"
    assert found["disk"].state != ""
    assert len(found) == 11


def test_a_check_that_fails_in_an_unforeseen_way_tells_no_text_and_stops_no_other(kit, monkeypatch):
    from fedssl.deployment import preflight as module

    def broken(look):
        raise ZeroDivisionError("/data/patients/MEYER^ANNA")

    monkeypatch.setitem(module.CHECKS, "gpu", (broken, 5.0))
    report = preflight(kit, images=5, one_user=True)
    assert by_name(report)["gpu"].state == "fail"
    assert "MEYER" not in json.dumps(report_json(report))
    assert by_name(report)["round"].state == "ok"


def test_what_is_shared_names_no_folder_file_patient_or_user(kit, hospitals, tmp_path):
    report = preflight(kit, images=5, one_user=True)
    shared = json.dumps(report_json(report))
    canaries = {path.name for path in (hospitals / "EAST").rglob("*")} | {
        str(hospitals),
        str(kit.folder),
        str(tmp_path),
    }
    assert [canary for canary in canaries if canary in shared] == []
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "EAST" in page


def test_a_private_plan_tells_no_count(kit):
    private = [*kit.plan, "privacy=patient", "method=private_clustering", "privacy.patients=40", "privacy.batch=8"]
    report = preflight(change(kit, plan=private), images=5, one_user=True)
    assert report.private
    figures = by_name(report)["index"].figures
    assert figures["images"] == figures["patients"] == "not told: private"
    assert "not told: private" in by_name(report)["index"].found


def test_a_server_with_another_plan_or_clock_is_told(kit, monkeypatch):
    def answer(folder, server, ca, key):
        raise FederationError("This key is not registered with the consortium trial.")

    monkeypatch.setattr(greeting, "hello", answer)
    monkeypatch.setattr(preflight_checks, "hello", answer, raising=False)
    found = by_name(preflight(kit, images=5, one_user=True))["server"]
    assert found.state == "fail"


def test_the_verb_writes_both_reports_and_ends_with_2_where_a_check_fails(kit):
    done = CliRunner().invoke(app, ["preflight", str(kit.folder), "--one-user", "--images", "3"])
    assert done.exit_code == 2
    assert "failed: server" in " ".join(done.stdout.split())
    assert json.loads((kit.folder / "preflight.json").read_text())["findings"]
    assert (kit.folder / "preflight.html").exists()
