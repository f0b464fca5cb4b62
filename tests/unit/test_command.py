"""The command as a person uses it: sentences, exit codes, no traceback, no path of a patient."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fedssl.cli import app

runner = CliRunner()


def _run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def png_site(tmp_path):
    """A site of three patients with readable images, and a folder that a test may break."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for patient in range(3):
        folder = tmp_path / "root" / "A" / f"MEYER-{patient}"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "root"


def test_help_teaches_by_example():
    text = _run("simulate", "--help").output
    assert "fedssl simulate data.root=FOLDER" in text
    assert "resume=true" in text
    assert "Exit codes" in _run("--help").output


def test_doctor_finds_the_codecs_and_speaks_json():
    result = _run("doctor", "--format", "json")
    checks = {check["name"]: check["state"] for check in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert checks["codec JPEG 2000 Image Compression (Lossless Only)"] == "ok"
    assert checks["torch"] == "ok"


def test_index_counts_patients_images_and_reasons(png_site):
    (png_site / "A" / "MEYER-0" / "zero.png").write_bytes(b"")
    result = _run("index", png_site, "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sites"] == [
        {
            "site": "A", "patients": 3, "studies": 3, "series": 3, "files": 13, "images": 12, "unreadable": 1,
            "modalities": "unknown",
        }
    ]  # fmt: skip
    assert found["unreadable"] == {"is empty (0 bytes)": 1}


_BAD = {
    "an empty folder": (["data.root={empty}"], 3, "No image was found"),
    "a missing folder": (["data.root={empty}/nowhere"], 3, "neither a folder nor a manifest"),
    "no root": ([], 2, "data.root is missing"),
    "an unknown key": (["data.root={root}", "training.batchsize=3"], 2, "did you mean training.batch_size"),
    "an unknown encoder": (
        ["data.root={root}", "encoder.name=resnet_18", "federation.min_sites=1"], 2, "Did you mean resnet18",
    ),
    "more prototypes than images": (
        ["data.root={root}", "encoder=tiny", "heads.num_prototypes=99", "federation.min_sites=1"], 4,
        "Lower heads.num_prototypes",
    ),
    "one site without images": (["data.root={root}", "data.sites=[A,B]"], 3, "No image belongs to site B"),
    "too few sites": (
        ["data.root={root}", "encoder=tiny", "federation.wait_s=0.1", "heads.num_prototypes=4"], 4,
        "1 of at least 2 sites have images",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "code", "sentence"), _BAD.values(), ids=_BAD.keys())
def test_bad_input_gives_one_sentence_and_a_documented_exit_code(png_site, tmp_path, overrides, code, sentence):
    (tmp_path / "empty").mkdir()
    filled = [text.format(root=png_site, empty=tmp_path / "empty") for text in overrides]
    result = _run("simulate", *filled, f"run_dir={tmp_path / 'run'}")
    said = " ".join(result.output.split())
    assert result.exit_code == code, result.output
    assert sentence in said
    assert "Traceback" not in said
    assert "MEYER" not in said


@pytest.mark.parametrize(
    ("labels", "code", "sentence"),
    [
        ("nowhere.csv", 3, "cannot be read"),
        ("file,other\nA/x.png,1\n", 3, "lacks the column"),
        ("file,diagnosis\nB/unknown.png,1\n", 3, "None of the 1 labels"),
        ("one class", 3, "only one class"),
    ],
)
def test_bad_labels_give_one_sentence_and_a_documented_exit_code(tiny, hospitals, tmp_path, labels, code, sentence):
    run = tmp_path / "run"
    assert (
        _run(
            "simulate",
            *tiny,
            "federation.rounds=1",
            "evaluation.labels=null",
            "evaluation.label=label",
            f"run_dir={run}",
        ).exit_code
        == 0
    )
    path = tmp_path / "labels.csv"
    if labels == "one class":
        files = [str(file.relative_to(hospitals)) for file in hospitals.rglob("*.dcm")]
        labels = "file,diagnosis\n" + "\n".join(f"{file},1" for file in files)
    if "\n" in labels:
        path.write_text(labels)
    result = _run("evaluate", run, "--labels", path, "--label", "diagnosis")
    assert result.exit_code == code, result.output
    assert sentence in " ".join(result.output.split())


def test_evaluate_and_report_say_what_is_missing(tmp_path):
    assert _run("evaluate", tmp_path).exit_code == 2
    result = _run("report", tmp_path)
    assert result.exit_code == 2
    assert "holds no run" in result.output


def test_an_interrupted_run_ends_with_code_130_and_goes_on_with_resume(tiny, tmp_path):
    run = tmp_path / "run"
    overrides = [*tiny, "federation.rounds=12", f"run_dir={run}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fedssl.cli", "simulate", *overrides]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("round 2/"):
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "resume=true" in said
    assert "Traceback" not in said
    from fedssl.checkpoint import load_checkpoint
    from fedssl.run_folder import RunFolder

    before = load_checkpoint(RunFolder(run).last).round
    assert 1 <= before < 12
    again = [*[text for text in overrides if "rounds" not in text], "federation.rounds=12", "resume=true"]
    assert _run("simulate", *again).exit_code == 0
    assert load_checkpoint(RunFolder(run).last).round == 12


def test_a_site_that_was_indexed_by_the_command_is_what_its_agent_trains_on(hospitals, tiny, tmp_path, monkeypatch):
    from fedssl.build_site import build_agent
    from fedssl.config import load

    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path))
    settings = [setting for setting in tiny if setting.startswith("data.edge")]
    assert _run("index", hospitals / "EAST", "--site", "EAST", *settings).exit_code == 0
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was decoded again"))
    agent = build_agent(load(tiny), {"data-dir": str(hospitals / "EAST"), "site": "EAST"})
    assert agent.site == "EAST"
    assert len(agent.images) > 0


def test_whoever_starts_a_run_cannot_lower_a_hospitals_policy_for_burned_in_text(
    hospitals, tiny, tmp_path, monkeypatch
):
    from fedssl.build_site import build_agent
    from fedssl.config import load

    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path))
    config = load([*tiny, "data.burned_in=allow", f"data.store={tmp_path / 'elsewhere'}"])
    agent = build_agent(config, {"data-dir": str(hospitals / "EAST"), "site": "EAST"})
    settings = [json.loads(path.read_text()) for path in tmp_path.rglob("settings.json")]
    assert [setting["burned_in"] for setting in settings] == ["refuse"]
    assert not (tmp_path / "elsewhere").exists()
    assert agent.site == "EAST"
