"""Label reduction and convergence speed-up, on curves whose crossings are known by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from fedssl.evaluation.label_reduction import Reduction, label_reduction, smoothed, speed_up

_DECADES = [0.01, 0.1, 1.0]


def _reduction(curve, baseline, fractions=None):
    """Of one curve without draws."""
    return label_reduction(np.array(curve)[:, None], np.array([baseline]), fractions or _DECADES)


def _drawn(baselines, patients=None):
    """A curve from 0 at 1 % to 1 at 100 %, linear in log f: it reaches a baseline b at f* = 100 ** (b - 1)."""
    curve = np.repeat([[0.0], [0.5], [1.0]], len(baselines) + 1, axis=1)
    return label_reduction(curve, np.r_[0.5, baselines], _DECADES, patients)


@pytest.mark.parametrize(
    ("curve", "baseline", "times"),
    [
        ([0.6, 0.8, 0.9], 0.7, 10**1.5),  # half way in log f from 1 % to 10 %
        ([0.6, 0.8, 0.9], 0.8, 10.0),
        ([0.6, 0.8, 0.9], 0.825, 10**0.75),  # a quarter of the way from 10 % to 100 %
        ([0.6, 0.8, 0.9], 0.9, 1.0),
    ],
)
def test_a_crossing_is_interpolated_on_the_logarithm_of_the_fraction(curve, baseline, times):
    result = _reduction(curve, baseline)
    assert result.times == pytest.approx(times)
    assert not result.at_least


@pytest.mark.parametrize("baseline", [0.6, 0.3])
def test_a_curve_that_starts_at_the_baseline_needs_at_most_the_smallest_fraction(baseline):
    result = _reduction([0.6, 0.8, 0.9], baseline, [0.03, 0.1, 1.0])
    assert result.times == result.grid == 1 / 0.03
    assert result.at_least


def test_a_curve_that_stays_below_does_not_reach():
    result = _reduction([0.6, 0.8, 0.9], 0.91)
    assert (result.times, result.grid, result.at_least) == (0.0, 0.0, False)


def test_of_several_crossings_the_first_counts_and_the_grid_waits_for_the_last():
    result = _reduction([0.6, 0.8, 0.6, 0.8, 0.9], 0.7, [0.01, 0.1, 0.2, 0.4, 1.0])
    assert result.times == pytest.approx(10**1.5)
    assert result.grid == pytest.approx(1 / 0.4)
    dips_at_the_end = _reduction([0.6, 0.8, 0.6], 0.7)
    assert dips_at_the_end.times == pytest.approx(10**1.5)
    assert dips_at_the_end.grid == 0.0
    dips_after_the_first_point = _reduction([0.8, 0.6, 0.8], 0.7)
    assert (dips_after_the_first_point.times, dips_after_the_first_point.grid) == (100.0, 1.0)


def test_a_flat_curve_at_the_baseline_reaches_it_everywhere_and_just_below_nowhere():
    assert _reduction([0.7, 0.7, 0.7], 0.7).times == 100.0
    assert _reduction([0.7, 0.7, 0.7], 0.71).times == 0.0


def test_the_grid_is_never_above_the_interpolated_figure_at_a_measured_fraction():
    assert _reduction([0.6, 0.8, 0.9], 0.7).grid == pytest.approx(10.0)
    assert _reduction([0.6, 0.8, 0.9], 0.8).grid == pytest.approx(10.0)


def test_the_order_of_the_fractions_does_not_matter():
    assert _reduction([0.9, 0.6, 0.8], 0.7, [1.0, 0.01, 0.1]).times == pytest.approx(10**1.5)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 20))
@settings(deadline=None)
def test_the_crossing_is_the_first_of_a_fine_walk_along_the_curve(heights, goal):
    fractions = np.geomspace(0.01, 1.0, len(heights)) if len(heights) > 1 else np.array([1.0])
    walk = np.union1d(np.linspace(np.log(fractions[0]), 0.0, 20_001), np.log(fractions))  # peaks are not stepped over
    there = np.interp(walk, np.log(fractions), np.array(heights, float)) >= goal - 1e-9
    result = _reduction([float(height) for height in heights], float(goal), fractions.tolist())
    if not there.any():
        assert result.times == 0.0
    else:
        assert result.times == pytest.approx(np.exp(-walk[there.argmax()]), rel=1e-3)


def test_the_ends_of_the_interval_are_the_draws_at_its_percentiles():
    result = _drawn(np.random.default_rng(0).permutation(np.linspace(0.0, 1.0, 1001)))
    assert result.times == pytest.approx(10.0)
    assert result.low == pytest.approx(100**0.025)
    assert result.high == pytest.approx(100**0.975)
    assert (result.low_at_least, result.high_at_least, result.reached) == (False, False, 1.0)


def test_an_end_of_the_interval_is_reached_or_not_and_never_in_between():
    for missed in range(60):
        result = _drawn(np.r_[np.full(missed, 2.0), np.full(1000 - missed, 0.5)])
        assert result.low == pytest.approx(10.0 if missed <= 24 else 0.0)  # 2.5 % of 999, rounded down
        assert result.high == pytest.approx(10.0)
        assert result.reached == pytest.approx(1 - missed / 1000)


def test_an_end_beyond_the_first_point_is_a_limit():
    some = _drawn(np.r_[np.full(100, -1.0), np.full(900, 0.5)])
    assert (some.high, some.high_at_least, some.low_at_least) == (100.0, True, False)
    every = _drawn(np.full(100, -1.0))
    assert (every.low, every.low_at_least, every.high_at_least) == (100.0, True, True)


def test_the_interval_rests_on_pairs_of_draws_of_curve_and_baseline():
    shift = np.r_[0.0, np.random.default_rng(0).normal(size=500)]
    curve = np.array([[0.6], [0.8], [0.9]]) + shift
    result = label_reduction(curve, 0.7 + shift, _DECADES)
    assert result.low == pytest.approx(10**1.5)
    assert result.high == pytest.approx(10**1.5)


def test_draws_that_are_not_known_are_left_out():
    curve = np.tile([[0.0], [0.5], [1.0]], 5)
    curve[1, 3] = np.nan
    result = label_reduction(curve, np.array([0.5, 0.75, 0.25, 2.0, np.nan]), _DECADES)
    assert result.low == pytest.approx(100**0.25)
    assert result.high == pytest.approx(100**0.75)
    assert result.reached == 1.0


def test_without_an_estimate_or_without_draws_the_figure_is_not_known():
    lost = label_reduction(np.array([[np.nan, 0.0], [0.5, 0.5], [1.0, 1.0]]), np.array([0.5, 0.5]), _DECADES)
    assert math.isnan(lost.times)
    assert math.isnan(lost.grid)
    assert lost.text() == "not known (95 % interval: 10 times fewer)"
    assert _reduction([0.6, 0.8, 0.9], 0.8).text() == "10 times fewer labels (95 % interval: not known)"


def _said(times, low, high, *limits):
    flags = {name: name in limits for name in ("at_least", "low_at_least", "high_at_least")}
    return Reduction(times, low, high, 1.0, reached=1.0, **flags).text()


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ((4.23, 1.94, 1 / 0.03, "high_at_least"), "4.2 times fewer labels (95 % interval 1.9 to at least 33)"),
        ((4.23, 0.0, 7.96), "4.2 times fewer labels (95 % interval: not reached to 8 times fewer)"),
        ((4.23, 1.0, 123.4), "4.2 times fewer labels (95 % interval: as many to 123 times fewer)"),
        ((4.23, 0.0, 0.0), "4.2 times fewer labels (95 % interval: not reached)"),
        (
            (100.0, 2.0, 100.0, "at_least", "high_at_least"),
            "at least 100 times fewer labels (95 % interval 2 to at least 100)",
        ),
        (
            (100.0, 100.0, 100.0, "at_least", "low_at_least", "high_at_least"),
            "at least 100 times fewer labels (95 % interval: at least 100 times fewer)",
        ),
        ((0.0, 0.0, 2.6), "not reached even with all labels (95 % interval: not reached to 2.6 times fewer)"),
        ((0.0, 1.5, 2.6), "not reached even with all labels (95 % interval: 1.5 to 2.6 times fewer)"),
        ((0.0, 0.0, 0.0), "not reached even with all labels (95 % interval: not reached)"),
        ((1.0, 0.0, 2.6), "as many labels (95 % interval: not reached to 2.6 times fewer)"),
        ((1.0, 1.0, 2.6), "as many labels (95 % interval: as many to 2.6 times fewer)"),
        ((1.0, 0.0, 1.0), "as many labels (95 % interval: not reached to as many)"),
        ((1.0, 1.0, 1.0, "at_least", "low_at_least", "high_at_least"),
         "at most as many labels (95 % interval: at most as many)"),
        ((math.nan, 1.2, 2.6), "not known (95 % interval: 1.2 to 2.6 times fewer)"),
        ((9.96, math.nan, math.nan), "10 times fewer labels (95 % interval: not known)"),
        ((1234.5, 12.34, 98765.0), "1230 times fewer labels (95 % interval 12 to 98800)"),
        ((10.9, 3.19, 10.9, "at_least", "high_at_least"),
         "at least 10 times fewer labels (95 % interval 3.2 to at least 10)"),
    ],
)  # fmt: skip
def test_a_reduction_is_said_in_words_with_few_digits_and_limits_rounded_down(given_, text):
    assert _said(*given_) == text


def test_a_limit_that_is_a_whole_number_but_for_rounding_keeps_it():
    for patients in range(1, 200):
        for smallest in range(1, patients):
            whole, rest = divmod(patients, smallest)
            if not rest and 1 < whole < 1000:
                times = 1 / (smallest / patients)
                assert _said(times, times, times, "at_least").startswith(f"at least {whole} times")


def test_the_interval_of_few_patients_is_widened_and_its_ends_are_draws():
    draws = np.random.default_rng(0).permutation(np.linspace(0.0, 1.0, 1001))
    many, some, one = (_drawn(draws, patients) for patients in (None, 10, 1))
    assert (many.low, many.high) == pytest.approx((100**0.025, 100**0.975))
    assert (one.low, one.high) == pytest.approx((1.0, 100.0))
    tail = norm.cdf(-math.sqrt(10 / 9) * student.ppf(0.975, 9))
    outside = int(tail * 1000)  # rounded outwards
    assert 1 < outside < 25
    assert (some.low, some.high) == pytest.approx((100 ** (outside / 1000), 100 ** (1 - outside / 1000)))


def test_true_shares_that_come_out_equal_are_compared_too():
    result = _reduction([0.6, 0.65, 0.8, 0.9], 0.8, [6 / 63, 6 / 63, 19 / 63, 1.0])
    assert result.times == pytest.approx(63 / 19)
    assert _reduction([0.6, 0.65, 0.9], 0.65, [6 / 63, 6 / 63, 1.0]).times == pytest.approx(63 / 6)


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_smoothing_is_the_mean_of_the_neighbours_that_are_there(window, length):
    values = np.random.default_rng(length).random(length)
    for place, smooth in enumerate(smoothed(values, window)):
        near = [values[other] for other in range(length) if abs(other - place) <= window // 2]
        assert smooth == pytest.approx(sum(near) / len(near))


def test_three_checks_are_smoothed_by_hand():
    np.testing.assert_allclose(smoothed(np.array([0.0, 3.0, 6.0, 0.0])), [1.5, 3.0, 3.0, 3.0])


def _rising(tau, images, height=1.0):
    return height * (1 - np.exp(-images / tau))


@pytest.mark.parametrize(("ratio", "percent"), [(0.25, 75.0), (0.5, 50.0), (1.0, 0.0)])
def test_a_curve_that_rises_faster_by_a_factor_is_faster_by_that_factor(ratio, percent):
    images = np.linspace(0, 1000, 2001)
    result = speed_up(_rising(200 * ratio, images)[None], _rising(200, images)[None], images)
    assert result.percent == pytest.approx(percent, abs=0.2)
    assert result.reached == 1.0


def test_the_time_is_interpolated_between_checks():
    scratch = np.array([[0.0, 0.0, 0.0, 0.6, 0.6, 0.6]])  # smoothed: 0 0 .2 .4 .6 .6, there after 400 images
    curves = np.array([[0.0, 0.6, 1.2, 1.2, 1.2, 1.2]])  # smoothed: .3 .6 ...
    images = np.arange(0, 600, 100)
    assert speed_up(curves, scratch, images).percent == pytest.approx(75.0)
    higher = np.array([[0.0, 0.9, 1.2, 1.2, 1.2, 1.2]])  # smoothed: .45 .7, there at .6 of the first step
    assert speed_up(higher, scratch, images).percent == pytest.approx(85.0)


def test_a_slower_curve_has_a_negative_speed_up():
    scratch = np.array([[0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])  # smoothed: best after 200 images
    curves = np.array([[0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]])  # after 400
    assert speed_up(curves, scratch, np.arange(0, 700, 100)).percent == pytest.approx(-100.0)


def test_a_curve_that_stays_below_has_no_speed_up():
    images = np.arange(0, 1000, 100)
    result = speed_up(_rising(100, images, height=0.8)[None], _rising(200, images)[None], images)
    assert np.isnan([result.percent, result.low, result.high]).all()
    assert result.reached == 0.0
    assert result.text() == "not reached [not reached, not reached], reached by 0% of the seeds"


def test_a_curve_that_starts_above_is_there_at_the_first_check():
    images = np.array([0, 100, 200, 300])
    scratch = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert speed_up(scratch + 1, scratch, images).percent == 100.0
    assert speed_up(scratch + 1, scratch, images + 100).percent == pytest.approx(75.0)  # 100 of 400


def test_a_scratch_run_that_is_best_untrained_cannot_be_overtaken():
    images = np.array([0, 100, 200, 300])
    scratch = np.array([[0.5, 0.4, 0.3, 0.2]])
    assert speed_up(scratch, scratch, images).percent == 0.0
    assert math.isnan(speed_up(scratch[:, ::-1], scratch, images).percent)


@pytest.mark.parametrize("height", [0.7, 0.1, 1 / 3])
def test_a_plateau_is_reached_where_it_begins(height):
    scratch = np.r_[0.0, np.full(9, height)][None]  # smoothed: there at the third check
    curves = np.full((1, 10), height)
    curves[0, :3] = 0.0  # at the fifth
    assert speed_up(curves, scratch, np.arange(10)).percent == pytest.approx(-100.0)


def test_the_interval_comes_from_draws_of_pairs_of_seeds():
    images = np.linspace(0, 1000, 401)
    taus = np.array([100.0, 150.0, 200.0, 250.0, 300.0])
    scratch = np.stack([_rising(tau, images) for tau in taus])
    paired = speed_up(np.stack([_rising(tau / 4, images) for tau in taus]), scratch, images)
    assert paired.low == pytest.approx(75.0, abs=0.3)  # in every pair it is four times as fast
    assert paired.high == pytest.approx(75.0, abs=0.3)
    mixed = speed_up(
        np.stack([_rising(tau, images) for tau in (20, 40, 60, 80, 100)]), np.stack([scratch[2]] * 5), images
    )
    assert mixed.low < mixed.percent - 5
    assert mixed.high > mixed.percent + 5
    assert 50.0 <= mixed.low < mixed.high <= 90.0  # of the slowest and the fastest seed alone


def test_seeds_that_do_not_reach_lower_the_interval_and_the_share():
    images = np.linspace(0, 1000, 101)
    scratch = np.stack([_rising(200, images)] * 4)
    curves = np.stack([_rising(50, images, height) for height in (1.4, 1.4, 1.4, 0.5)])
    result = speed_up(curves, scratch, images)
    assert repr(speed_up(curves, scratch, images)) == repr(result)
    assert result.percent > 0
    assert math.isnan(result.low)  # two of the seed that fails are enough: a quarter of the draws
    assert result.high > result.percent
    assert result.reached == 0.75
    assert result.text().startswith(f"speed-up of {result.percent:.1f} % [not reached, {result.high:.1f}]")
    assert result.text().endswith("reached by 75% of the seeds")
