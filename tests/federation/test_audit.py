"""`fedssl audit` on a whole simulated run: shadows through the real federation, figures only, refusals in sentences."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from fedssl import cli
from fedssl.build_images import open_images
from fedssl.checkpoint import load_checkpoint, save_checkpoint
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.leakage.sentences import table
from fedssl.label_efficiency import evaluate_run
from fedssl.leakage_audit import audit_run
from fedssl.run_folder import RunFolder
from simulations import run as simulation
from simulations.run import simulate
from simulations.shadows import train_shadows

CANARIES = 6  # at most a quarter of the patients
PATIENTS, IMAGES = 26, 3
OWN = ("federation.rounds=1", "data.test_fraction=0.5", "data.sites=[EAST,SOUTH,WEST]")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr("fedssl.leakage_cohort.MOST_IMAGES", IMAGES)


@pytest.fixture
def settings(tiny):
    """As tiny, with enough held-out patients for a figure."""
    return [*tiny, *OWN, "method=simclr", "aggregation=server_momentum"]


def _once(tmp_path_factory, name, make):
    folder = tmp_path_factory.getbasetemp() / "audits" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        make(folder)
    return folder


@pytest.fixture
def plain(tiny, tmp_path_factory):
    """A run with prototypes that nobody has audited; tests copy it."""
    return _once(tmp_path_factory, "plain", lambda folder: simulate([*tiny, *OWN, f"run_dir={folder}"]))


@pytest.fixture
def shadowed(settings, tmp_path_factory):
    """A run and its four shadows."""

    def make(folder):
        simulate([*settings, f"run_dir={folder}"])
        train_shadows(folder, 4, canaries=CANARIES)

    return _once(tmp_path_factory, "shadowed", make)


def _copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def _changed(run, **data):
    """Change settings of data in a run's own configuration."""
    path = run / "config.resolved.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"] |= data
    path.write_text(yaml.safe_dump(config))
    return run


def _refuse(*_, **__):
    raise AssertionError("trained again")


def test_an_audit_leaves_figures_and_a_card_and_names_no_patient_file_or_path(plain, hospitals, tmp_path):
    run = _copied(plain, tmp_path)
    results = audit_run(run, labels=hospitals / "labels.csv", attribute="modality")
    assert json.loads((run / "audit.json").read_text()) == results
    data = results["data"]
    assert (data["members"] + data["held_out"], data["images"]) == (PATIENTS, PATIENTS * IMAGES)
    assert {(row["score"], row["encoder"]) for row in results["membership"]} == {
        (score, encoder) for score in ("features", "projections") for encoder in ("trained", "untrained")
    }
    for row in results["membership"]:
        assert row["auroc"]["low"] <= row["auroc"]["value"] <= row["auroc"]["high"]
    assert results["prototypes"]["prototypes"] == 8
    told = {(row["what"], row["encoder"]): row["balanced_accuracy"] for row in results["attributes"]}
    assert told.keys() == {(a, e) for a in ("site", "scanner", "modality") for e in ("trained", "untrained")}
    assert told["modality", "trained"]["chance"] == 0.5  # two kinds have three patients on each side
    card = (run / "MODEL_CARD.md").read_text()
    assert results["checkpoint"]["sha256"] in card
    assert f"{data['members']} who trained" in card
    store = open_images(RunFolder(run).config())
    secret = {str(name) for column in ("patient", "study", "series", "image") for name in store.column(column)}
    for text in (card, (run / "audit.json").read_text()):
        assert not [name for name in secret if name in text]
        assert str(hospitals) not in text
        assert str(tmp_path) not in text
        assert ".dcm" not in text


def test_an_audit_repeats_to_the_last_digit(plain, tmp_path):
    run = _copied(plain, tmp_path)
    assert audit_run(run) == audit_run(run / "checkpoints" / "last.safetensors")


def test_shadows_train_on_opposite_halves_and_the_likelihood_ratio_is_reported(shadowed):
    folders = [shadowed / "audit" / "shadows" / f"0{number}" for number in range(4)]
    results = audit_run(shadowed, folders)
    attacks = {(row["score"], row["attacked"], row["who"]): row for row in results["shadows"]["attacks"]}
    assert {key[1:] for key in attacks} == {("target", "patients"), ("shadows", "patients"), ("shadows", "canaries")}
    assert (results["shadows"]["number"], results["shadows"]["canaries"]) == (4, CANARIES)
    target = attacks["projections", "target", "patients"]
    assert target["members"] + target["held_out"] == PATIENTS - CANARIES
    assert attacks["features", "shadows", "patients"]["auroc"] is not None
    assert attacks["features", "shadows", "canaries"]["auroc"] is None  # six are too few
    assert any("Too few patients" in sentence for sentence in results["sentences"])
    assert len({load_checkpoint(RunFolder(folder).last).fingerprint for folder in folders}) == 4
    assert results["prototypes"] is None  # SimCLR has none
    assert table(results)


def test_finished_shadows_are_not_trained_again_and_other_canaries_begin_anew(shadowed, monkeypatch):
    monkeypatch.setattr(simulation, "run_in_process", _refuse)
    assert len(train_shadows(shadowed, 4, canaries=CANARIES)) == 4
    with pytest.raises(AssertionError, match="trained again"):
        train_shadows(shadowed, 4, canaries=CANARIES - 1)


def test_a_shadow_is_neither_evaluated_nor_audited(shadowed):
    shadow = shadowed / "audit" / "shadows" / "00"
    for verb in (evaluate_run, audit_run):
        with pytest.raises(ConfigError, match="for fedssl audit RUN alone"):
            verb(shadow)


def test_impossible_shadows_are_refused_before_anything_trains(plain, monkeypatch):
    monkeypatch.setattr(simulation, "run_in_process", _refuse)
    for number in (1, 2, 5, -4):
        with pytest.raises(ConfigError, match="even number of at least 4"):
            train_shadows(plain, number)
    with pytest.raises(DataError, match="--canaries 6 or fewer"):
        train_shadows(plain, 4, canaries=10)


def test_a_run_whose_images_or_held_out_patients_are_missing_is_refused(plain, tmp_path):
    run = _copied(plain, tmp_path)
    root = RunFolder(run).config()["data"]["root"]
    elsewhere = _changed(run, root="/export/of/a/hospital")
    for call in (lambda: audit_run(elsewhere), lambda: train_shadows(elsewhere, 4)):
        with pytest.raises(ConfigError, match="images of this run are not on this machine"):
            call()
    _changed(run, root=root, test_fraction=0.0)
    (run / "images.json").unlink()  # as if it had been trained so
    with pytest.raises(DataError, match=r"data.test_fraction=0\)"):
        audit_run(run)


def test_sites_that_the_images_do_not_hold_are_named(plain, tmp_path):
    run = _copied(plain, tmp_path)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"WEST"', '"FAR AWAY"'))
    with pytest.raises(DataError, match="trained by FAR AWAY"):
        audit_run(run)


def test_an_encoder_that_never_trained_is_refused(plain, tmp_path):
    run = _copied(plain, tmp_path)
    known = load_checkpoint(RunFolder(run).last)
    save_checkpoint(RunFolder(run).last, type(known)(known.state, known.run, 0, known.fingerprint))
    with pytest.raises(ConfigError, match="never trained"):
        audit_run(run)


def test_an_attribute_that_is_no_group_is_refused(plain, hospitals, tmp_path):
    run = _copied(plain, tmp_path)
    with pytest.raises(DataError, match=r"patient has 26 different values"):
        audit_run(run, labels=hospitals / "labels.csv", attribute="patient")


def test_the_verb_prints_sentences_or_json_and_ends_with_zero(plain, tmp_path):
    run = _copied(plain, tmp_path)
    done = CliRunner().invoke(cli.app, ["audit", str(run)])
    assert done.exit_code == 0, done.output
    assert "chance is 50" in done.output
    assert "--shadows 0" in done.output
    done = CliRunner().invoke(cli.app, ["audit", str(run), "--format", "json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["membership"]
    refused = CliRunner().invoke(cli.app, ["audit", str(run), "--shadows", "3"])
    assert refused.exit_code == ConfigError.exit_code


def test_export_writes_the_card_too(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("fedssl.release.onnx.export_onnx", lambda *_, **__: None)
    run = _copied(plain, tmp_path)
    done = CliRunner().invoke(cli.app, ["export", str(run)])
    assert done.exit_code == 0, done.output
    assert "Not audited" in (run / "MODEL_CARD.md").read_text()
