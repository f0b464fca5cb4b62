"""Parts of a study against slower and dumber ways to the same figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import nn

from fedssl.build_images import open_images
from fedssl.config import load
from fedssl.evaluation.features import embed
from fedssl.evaluation.protocol import Score
from fedssl.evidence.encoders import Arm, Encoder
from fedssl.evidence.joining import benefit_rows, worst_site
from fedssl.evidence.labels_needed import Measured, reduction_rows
from fedssl.evidence.sentences import limits, sentences, spoken
from fedssl.evidence.settings import tasks_of
from fedssl.evidence.shortcuts import shortcut_rows
from fedssl.evidence.stability import robustness_rows
from fedssl.evidence.study import unequal


@pytest.fixture
def opened(tiny):
    config = load([*tiny, "data.test_fraction=0.4"])
    store = open_images(config)
    return store, tasks_of(config, store)["lesion"]


def _encoder(arm, seed=0, images_seen=100):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 6))
    facts = {"images_seen": images_seen, "round": 1, "sites": [], "method": "x", "fingerprint": ""}
    return Encoder(arm, module, 32, facts, lambda _: module)


def _probe(train, labels, test):
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1
    model = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced")
    return model.fit((train - mean) / deviation, labels), (test - mean) / deviation


def test_the_benefit_of_joining_is_the_difference_of_two_probes_on_the_sites_own_patients(opened):
    _, task = opened
    rng = np.random.default_rng(0)
    together, alone = _encoder(Arm("federated")), _encoder(Arm("alone", "EAST"))
    features = {encoder.name: rng.normal(size=(len(task.rows), 4)) for encoder in (together, alone)}
    features["federated"][:, 0] += task.targets.classes
    (row,) = benefit_rows("lesion", task, features, [together, alone], resamples=50)
    east, test = task.images.sites == "EAST", task.tests["in domain"]
    areas = {}
    for name, values in features.items():
        own, seen = values[task.train & east], values[test & east]
        model, scaled = _probe(own, task.targets.classes[task.train & east], seen)
        areas[name] = roc_auc_score(task.targets.classes[test & east], model.predict_proba(scaled)[:, 1])
    assert row["federated"] == pytest.approx(areas["federated"])
    assert row["alone"] == pytest.approx(areas["EAST alone"])
    assert row["difference"] == pytest.approx(areas["federated"] - areas["EAST alone"])
    assert row["test_patients"] == len(set(task.patients[test & east].tolist()))


def test_a_site_without_both_classes_is_named_with_the_reason(opened):
    _, task = opened
    values = task.targets.values.copy()
    values[(task.images.sites == "EAST") & task.train] = [1, 0]
    task = replace(task, images=replace(task.images, targets=replace(task.targets, values=values)))
    encoders = [_encoder(Arm("federated")), _encoder(Arm("alone", "EAST"))]
    features = {encoder.name: np.zeros((len(task.rows), 2)) for encoder in encoders}
    (row,) = benefit_rows("lesion", task, features, encoders, resamples=50)
    assert row["reason"] == "too few labelled patients to show both classes"


def test_the_site_that_gains_least_is_named_for_each_task_and_pretraining():
    rows = [
        {"task": "a", "variant": "", "site": "x", "difference": 0.1},
        {"task": "a", "variant": "", "site": "y", "difference": -0.2},
        {"task": "a", "variant": "v", "site": "x", "difference": 0.0},
        {"task": "a", "variant": "v", "site": "z", "reason": "no labels"},
    ]
    assert [row["site"] for row in worst_site(rows)] == ["y", "x"]


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_tells_the_site_raises_an_alarm_only_where_the_label_hangs_on_the_site(opened, tied):
    store, task = opened
    sites = np.unique(task.images.sites[task.tests["in domain"]], return_inverse=True)[1]
    here = task.train | task.tests["in domain"]
    codes = np.unique(task.images.sites, return_inverse=True)[1]
    told = np.eye(codes.max() + 1)[codes] + np.random.default_rng(0).normal(0, 0.1, (len(codes), codes.max() + 1))
    positive = (task.images.sites == "EAST") if tied else (np.arange(len(task.rows)) % 2 == 0)
    targets = replace(task.targets, values=np.stack([~positive, positive], 1).astype(np.float32))
    task = replace(task, images=replace(task.images, targets=targets))
    rows = shortcut_rows("lesion", store, task, {"x": told}, ["x"], resamples=50)
    row = next(row for row in rows if row["what"] == "site")
    assert (row["places"], row["chance"]) == (sites.max() + 1, pytest.approx(1 / (sites.max() + 1)))
    test = task.tests["in domain"]
    model, scaled = _probe(told[task.train & here], codes[task.train & here], told[test])
    assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(codes[test], model.predict(scaled)))
    assert row["balanced_accuracy"] > 0.95
    assert row["alarm"] == tied


def test_robustness_at_the_neutral_level_is_the_plain_figure_and_the_drop_is_from_there(opened):
    store, task = opened
    encoder = _encoder(Arm("federated"))
    rows = robustness_rows("lesion", [encoder], store, task, resamples=20)
    train = embed(encoder.module, store, task.rows[task.train], edge=32)
    for domain, mask in task.tests.items():
        test = embed(encoder.module, store, task.rows[mask], edge=32)
        model, scaled = _probe(train.copy(), task.targets.classes[task.train], test)
        plain = roc_auc_score(task.targets.classes[mask], model.predict_proba(scaled)[:, 1])
        for kind, neutral in [("rotation", 0), ("scale", 1), ("gamma", 1), ("contrast", 1), ("brightness", 0)]:
            own = [row for row in rows if (row["domain"], row["kind"]) == (domain, kind)]
            levels = {row["level"]: row["value"] for row in own if "level" in row}
            assert levels[neutral] == pytest.approx(plain, abs=1e-6)
            others = [value for level, value in levels.items() if level != neutral]
            (drop,) = [row["drop"] for row in own if "drop" in row]
            assert drop == pytest.approx(levels[neutral] - np.mean(others))


def test_label_reduction_divides_by_the_share_that_was_really_labelled(opened):
    _, task = opened
    encoders = [_encoder(Arm("federated")), _encoder(Arm("scratch"))]
    measured = Measured("lesion", task, {}, patients={"in domain": 40})
    for fraction, share, value in [(0.1, 0.2, 0.9), (1.0, 1.0, 0.95)]:
        measured.scores.append(Score("federated", "linear", fraction, share, 2, 9, "in domain", "auroc", value, 0, 1))
        measured.values["federated", "linear", fraction, "in domain"] = np.full(41, value)
    measured.values["no pretraining", "fine-tuned", 1.0, "in domain"] = np.full(41, 0.85)
    measured.values["no pretraining", "linear", 1.0, "in domain"] = np.full(41, 0.80)
    (row,) = reduction_rows(measured, encoders)
    assert (row["times"], row["at_least"], row["grid"]) == (pytest.approx(5.0), True, pytest.approx(5.0))
    assert (row["baseline"], row["baseline_probe"]) == ("no pretraining", "fine-tuned")  # its better use


def test_no_labels_are_saved_against_a_baseline_that_guesses(opened):
    _, task = opened
    encoders = [_encoder(Arm("federated")), _encoder(Arm("scratch"))]
    measured = Measured("lesion", task, {}, patients={"in domain": 40})
    measured.scores.append(Score("federated", "linear", 1.0, 1.0, 9, 9, "in domain", "auroc", 0.9, 0, 1))
    measured.values["federated", "linear", 1.0, "in domain"] = np.full(41, 0.9)
    measured.values["no pretraining", "linear", 1.0, "in domain"] = np.linspace(0.45, 0.65, 41)
    assert reduction_rows(measured, encoders) == []
    (note,) = measured.notes
    assert "no pretraining with all labels, in domain, is not shown to be better than guessing" in note


def test_encoders_that_saw_other_numbers_of_images_are_named():
    encoders = [
        _encoder(Arm("federated"), images_seen=1000), _encoder(Arm("pooled"), images_seen=1010),
        _encoder(Arm("alone", "EAST"), images_seen=900), _encoder(Arm("without", "EAST"), images_seen=700),
    ]  # fmt: skip
    assert list(unequal(encoders)) == ["EAST alone saw 900 images, the federated encoder 1,000: not equal."]


def _results(**more):
    arms = [
        {"encoder": "federated", "kind": "federated", "variant": "", "missing": "", "collapse": []},
        {"encoder": "no pretraining", "kind": "scratch", "variant": "", "missing": ""},
        {"encoder": "pooled (v)", "kind": "pooled", "variant": "v", "missing": ""},
    ]
    scores = [{"encoder": "federated", "task": "a", "domain": "in domain", "fraction": 1.0, "share": 1.0}]
    empty = {name: [] for name in ("reductions", "differences", "joining", "left_out", "convergence", "shortcuts")}
    facts = {"on": "test", "synthetic": False, "notes": ["odd"], "seeds": 5, "resamples": 10_000, "tasks": []}
    return {"arms": arms, "scores": scores, **empty, **facts, **more}


def test_sentences_call_a_tie_a_tie_and_leave_out_what_answers_no_question():
    gap = {"task": "a", "encoder": "federated", "probe": "linear", "fraction": 1.0, "share": 1.0, "domain": "in domain"}
    numbers = {"difference": 0.01, "low": -0.02, "high": 0.04, "verdict": "tie"}
    rows = [gap | numbers | {"other": "no pretraining"}, gap | numbers | {"other": "pooled (v)"}]
    (told,) = map(spoken, sentences(_results(differences=rows)))
    assert "federated against no pretraining, linear probe with 100 % of the labels" in told
    assert "+0.010 [-0.020, +0.040]: tie" in told


def test_a_collapsed_encoder_is_the_first_thing_that_is_said():
    results = _results()
    results["arms"][0]["collapse"] = ["EAST: few effective prototypes"]
    assert spoken(sentences(results)[0]).startswith("Alarm: the encoder federated showed signs of collapse")


def test_limits_name_what_is_missing_and_what_could_not_be_done():
    results = _results(on="validation", synthetic=True)
    results["arms"].append({"encoder": "natural images", "kind": "natural", "variant": "", "missing": "no file"})
    told = limits(results)
    assert told[:2] == ["natural images is missing: no file.", "odd"]
    assert "synthetic" in told[2]
    assert "validation patients" in told[3]
