"""Figures of merit, against scikit-learn on rows repeated as often as their patient is drawn, and against loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from fedssl.evaluation import metrics
from fedssl.evaluation.metrics import (
    METRICS,
    auprc,
    auroc,
    balanced_accuracy,
    calibration_error,
    draw_patients,
    sensitivity_at_95_specificity,
)
from fedssl.evaluation.targets import Targets, classes_of, findings_of


def _probabilities(rng, images, classes, *, tied):
    scores = rng.dirichlet(np.ones(classes), images)
    return scores.round(1) if tied else scores


def _study(seed, *, classes, tied, images=60, patients=12):
    """Scores, classes and draws; every class has images."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(classes, size=images - classes)]
    draws = draw_patients(rng.integers(patients, size=images), number=8, seed=seed)
    return _probabilities(rng, images, classes, tied=tied), classes_of(labels.tolist()), draws


def _findings(seed, *, tied=True, images=60):
    """Three findings, a fifth of the values not known."""
    rng = np.random.default_rng(seed)
    values = rng.choice([0.0, 1.0, np.nan], p=[0.5, 0.3, 0.2], size=(images, 3))
    values[:2] = [[0.0], [1.0]]
    draws = draw_patients(rng.integers(12, size=images), number=8, seed=seed)
    scores = rng.random((images, 3))
    return scores.round(1) if tied else scores, Targets(values, ["a", "b", "c"], exclusive=False), draws


def _repeated(draws, column):
    """Rows of the images, each as often as its patient is drawn."""
    return np.repeat(np.arange(len(draws.owner)), draws.counts[draws.owner, column].astype(int))


def _expected(figure, scores, targets, draws):
    """The figure of each draw: of each scored output on repeated rows, then the mean; NaN where a side is missing."""
    expected = []
    for column in range(draws.counts.shape[1]):
        rows, each = _repeated(draws, column), []
        for output in targets.scored:
            truth, score = targets.values[rows, output], scores[rows, output]
            truth, score = truth[~np.isnan(truth)], score[~np.isnan(truth)]
            each.append(figure(truth, score) if set(truth) == {0.0, 1.0} else np.nan)
        expected.append(np.mean(each))
    return expected


def _sensitivity(truth, score):
    best = 0.0
    for threshold in np.unique(score):
        called = score >= threshold
        if np.mean(~called[truth == 0]) >= 0.95 - 1e-9:
            best = max(best, np.mean(called[truth == 1]))
    return best


def _halfway(truth, score):
    return (np.mean(score[truth == 1] >= 0.5) + np.mean(score[truth == 0] < 0.5)) / 2


def _calibration(truth, score):
    total = 0.0
    for number in range(15):
        inside = (score > number / 15) & (score <= (number + 1) / 15)
        if number == 0:
            inside |= score == 0
        if inside.any():
            total += inside.mean() * abs(truth[inside].mean() - score[inside].mean())
    return total


RANKED = {
    auroc: roc_auc_score,
    auprc: average_precision_score,
    sensitivity_at_95_specificity: _sensitivity,
}
each_ranked = pytest.mark.parametrize(("metric", "figure"), RANKED.items(), ids=lambda f: f.__name__)


@each_ranked
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_figure_of_ranks_equals_the_plain_one_on_repeated_rows_of_classes(metric, figure, tied, classes):
    for seed in range(10):
        study = _study(seed, classes=classes, tied=tied)
        np.testing.assert_allclose(metric(*study), _expected(figure, *study), atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "figure"), [*RANKED.items(), (balanced_accuracy, _halfway), (calibration_error, _calibration)]
)
def test_a_figure_equals_the_plain_one_on_repeated_rows_of_findings_where_they_are_known(metric, figure):
    for seed in range(10):
        study = _findings(seed, tied=seed % 2 == 0)
        np.testing.assert_allclose(metric(*study), _expected(figure, *study), atol=1e-12)


@each_ranked
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(0, 1000),
)
def test_a_figure_of_ranks_equals_the_plain_one_on_any_few_images(metric, figure, images, seed):
    scores = np.array([score for score, _, _ in images]) / 4
    targets = Targets(np.array([[1.0 - yes, 1.0 * yes] for _, yes, _ in images]), ["no", "yes"], exclusive=True)
    draws = draw_patients(np.array([patient for _, _, patient in images]), number=5, seed=seed)
    study = np.stack([1 - scores, scores], 1), targets, draws
    np.testing.assert_allclose(metric(*study), _expected(figure, *study), atol=1e-12)


def test_weights_give_what_scikit_learn_gives_with_weights():
    scores, targets, draws = _study(0, classes=2, tied=True)
    for column, weights in enumerate(draws.counts[draws.owner].T):
        given = {"y_true": targets.values[:, 1], "y_score": scores[:, 1], "sample_weight": weights}
        assert auroc(scores, targets, draws)[column] == pytest.approx(roc_auc_score(**given))
        assert auprc(scores, targets, draws)[column] == pytest.approx(average_precision_score(**given))


@pytest.mark.parametrize("classes", [2, 3])
def test_balanced_accuracy_is_the_macro_recall(classes):
    for seed in range(20):
        scores, targets, draws = _study(seed, classes=classes, tied=False)
        values = balanced_accuracy(scores, targets, draws)
        for column, value in enumerate(values):
            rows = _repeated(draws, column)
            truth, predicted = targets.classes[rows], scores[rows].argmax(1)
            if len(set(truth)) < classes:
                assert np.isnan(value)
            else:
                recall = recall_score(truth, predicted, average="macro", labels=range(classes))
                assert value == pytest.approx(recall)


def test_calibration_of_two_classes_bins_the_probability_of_the_second():
    for seed in range(20):
        scores, targets, draws = _study(seed, classes=2, tied=seed % 2 == 0)
        expected = [
            _calibration(targets.values[rows, 1], scores[rows, 1])
            for rows in (_repeated(draws, column) for column in range(9))
        ]
        np.testing.assert_allclose(calibration_error(scores, targets, draws), expected, atol=1e-12)


def test_calibration_of_many_classes_bins_the_largest_probability():
    for seed in range(20):
        scores, targets, draws = _study(seed, classes=4, tied=False)
        right = scores.argmax(1) == targets.classes
        expected = [
            _calibration(right[rows], scores.max(1)[rows]) for rows in (_repeated(draws, column) for column in range(9))
        ]
        np.testing.assert_allclose(calibration_error(scores, targets, draws), expected, atol=1e-12)


def test_calibration_by_hand():
    """Two bins of one image each: .5 x |1 - .9| + .5 x |0 - .3|; 0 and 1 lie in the outer bins, .2 below its edge."""
    targets, draws = classes_of([1, 0]), draw_patients(np.arange(2), number=0, seed=0)
    assert calibration_error(np.array([[0.1, 0.9], [0.7, 0.3]]), targets, draws) == pytest.approx([0.2])
    assert calibration_error(np.array([[0.0, 1.0], [1.0, 0.0]]), targets, draws) == pytest.approx([0.0])
    assert calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), targets, draws) == pytest.approx([1.0])
    assert calibration_error(np.array([[0.8, 0.2], [0.85, 0.15]]), targets, draws) == pytest.approx([0.325])
    assert calibration_error(np.array([[0.75, 0.25], [0.8, 0.2]]), targets, draws) == pytest.approx([0.475])


def test_a_specificity_of_exactly_95_percent_is_enough():
    """19 of 20 negatives lie below the threshold that finds both positives."""
    truth = np.r_[np.zeros(20), np.ones(2)]
    score = np.r_[np.zeros(19), 0.5, 0.5, 0.5]
    draws = draw_patients(np.arange(22), number=0, seed=0)
    study = np.stack([1 - score, score], 1), classes_of(truth.tolist()), draws
    assert sensitivity_at_95_specificity(*study) == pytest.approx([1.0])
    score[18] = 0.5
    assert sensitivity_at_95_specificity(np.stack([1 - score, score], 1), *study[1:]) == pytest.approx([0.0])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_perfect_and_useless_scores_get_the_best_and_the_chance_value(metric):
    truth = np.arange(40) % 2
    draws = draw_patients(np.arange(40), number=0, seed=0)
    perfect = np.eye(2)[truth]
    best, chance = {
        auroc: (1, 0.5),
        auprc: (1, 0.5),
        balanced_accuracy: (1, 0.5),
        sensitivity_at_95_specificity: (1, 0),
        calibration_error: (0, 0),
    }[metric]
    assert metric(perfect, classes_of(truth.tolist()), draws) == pytest.approx([best])
    assert metric(np.full((40, 2), 0.5), classes_of(truth.tolist()), draws) == pytest.approx([chance])


def test_the_mean_over_many_classes_leaves_out_classes_that_no_test_image_has():
    scores, targets, draws = _study(3, classes=3, tied=False)
    scores = np.concatenate([scores, np.zeros((60, 1))], axis=1)
    wider = Targets(np.pad(targets.values, ((0, 0), (0, 1))), [*targets.names, "none"], exclusive=True)
    for metric in METRICS.values():
        np.testing.assert_array_equal(metric(scores, wider, draws), metric(scores[:, :3], targets, draws))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_draw_without_one_class_has_no_value_and_neither_have_findings_that_are_nowhere_known(metric):
    patients = np.array(["a", "a", "b", "b"])
    scores = np.array([[0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.9, 0.1]])
    draws = draw_patients(patients, number=50, seed=0)
    values = metric(scores, classes_of([1, 1, 0, 0]), draws)
    one_sided = (draws.counts == 0).any(0)
    assert 0 < one_sided.sum() < 50
    assert np.isnan(values[one_sided]).all() == (metric is not calibration_error)
    assert not np.isnan(values[~one_sided]).any()
    one_class = Targets(np.array([[0.0, 1.0]] * 4), ["no", "yes"], exclusive=True)
    assert np.isnan(metric(scores, one_class, draws)).all() == (metric is not calibration_error)
    unknown = findings_of([[None] * 4, [None] * 4], ["a", "b"])
    assert np.isnan(metric(scores, unknown, draws)).all()


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("only", [1.0, 0.0, np.nan])
def test_a_finding_that_shows_one_value_among_the_test_images_is_left_out_of_the_mean(metric, only):
    scores, targets, draws = _findings(4)
    some = Targets(targets.values.copy(), ["a", "b", "c"], exclusive=False)
    some.values[:, 1] = np.where(np.isnan(some.values[:, 1]), np.nan, only)
    others = Targets(targets.values[:, [0, 2]], ["a", "c"], exclusive=False)
    expected = metric(scores[:, [0, 2]], others, draws)
    assert not np.isnan(expected[0])
    np.testing.assert_array_equal(metric(scores, some, draws), expected)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_of_three_classes_of_which_all_images_show_the_same_only_calibration_is_known(metric):
    scores, _, draws = _study(3, classes=3, tied=False)
    same = Targets(np.eye(3)[np.ones(60, int)], list("abc"), exclusive=True)
    assert np.isnan(metric(scores, same, draws)).all() == (metric is not calibration_error)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_draws_taken_in_small_parts_give_the_same_values(metric, monkeypatch):
    scores, targets, _ = _study(5, classes=3, tied=True)
    draws = draw_patients(np.arange(60) // 5, number=100, seed=0)
    whole = metric(scores, targets, draws)
    monkeypatch.setattr(metrics, "_CHUNK", 1)
    np.testing.assert_allclose(metric(scores, targets, draws), whole, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_scores_of_single_precision_give_the_same_values(metric):
    scores, targets, draws = _study(6, classes=3, tied=False)
    single = metric(scores.astype(np.float32), targets, draws)
    np.testing.assert_allclose(single, metric(scores, targets, draws), atol=1e-6)


def test_the_sample_itself_comes_first_then_draws_of_as_many_whole_patients():
    patients = np.repeat(["b", "a", "d", "c"], [1, 5, 2, 4])
    draws = draw_patients(patients, number=200, seed=0)
    assert draws.counts.shape == (4, 201)
    assert (draws.counts[:, 0] == 1).all()
    assert (draws.counts.sum(0) == 4).all()
    assert len(set(draws.counts[0, 1:])) > 2
    for patient in "abcd":
        assert len(set(draws.owner[patients == patient])) == 1
    assert len(set(draws.owner)) == 4


def test_equal_patients_and_seed_give_equal_draws_in_any_order_of_images():
    patients = np.repeat(["b", "a", "d", "c"], [1, 5, 2, 4])
    draws, again = draw_patients(patients, number=20, seed=3), draw_patients(patients[::-1], number=20, seed=3)
    np.testing.assert_array_equal(draws.counts[draws.owner], again.counts[again.owner][::-1])
    assert (draw_patients(patients, number=20, seed=4).counts != draws.counts).any()
