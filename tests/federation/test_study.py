"""A whole study: frozen before it trains, repeatable, reused, and honest about what is missing."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from fedssl import cli, progress
from fedssl.config import load
from fedssl.errors import ConfigError, DataError
from fedssl.evidence.encoders import Arm
from fedssl.evidence.sentences import spoken
from fedssl.evidence.study import RESULTS, judged, run_study
from simulations import study as studies
from simulations.study import study

SITES = ("EAST", "SOUTH", "WEST")


def _overrides(root, folder, *more):
    return [
        f"data.root={root}", f"data.store={folder / 'store'}", "+experiment=demo",
        f"study.encoders={folder / 'encoders'}", f"run_dir={folder / 'study'}", f"data.sites=[{','.join(SITES)}]",
        "data.edge=40", "data.test_fraction=0.4",
        "augment.crops.global.edge=32", "augment.crops.local.edge=16", "augment.crops.local.count=1", "seed=1",
        "heads.num_prototypes=8", "heads.hidden=32", "heads.width=16", "training.batch_size=16", "training.threads=1",
        "federation.rounds=1", "evaluation.seeds=2", "evaluation.bootstrap=50", "evaluation.fractions=[0.3,1.0]",
        "study.finetune.least_steps=2", "study.finetune.most_steps=3", "study.finetune.checks=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(hospitals, tmp_path_factory):
    """Overrides, folder and results of a study with every question."""
    folder = tmp_path_factory.mktemp("study")
    overrides = _overrides(hospitals, folder, "study.leave_one_out=true")
    _, results = study(overrides)
    return overrides, folder, results


def _nothing_trains(monkeypatch):
    def refuse(overrides):
        raise AssertionError(f"trained again: {overrides}")

    monkeypatch.setattr(studies, "simulate", refuse)


def test_a_study_answers_every_question_of_the_protocol(done):
    _, folder, results = done
    assert {arm["kind"] for arm in results["arms"]} == {"scratch", "natural", "federated", "pooled", "alone", "without"}
    for section in ("scores", "differences", "delong", "joining", "left_out", "robustness"):
        assert results[section], section
    assert results["reductions"] or all("better than guessing" in note for note in results["notes"])
    cells = {(s["encoder"], s["probe"], s["domain"], s["metric"]) for s in results["scores"]}
    metrics = {"auroc", "auprc", "balanced_accuracy", "sensitivity_at_95_specificity", "calibration_error"}
    for domain in ("in domain", "unseen site", "unseen site, own labels"):
        for probe in ("linear", "knn", "fine-tuned"):
            assert {("federated", probe, domain, metric) for metric in metrics} <= cells
        assert ("raw pixels (PCA)", "linear", domain, "auroc") in cells
        assert ("metadata only", "linear", domain, "auroc") in cells
    assert {row["site"] for row in results["joining"]} == set(SITES)
    assert {row["site"] for row in results["left_out"]} == set(SITES)
    assert json.loads((folder / "study" / RESULTS).read_text()) == results
    assert len((folder / "study" / "study.csv").read_text().splitlines()) == len(results["scores"]) + 1


def test_all_arms_see_equally_many_images(done):
    _, _, results = done
    seen = {
        arm["encoder"]: arm["images_seen"] for arm in results["arms"] if arm["kind"] in {"federated", "pooled", "alone"}
    }
    assert len(seen) == 5
    assert max(seen.values()) - min(seen.values()) <= 3 * 16  # a batch at each site


def test_every_pretrained_encoder_is_named_by_hash_round_method_and_images_seen(done):
    _, _, results = done
    pretrained = [arm for arm in results["arms"] if arm["kind"] not in {"scratch", "natural"}]
    assert len({arm["sha256"] for arm in pretrained}) == len(pretrained) == 8
    assert all(arm["round"] == 1 and arm["images_seen"] > 0 for arm in pretrained)
    assert all(arm["method"] == "ContrastiveClustering" for arm in pretrained)


def test_an_arm_without_weights_is_named_as_missing(done):
    _, _, results = done
    natural = next(arm for arm in results["arms"] if arm["kind"] == "natural")
    assert "no file of weights" in natural["missing"]
    assert any(text.startswith("natural images is missing") for text in results["limits"])


def test_the_same_study_again_trains_nothing_and_gives_the_same_digits(done, monkeypatch):
    overrides, _, results = done
    monkeypatch.setattr("fedssl.evidence.fits._fit", None)
    _, again = study(overrides)
    assert again == results


def test_a_study_from_nothing_gives_the_same_digits(done, hospitals, tmp_path):
    _, _, results = done
    _, again = study(_overrides(hospitals, tmp_path, "study.leave_one_out=true"))
    assert again == results


def test_another_study_of_the_same_encoders_trains_none(done, monkeypatch):
    overrides, folder, results = done
    heard = []
    stop = progress.listen(heard.append)
    _, other = study(
        [*overrides, f"run_dir={folder / 'other'}", "evaluation.fractions=[1.0]", "study.leave_one_out=false",
         "study.robustness=false", "study.finetune.arms=[scratch]"]
    )  # fmt: skip
    stop()
    known = {arm["encoder"]: arm.get("sha256") for arm in results["arms"]}
    assert all(arm.get("sha256") == known[arm["encoder"]] for arm in other["arms"])
    assert not [event for event in heard if isinstance(event, progress.Note) and "Pretraining" in event.text]


def test_a_frozen_protocol_is_not_changed(done):
    overrides, _, _ = done
    with pytest.raises(ConfigError, match="differs in evaluation"):
        study([*overrides, "evaluation.seeds=3"])
    with pytest.raises(ConfigError, match="differs in pretraining"):
        study([*overrides, "optim.lr=0.01"])


def test_labels_that_change_after_the_freeze_are_noticed(hospitals, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(hospitals, root)
    overrides = _overrides(root, tmp_path)
    config = load(overrides)
    from fedssl.build_images import open_images
    from fedssl.evidence.frozen import freeze

    freeze(config, open_images(config), tmp_path)
    (root / "labels.csv").write_text((root / "labels.csv").read_text() + "\n")
    with pytest.raises(ConfigError, match="differs in labels_sha256"):
        freeze(config, open_images(config), tmp_path)


def test_an_encoder_that_never_trained_is_refused(done, tmp_path):
    from dataclasses import replace

    from fedssl.build_images import open_images
    from fedssl.checkpoint import load_checkpoint, save_checkpoint
    from fedssl.run_folder import RunFolder

    overrides, folder, _ = done
    fed = next(path for path in (folder / "encoders").iterdir() if path.is_dir())
    shutil.copytree(fed, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    save_checkpoint(run.last, replace(load_checkpoint(run.last), images_seen=0))
    config = load(overrides)
    with pytest.raises(ConfigError, match="never trained"):
        run_study(config, open_images(config), [Arm("federated", folder=run.path)], tmp_path / "study", "x")


def test_labels_that_do_not_fit_are_said_before_anything_trains(hospitals, tmp_path, monkeypatch):
    _nothing_trains(monkeypatch)
    with pytest.raises(DataError, match=r"Task a: .*lacks the column nodule"):
        study(_overrides(hospitals, tmp_path, "study.tasks={a: {label: nodule}}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("study.arms=[scratch]", "must hold federated"),
        ("study.arms=[federated,guessed]", "guessed"),
        ("study.arms=[federated] study.leave_one_out=true", "needs scratch"),
        ("simulation.partition=iid", "real sites"),
        ("training.local_seconds=5", "how many images"),
        ("privacy=patient", "privacy_table"),
        ("study.finetune.lr=-1", "finetune.lr"),
        ("study.tasks={a: {lable: x}}", "study.tasks must be"),
        ("study.variants={a: simclr}", "study.variants must be"),
    ],
)
def test_an_impossible_study_is_refused_before_anything_trains(hospitals, tmp_path, monkeypatch, more, message):
    _nothing_trains(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        study(_overrides(hospitals, tmp_path, *(more.split() if "leave" in more else [more])))


def test_a_folder_with_something_else_is_left_alone(hospitals, tmp_path, monkeypatch):
    _nothing_trains(monkeypatch)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="no study"):
        study(_overrides(hospitals, tmp_path))


def test_several_tasks_of_several_kinds_and_another_method_run_in_one_study(hospitals, tmp_path):
    table = pa.csv.read_csv(hospitals / "labels.csv")
    rng = np.random.default_rng(0)
    table = table.append_column("grade", pa.array(rng.choice(["low", "mid", "high"], table.num_rows)))
    table = table.append_column("odd", pa.array([None if n % 7 == 0 else n % 2 for n in range(table.num_rows)]))
    pa.csv.write_csv(table, tmp_path / "labels.csv")
    tasks = "{grade: {label: grade}, findings: {label: [lesion, odd]}, lesion: {label: lesion}}"
    _, results = study(
        _overrides(
            hospitals, tmp_path, f"evaluation.labels={tmp_path / 'labels.csv'}", f"study.tasks={tasks}",
            'study.variants={simclr: ["method=simclr"]}', "study.arms=[scratch,federated]", "study.robustness=false",
            "study.finetune.parts=[last]", "study.finetune.arms=[federated]", "evaluation.patients=validation",
        )
    )  # fmt: skip
    assert {task["task"]: task["kind"] for task in results["tasks"]} == {
        "grade": "multi-class", "findings": "multi-label", "lesion": "binary"
    }  # fmt: skip
    assert [arm["encoder"] for arm in results["arms"]] == ["no pretraining", "federated", "federated (simclr)"]
    assert results["arms"][2]["method"] == "SimCLR"
    assert {row["probe"] for row in results["scores"]} == {"linear", "knn", "last layers"}
    assert {row["domain"] for row in results["scores"]} == {"in domain"}  # of validation patients
    assert any(text.startswith("These figures are of validation patients") for text in results["limits"])


def test_p_values_are_corrected_across_tasks_and_wins_below_the_noise_are_ties():
    gap = {"low": 0.01, "high": 0.05, "difference": 0.03, "test_patients": 50}
    rows = [
        {"task": "a", "other": "x", **gap, "p": 0.02},
        {"task": "b", "other": "x", **gap, "p": 0.03},
        {"task": "a", "other": "y", **gap, "p": 0.03},
        {"task": "a", "other": "z", **gap, "low": -0.01, "p": 0.001},
        {"task": "a", "other": "v", **gap, "difference": -0.03, "low": -0.05, "high": -0.01, "p": 0.001},
        {"task": "a", "other": "w", **gap, "p": 0.001, "test_patients": 4},
        {"task": "a", "other": "u", "reason": "no labels"},
    ]
    found = judged(rows, "other")
    assert [row.get("p_holm") for row in found[:3]] == pytest.approx([0.04, 0.04, 0.03])
    verdicts = ["better", "better", "better", "tie", "worse", "too few patients to tell", None]
    assert [row.get("verdict") for row in found] == verdicts


def test_the_command_prints_the_sentences_and_writes_one_page(done):
    overrides, folder, results = done
    told = CliRunner().invoke(cli.app, ["study", *overrides])
    assert told.exit_code == 0, told.output
    for sentence in [*map(spoken, results["sentences"]), *results["limits"]]:
        assert " ".join(sentence.split()) in " ".join(told.stdout.split())
    page = (folder / "study" / "study.html").read_text()
    assert results["protocol"][:12] in page
    assert str(folder) not in page


def test_a_site_makes_and_uses_its_own_model_by_two_commands(done, hospitals, tmp_path):
    _, folder, _ = done
    encoder = next(path for path in (folder / "encoders").iterdir() if path.is_dir())
    told = CliRunner().invoke(
        cli.app,
        ["finetune", str(encoder), "--labels", str(hospitals / "labels.csv"), "--model", str(tmp_path / "model"),
         "--part", "head", "--next", "3", "finetune.least_steps=2", "finetune.most_steps=3"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert len((tmp_path / "model" / "next-studies.csv").read_text().splitlines()) <= 4
    table = tmp_path / "predictions.csv"
    told = CliRunner().invoke(cli.app, ["predict", str(tmp_path / "model"), str(hospitals), "--output", str(table)])
    assert told.exit_code == 0, told.output
    assert len(table.read_text().splitlines()) == len(list(hospitals.rglob("*.dcm"))) + 1


def test_a_setting_that_belongs_to_no_model_is_refused(done, hospitals, tmp_path):
    _, folder, _ = done
    encoder = next(path for path in (folder / "encoders").iterdir() if path.is_dir())
    labels, model = str(hospitals / "labels.csv"), str(tmp_path / "model")
    told = CliRunner().invoke(cli.app, ["finetune", str(encoder), "--labels", labels, "--model", model, "optim.lr=1"])
    assert (told.exit_code, "no setting here" in told.stderr) == (2, True)
