"""Temperatures, priors, reliability, cutoffs, and cross-validation by patient."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.errors import DataError
from fedssl.evaluation.calibration import (
    as_written,
    cutoffs,
    decide,
    fit_temperature,
    negative_log_likelihood,
    prior_of,
    probabilities,
    reliability,
    with_prior,
)
from fedssl.evaluation.finetune import balance
from fedssl.evaluation.judgement import judge, patients_by_output
from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.out_of_fold import OutOfFold, patient_folds
from fedssl.evaluation.targets import Targets, classes_of, findings_of


def _classes(rng, images, classes, scale):
    """Labels drawn from the softmax of true logits, and those logits times ``scale``."""
    true = rng.normal(0, 1.5, (images, classes))
    shares = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    numbers = [rng.choice(classes, p=row) for row in shares]
    return (true * scale).astype(np.float32), Targets(
        np.eye(classes, dtype=np.float32)[numbers], list("abcdef")[:classes], True
    )


def _findings(rng, images, outputs, scale):
    """Findings drawn from the sigmoid of true logits, a tenth unknown, and those logits times ``scale``."""
    true = rng.normal(0, 1.5, (images, outputs))
    values = (rng.random(true.shape) < 1 / (1 + np.exp(-true))).astype(np.float32)
    values[rng.random(true.shape) < 0.1] = np.nan
    return (true * scale).astype(np.float32), Targets(values, list("abcdef")[:outputs], False)


@pytest.mark.parametrize("draw", [_classes, _findings])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_spoiled_the_logits_is_found(draw, temperature):
    logits, targets = draw(np.random.default_rng(0), 6000, 3, temperature)
    assert fit_temperature(logits, targets) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("draw", [_classes, _findings])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.05, 30.0))
def test_calibration_changes_no_order_and_no_likeliest_class_and_never_makes_the_labels_less_likely(draw, seed, scale):
    logits, targets = draw(np.random.default_rng(seed), 40, 3, scale)
    temperature = fit_temperature(logits, targets)
    assert 0.05 <= temperature <= 20
    after = probabilities(logits, temperature, exclusive=targets.exclusive)
    assert (logits.argmax(1) == after.argmax(1)).all()
    if not targets.exclusive:
        for output in range(3):
            rising = logits[:, output].argsort()
            assert (np.diff(after[rising, output]) >= 0).all()
    assert (
        negative_log_likelihood(logits, targets, temperature) <= negative_log_likelihood(logits, targets, 1.0) + 1e-12
    )


@pytest.mark.parametrize("draw", [_classes, _findings])
def test_the_likelihood_and_the_probabilities_are_those_of_a_loop(draw):
    logits, targets = draw(np.random.default_rng(3), 30, 3, 2.0)
    prior = np.array([0.3, -0.7, 0.1])
    found = probabilities(logits, 1.7, exclusive=targets.exclusive, prior=prior)
    losses = []
    for row, truth, given_ in zip(logits.tolist(), targets.values.tolist(), found.tolist(), strict=True):
        tempered = [value / 1.7 + add for value, add in zip(row, prior, strict=True)]
        if targets.exclusive:
            expected = [math.exp(value) / sum(map(math.exp, tempered)) for value in tempered]
            losses.append(-math.log(expected[truth.index(1.0)]))
        else:
            expected = [1 / (1 + math.exp(-value)) for value in tempered]
            known = [(p, t) for p, t in zip(expected, truth, strict=True) if not math.isnan(t)]
            losses += [-math.log(p if t == 1 else 1 - p) for p, t in known]
        assert given_ == pytest.approx(expected)
    assert negative_log_likelihood(logits, targets, 1.7, prior) == pytest.approx(sum(losses) / len(losses))


def test_nothing_known_leaves_the_temperature_alone():
    targets = Targets(np.full((4, 2), np.nan, np.float32), ["a", "b"], False)
    assert fit_temperature(np.ones((4, 2), np.float32), targets) == 1.0


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_prior_undoes_balanced_training(exclusive):
    """The best that balanced training can do without looking at the image is a constant; undone, it is the share."""
    values = np.array([1.0] * 10 + [0.0] * 90, np.float32)
    targets = classes_of(values.astype(int).tolist()) if exclusive else findings_of([values.tolist()], ["a"])
    weights, grid = balance(targets), np.linspace(-3, 3, 6001)
    if exclusive:  # logits 0 and x
        loss = weights[1] * 0.1 * np.log1p(np.exp(-grid)) + weights[0] * 0.9 * np.log1p(np.exp(grid))
    else:
        loss = weights[0] * 0.1 * np.log1p(np.exp(-grid)) + 0.9 * np.log1p(np.exp(grid))
    best = grid[loss.argmin()]
    logits = np.array([[0.0, best]] if exclusive else [[best]], np.float32)
    share = probabilities(logits, 1.0, exclusive=exclusive, prior=prior_of(targets))[0, -1]
    assert share == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("draw", [_classes, _findings])
def test_probabilities_with_a_prior_are_those_of_a_loop(draw):
    logits, targets = draw(np.random.default_rng(3), 30, 3, 1.0)
    prior = np.array([0.3, -0.7, 0.1])
    scores = probabilities(logits, 1.0, exclusive=targets.exclusive)
    found = with_prior(scores, prior, exclusive=targets.exclusive)
    for row, given_ in zip(scores.tolist(), found.tolist(), strict=True):
        if targets.exclusive:
            odds = [p * math.exp(add) for p, add in zip(row, prior, strict=True)]
            expected = [value / sum(odds) for value in odds]
        else:
            odds = [p / (1 - p) * math.exp(add) for p, add in zip(row, prior, strict=True)]
            expected = [value / (1 + value) for value in odds]
        assert given_ == pytest.approx(expected)
    same = probabilities(logits, 1.0, exclusive=targets.exclusive, prior=prior)
    np.testing.assert_allclose(found, same, rtol=1e-6)


def test_a_class_that_the_labelled_images_lack_keeps_probability_zero():
    labelled = Targets(np.eye(3, dtype=np.float32)[[0] * 9 + [1]], list("abc"), True)
    scores = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1e-20, 1.0, 0.0]], np.float32)
    found = with_prior(scores, prior_of(labelled), exclusive=True)
    assert found[0] == pytest.approx([0.9, 0.1, 0.0])
    assert found[1].tolist() == [1.0, 0.0, 0.0]
    assert found[:, 2].tolist() == [0.0] * 3
    np.testing.assert_allclose(found.sum(1), 1.0)


def test_findings_that_are_certain_stay_so_and_are_finite():
    found = with_prior(np.array([[0.0, 1.0], [1.0, 0.0]], np.float32), np.array([-3.0, 3.0]), exclusive=False)
    np.testing.assert_allclose(found, [[0.0, 1.0], [1.0, 0.0]], atol=1e-9)
    assert np.isfinite(found).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), outputs=st.integers(1, 4), bins=st.integers(1, 12))
def test_reliability_is_that_of_a_loop_over_bins(seed, outputs, bins):
    rng = np.random.default_rng(seed)
    _, targets = _findings(rng, 50, outputs, 1.0)
    scores = rng.integers(0, 21, targets.values.shape) / 20.0  # many on an edge
    found = {(round(b.low, 6), round(b.high, 6)): b for b in reliability(scores, targets, bins)}
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        edges = np.linspace(0, 1, bins + 1)
        inside = [
            (score, truth)
            for score, truth in zip(scores.ravel(), targets.values.ravel(), strict=True)
            if not math.isnan(truth) and (edges[number] < score <= edges[number + 1] or (number == 0 and score == 0))
        ]
        here = found.pop((round(low, 6), round(high, 6)), None)
        assert (here.images if here else 0) == len(inside)
        if here:
            assert here.score == pytest.approx(np.mean([score for score, _ in inside]))
            assert here.positive == pytest.approx(np.mean([truth for _, truth in inside]))
    assert not found


def test_of_two_classes_reliability_looks_at_the_second_alone():
    targets = classes_of(["no", "yes", "yes", "no"])
    scores = np.array([[0.95, 0.05], [0.15, 0.85], [0.95, 0.05], [0.95, 0.05]])
    found = [(b.images, b.score, b.positive) for b in reliability(scores, targets)]
    assert found == [(3, pytest.approx(0.05), pytest.approx(1 / 3)), (1, pytest.approx(0.85), 1.0)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), images=st.integers(8, 120))
def test_a_cutoff_is_the_lowest_that_calls_at_most_one_negative_in_twenty(seed, images):
    rng = np.random.default_rng(seed)
    targets = classes_of(rng.permutation(np.arange(images) % 3 == 0).astype(int).tolist())
    second = rng.integers(0, 40, images) / 40
    scores = np.stack([1 - second, second], 1)
    (cutoff,) = cutoffs(scores, targets)
    negative, positive = second[targets.classes == 0], second[targets.classes == 1]

    def called(limit):
        return sum(score > limit for score in negative)

    assert called(cutoff) <= 0.05 * len(negative)
    assert all(called(lower) > 0.05 * len(negative) for lower in {*negative, *positive} if lower < cutoff)
    draws = draw_patients(np.arange(images), number=1, seed=0)
    sensitivity = METRICS["sensitivity_at_95_specificity"](scores, targets, draws)[0]
    assert np.mean(positive > cutoff) == pytest.approx(sensitivity)


def test_what_is_written_reads_back_as_the_same_number():
    values = np.random.default_rng(0).random((20, 3)) ** 9
    written = as_written(values)
    np.testing.assert_allclose(written, values, rtol=1e-8)
    assert [[float(f"{value:.9g}") for value in row] for row in written.tolist()] == written.tolist()


def test_decisions_are_the_second_of_two_above_its_cutoff_the_likeliest_of_more_and_each_finding():
    two = np.array([[0.7, 0.3], [0.8, 0.2], [0.4, 0.6]])
    assert decide(two, ["no", "yes"], {"yes": 0.25}, exclusive=True) == {"decision": ["yes", "no", "yes"]}
    three = np.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    assert decide(three, ["a", "b", "c"], {}, exclusive=True) == {"decision": ["b", "a"]}
    found = decide(two, ["x", "y"], {"x": 0.75, "y": 0.25}, exclusive=False)
    assert found == {"x decision": ["0", "1", "0"], "y decision": ["1", "0", "1"]}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), patients=st.integers(6, 40), exclusive=st.booleans())
def test_folds_hold_whole_patients_and_what_is_left_shows_everything(seed, patients, exclusive):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(patients), 3))
    values = rng.random((len(owner), 3)) < [0.5, 0.2, 0.6]
    targets = (
        classes_of((values[:, 0] + 2 * (owner % 2)).tolist())
        if exclusive
        else Targets(values.astype(np.float32), list("abc"), False)
    )
    kinds = [targets.values[:, o] == v for o in range(len(targets.names)) for v in ([1] if exclusive else [0, 1])]
    if min(len(set(owner[kind])) for kind in kinds) < 2:
        with pytest.raises(DataError, match="at least 2 patients"):
            patient_folds(targets, owner)
        return
    try:
        fold = patient_folds(targets, owner, seed=seed)
    except DataError:  # every patient who shows something shows all: two patients of a kind in one
        assert min(len(set(owner[kind])) for kind in kinds) < 4
        return
    assert (fold == patient_folds(targets, owner, seed=seed)).all()
    for patient in range(patients):
        assert len(set(fold[owner == patient])) == 1
    assert set(fold) == set(range(max(fold) + 1))
    assert 2 <= max(fold) + 1 <= 5
    for number in set(fold):
        assert all(kind[fold != number].any() for kind in kinds)


def test_too_few_patients_of_a_class_are_counted_but_never_named():
    targets = classes_of(["secret name"] + ["other"] * 9)
    with pytest.raises(
        DataError, match=r"at least 2 patients.*The 10 labelled patients show them 1, 9 times"
    ) as raised:
        patient_folds(targets, np.arange(10))
    assert "secret" not in str(raised.value)
    with pytest.raises(DataError, match="two classes"):
        patient_folds(classes_of(["a"] * 10), np.arange(10))


def test_each_fold_is_calibrated_by_the_others_alone():
    rng = np.random.default_rng(5)
    logits, targets = _classes(rng, 90, 3, 4.0)
    folds = np.arange(90) % 3
    scores, above = OutOfFold(logits, folds).calibrated(targets)
    for fold in range(3):
        here, others = folds == fold, targets.take(folds != fold)
        prior = prior_of(others)
        temperature = fit_temperature(logits[~here], others, prior)
        expected = probabilities(logits, temperature, exclusive=True, prior=prior)
        np.testing.assert_allclose(scores[here], expected[here])
        assert (above[here] == (expected[here] > cutoffs(expected[~here], others))).all()


def test_a_judgement_holds_every_figure_before_and_after_with_its_interval():
    rng = np.random.default_rng(6)
    patients = np.repeat(np.arange(60), 3)
    labels = np.repeat(rng.random(60) < 0.3, 3)
    evidence = 6 * (labels - 0.5) + rng.normal(0, 3, 180)
    logits = np.stack([-evidence, evidence], 1).astype(np.float32)
    targets = classes_of(labels.astype(int).tolist())
    found = OutOfFold(logits, patient_folds(targets, patients))
    judged = judge(found, logits, targets, patients, resamples=100)
    assert set(judged["figures"]) == set(METRICS)
    for name, states in judged["figures"].items():
        for value, low, high in states.values():
            assert low <= high
            assert name == "calibration_error" or low <= value <= high
    assert judged["better_than_guessing"]
    assert judged["figures"]["calibration_error"]["after"][0] < judged["figures"]["calibration_error"]["before"][0]
    assert 0.85 <= judged["at_cutoff"]["1"]["specificity"] <= 1.0
    counts = patients_by_output(targets, patients)["1"]
    assert counts["with"] + counts["without"] == counts["with_or_without"] == 60
    assert counts["share"] == pytest.approx(labels.mean())


def test_a_kept_model_that_says_the_same_of_all_images_calls_none_of_them():
    """Out of fold the scores spread, but the model kept is constant: its cutoff must rise to it."""
    rng = np.random.default_rng(7)
    targets = classes_of((np.arange(60) % 3 == 0).astype(int).tolist())
    logits = rng.normal(0, 1, (60, 2)).astype(np.float32) - [0.0, 8.0]
    constant = np.zeros((60, 2), np.float32)
    judged = judge(
        OutOfFold(logits.astype(np.float32), np.arange(60) % 3), constant, targets, np.arange(60), resamples=20
    )
    prior = np.array(judged["prior"])
    scores = as_written(probabilities(constant, judged["temperature"], exclusive=True, prior=prior))
    assert set(decide(scores, ["0", "1"], judged["cutoffs"], exclusive=True)["decision"]) == {"0"}
