"""P-values, DeLong's and Obuchowski's covariance of areas, and how often the patient bootstrap covers the truth."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from fedssl.evaluation.metrics import auroc, draw_patients
from fedssl.evaluation.statistics import delong, difference_interval, holm, interval, p_value
from fedssl.evaluation.targets import Targets

# DeLong, DeLong & Clarke-Pearson 1988: albumin, total protein, K-G score and outcome of 43 patients with ovarian
# cancer, as printed in SAS/STAT's example "Comparing Receiver Operating Characteristic Curves" of PROC LOGISTIC.
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def _ovarian():
    table = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4)
    albumin, protein, score, outcome = table.T
    return np.stack([albumin, 10 - score, protein]), outcome == 1


def _wins(high, low):
    return 1.0 if high > low else 0.5 if high == low else 0.0


def _by_loops(scores, positive, patients):
    """Obuchowski 1997 with loops over patients and pairs of images."""
    names = sorted(set(patients))
    tests, wins = range(len(scores)), positive.sum() * (~positive).sum()
    yes, no = np.flatnonzero(positive), np.flatnonzero(~positive)
    areas = [sum(_wins(s[i], s[j]) for i in yes for j in no) / wins for s in scores]
    over, under = np.zeros((2, len(scores), len(names)))
    for t in tests:
        for k, name in enumerate(names):
            for i in yes[patients[yes] == name]:
                over[t, k] += np.mean([_wins(scores[t][i], scores[t][j]) for j in no]) - areas[t]
            for j in no[patients[no] == name]:
                under[t, k] += np.mean([_wins(scores[t][i], scores[t][j]) for i in yes]) - areas[t]
    clusters, with_yes, with_no = len(names), len(set(patients[yes])), len(set(patients[no]))
    m, n = len(yes), len(no)
    covariance = np.zeros((len(scores), len(scores)))
    for a in tests:
        for b in tests:
            s10 = with_yes / ((with_yes - 1) * m) * sum(over[a] * over[b])
            s01 = with_no / ((with_no - 1) * n) * sum(under[a] * under[b])
            s11 = [clusters / (clusters - 1) * sum(over[x] * under[y]) for x, y in ((a, b), (b, a))]
            covariance[a, b] = s10 / m + s01 / n + sum(s11) / (m * n)
    return areas, covariance


def _study(rng, patients, images, *, shift, effect=1.0, noise=1.0, tests=1, truth_of="patients"):
    """Normal scores of several tests that share the patients; the area is Phi(shift / sqrt(2 (effect^2 + noise^2)))."""
    owner = np.repeat(np.arange(patients), images)
    truth = {
        "patients": rng.random(patients)[owner] < 0.5,
        "images": rng.random(len(owner)) < 0.5,
        "sides": np.arange(len(owner)) % 2 == 0,  # one of each, as of two breasts
    }[truth_of]
    common = effect * rng.normal(size=patients)[owner]
    return shift * truth + common + noise * rng.normal(size=(tests, len(owner))), truth, owner


def test_the_ovarian_cancer_example_gives_the_published_areas_errors_and_intervals():
    """Printed by SAS with four digits; popind = 1 is the event when high values are good signs."""
    scores, positive = _ovarian()
    assert (scores.shape[1], positive.sum()) == (43, 31)
    areas, covariance = delong(scores, positive)
    errors = np.sqrt(np.diag(covariance))
    assert areas.round(4).tolist() == [0.7366, 0.7258, 0.6478]
    assert errors.round(4).tolist() == [0.0927, 0.1028, 0.1000]
    assert (areas - 1.959964 * errors).round(4).tolist() == [0.5549, 0.5243, 0.4518]
    assert (areas + 1.959964 * errors).round(4).tolist() == [0.9182, 0.9273, 0.8439]


def test_the_ovarian_cancer_example_gives_the_published_contrast():
    areas, covariance = delong(*_ovarian())
    difference, low, high, p = difference_interval(areas, covariance, first=2, second=1)
    assert np.round([difference, (high - low) / 2 / 1.959964], 4).tolist() == [-0.0780, 0.1046]
    assert np.round([low, high], 4).tolist() == [-0.2830, 0.1271]
    assert p == pytest.approx(0.4561, abs=1e-4)
    contrast = np.array([[1.0, -1, 0], [0, -1, 1]])
    chi_square = contrast @ areas @ np.linalg.solve(contrast @ covariance @ contrast.T, contrast @ areas)
    assert chi_square == pytest.approx(2.5340, abs=1e-4)


def test_one_image_a_patient_is_delong_and_needs_no_patients():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scores, positive = rng.integers(6, size=(3, 25)).astype(float), rng.random(25) < 0.4
        areas, covariance = delong(scores, positive)
        expected = _by_loops(scores, positive, np.arange(25))
        np.testing.assert_allclose(areas, expected[0], atol=1e-12)
        np.testing.assert_allclose(areas, [roc_auc_score(positive, row) for row in scores], atol=1e-12)
        np.testing.assert_allclose(covariance, expected[1], atol=1e-12)
        wins = [[[_wins(x, y) for y in row[~positive]] for x in row[positive]] for row in scores]
        plain = np.cov(np.mean(wins, 2)) / positive.sum() + np.cov(np.mean(wins, 1)) / (~positive).sum()
        np.testing.assert_allclose(covariance, plain, atol=1e-12)
        np.testing.assert_array_equal(delong(scores, positive, rng.permutation(25))[1].round(12), covariance.round(12))


@pytest.mark.parametrize("truth_of", ["patients", "images", "sides"])
def test_several_images_a_patient_are_obuchowskis_loops(truth_of):
    rng = np.random.default_rng(1)
    for _ in range(10):
        scores, positive, owner = _study(rng, 9, 4, shift=1.0, tests=2, truth_of=truth_of)
        names = np.array(list("qwertyuio"))[owner]
        areas, covariance = delong(scores.round(1), positive, names)
        expected = _by_loops(scores.round(1), positive, names)
        np.testing.assert_allclose(areas, expected[0], atol=1e-12)
        np.testing.assert_allclose(covariance, expected[1], atol=1e-12)


@pytest.mark.parametrize(("truth_of", "images"), [("patients", 4), ("images", 4), ("sides", 2)])
def test_the_covariance_of_areas_is_the_spread_over_many_studies(truth_of, images):
    """Within an eighth of the variance; images taken for patients spread too little, or too much with one of each."""
    rng = np.random.default_rng(2)
    areas, clustered, single = [], [], []
    for _ in range(2000):
        scores, positive, owner = _study(rng, 60, images, shift=1.0, tests=2, truth_of=truth_of)
        area, covariance = delong(scores, positive, owner)
        areas.append(area)
        clustered.append(covariance)
        single.append(delong(scores, positive)[1])
    spread = np.cov(np.transpose(areas))
    np.testing.assert_allclose(np.mean(clustered, 0), spread, atol=spread[0, 0] / 8)
    if truth_of == "patients":
        assert (np.mean(single, 0) < 0.75 * spread).all()
    if truth_of == "sides":
        assert (np.mean(single, 0) > 1.25 * spread).all()


def test_areas_of_too_few_patients_have_no_covariance():
    scores = np.array([[0.1, 0.2, 0.3, 0.4]])
    areas, covariance = delong(scores, np.array([False, False, True, True]), np.array([0, 1, 2, 2]))
    assert areas.tolist() == [1.0]
    assert np.isnan(covariance).all()
    areas, covariance = delong(scores, np.zeros(4, dtype=bool))
    assert np.isnan(areas).all()
    assert np.isnan(covariance).all()


def test_tests_that_order_images_alike_do_not_differ():
    scores, positive = _ovarian()
    areas, covariance = delong(np.stack([scores[0], np.exp(scores[0])]), positive)
    difference, low, high, p = difference_interval(areas, covariance)
    assert (difference, p) == (0.0, 1.0)
    assert (low, high) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_the_p_value_is_twice_the_share_of_draws_beyond_zero_by_hand():
    draws = np.r_[0.3, np.linspace(0.1, 1, 97), -0.1, -0.2]  # two of 99 draws are not above zero
    assert p_value(draws) == pytest.approx(2 * 3 / 100)
    assert p_value(-draws) == pytest.approx(2 * 3 / 100)
    assert p_value(np.r_[draws, np.nan, np.nan]) == p_value(draws)
    assert p_value(np.r_[0.3, np.ones(999)]) == pytest.approx(2 / 1000)


def test_no_difference_at_all_has_the_p_value_one():
    assert p_value(np.zeros(101)) == 1.0
    assert p_value(np.array([0.1, np.nan])) == 1.0


def test_holm_by_hand():
    """.01 x 4, .02 x 3, .03 x 2, .04 x 1 raised to the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_loop_rejects():
    rng = np.random.default_rng(0)
    for _ in range(100):
        p = (rng.random(5) * 0.05).tolist()
        rejected = set()
        for step, position in enumerate(sorted(range(5), key=lambda i: p[i])):
            if p[position] > 0.05 / (5 - step):
                break
            rejected.add(position)
        assert rejected == {position for position, value in enumerate(holm(p)) if value <= 0.05}


def test_an_interval_is_the_percentiles_of_many_patients_and_wider_for_few():
    values = np.r_[0.5, np.linspace(0.0, 1.0, 10_001)]
    assert interval(values) == pytest.approx((0.5, 0.025, 0.975))
    assert interval(values, 1_000_000) == pytest.approx((0.5, 0.025, 0.975), abs=1e-5)
    tail = norm.cdf(-np.sqrt(10 / 9) * student.ppf(0.975, 9))  # Hesterberg 2015, by another library
    assert interval(values, 10) == pytest.approx((0.5, tail, 1 - tail), abs=1e-6)
    assert interval(values, 1) == pytest.approx((0.5, 0.0, 1.0))


def test_an_interval_leaves_out_draws_that_say_nothing():
    assert interval(np.array([0.5, 0.1, np.nan, 0.9])) == pytest.approx((0.5, 0.12, 0.88))
    assert np.isnan(interval(np.array([0.5, np.nan]))[1:]).all()


def _coverage(studies, number, *, single_images=False):
    rng, hits, truth = np.random.default_rng(1), 0, norm.cdf(1.0 / 2)
    for study in range(studies):
        (scores,), positive, owner = _study(rng, 100, 3, shift=1.0)
        targets = Targets(np.stack([~positive, positive], 1).astype(float), ["no", "yes"], exclusive=True)
        draws = draw_patients(np.arange(300) if single_images else owner, number=number, seed=study)
        _, low, high = interval(auroc(np.stack([-scores, scores], 1), targets, draws), len(draws.counts))
        hits += low <= truth <= high
    return hits / studies


def test_the_interval_of_drawn_patients_covers_the_truth_and_that_of_images_drawn_singly_does_not():
    assert _coverage(100, 200) == pytest.approx(0.95, abs=0.05)
    assert _coverage(100, 200, single_images=True) < 0.88


@pytest.mark.slow
def test_the_interval_of_drawn_patients_covers_the_truth_in_95_percent_of_two_thousand_studies():
    assert _coverage(2000, 1000) == pytest.approx(0.95, abs=0.015)
