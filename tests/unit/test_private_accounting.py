"""Test 3 of the design: what steps cost, against another accountant and exact curves; and the noise that pays (test 7).

The accounting is not random. The noise comes from the operating system, so its bounds are random: each is at least 5.5
standard errors wide (4e-8) or at a p-value of 1e-7. The 30 of them fail together less than once in 10^5 runs.
"""

import itertools
import math
import os
import random

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq
from scipy.stats import norm

from fedssl.errors import ConfigError, PrivacyError
from fedssl.privacy import accounting
from fedssl.privacy.accounting import Spend, epsilon_of, joint_sigma, merged, planned_sigma, shared_out
from fedssl.privacy.mechanism import Mechanism, released
from fedssl.privacy.randomness import coins, seed, some_of, standard_normal

DELTA = 1e-5
TOO_LOW, TOO_HIGH = 0.003, 0.02  # PRV gives an upper bound, .01 above its estimate; PLD rounds up, too


def by_pld(spends, delta=DELTA, interval=1e-3):
    """Add/remove, by Google's accountant: losses rounded up to a grid and convolved."""
    total = None
    for spend in spends:
        one = pld.from_gaussian_mechanism(
            spend.sigma, value_discretization_interval=interval, sampling_prob=spend.rate
        ).self_compose(spend.steps)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


def exact(sigma, steps, delta=DELTA):
    """Epsilon of Gaussian releases without sampling (Balle & Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / sigma
    return brentq(
        lambda epsilon: (
            norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta
        ),
        0.0,
        100.0,
    )


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.0, 0.01, 1000), (2.0, 0.05, 200), (0.8, 0.004, 300), (5.0, 0.5, 100), (1.5, 0.2, 1), (20.0, 0.9, 50),
     (3.0, 0.02, 3000)],
)  # fmt: skip
def test_epsilon_is_that_of_another_accountant(sigma, rate, steps):
    spend = Spend(sigma, rate, steps)
    found, other = epsilon_of([spend], DELTA), by_pld([spend])
    assert other - TOO_LOW <= found <= other + TOO_HIGH


@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-8])
def test_epsilon_is_that_of_another_accountant_at_other_deltas(delta):
    spend = Spend(1.2, 0.02, 400)
    assert by_pld([spend], delta) - TOO_LOW <= epsilon_of([spend], delta) <= by_pld([spend], delta) + TOO_HIGH


@pytest.mark.parametrize(("sigma", "steps"), [(4.0, 10), (10.0, 40)])
def test_drawn_nearly_always_a_patient_has_the_exact_epsilon_of_a_gaussian(sigma, steps):
    found = epsilon_of([Spend(sigma, 1.0 - 1e-9, steps)], DELTA)
    assert exact(sigma, steps) <= found <= exact(sigma, steps) + TOO_HIGH


def test_unequal_steps_together_are_those_of_another_accountant():
    spends = [Spend(1.0, 0.01, 300), Spend(2.0, 0.05, 100), Spend(6.0, 0.4, 20)]
    found, other = epsilon_of(spends, DELTA), by_pld(spends)
    assert other - TOO_LOW <= found <= other + TOO_HIGH
    assert found > max(epsilon_of([spend], DELTA) for spend in spends)


# ---------------------------------------------------------------- several releases of one sample


def test_two_releases_of_one_sample_cost_more_than_two_entries():
    """The published case: noise 1 and 1, rate .01, 1,000 steps."""
    joint = epsilon_of([Spend(joint_sigma([1.0, 1.0]), 0.01, 1000)], DELTA)
    entries = epsilon_of([Spend(1.0, 0.01, 1000), Spend(1.0, 0.01, 1000)], DELTA)
    assert joint == pytest.approx(4.48, abs=0.02)
    assert entries == pytest.approx(2.59, abs=0.02)


@pytest.mark.parametrize(("first", "second", "rate", "steps"), [(1.0, 4.0, 0.05, 100), (3.0, 3.0, 0.3, 20)])
def test_joint_noise_never_costs_less_than_entries(first, second, rate, steps):
    joint = epsilon_of([Spend(joint_sigma([first, second]), rate, steps)], DELTA)
    assert joint >= epsilon_of([Spend(first, rate, steps), Spend(second, rate, steps)], DELTA)


def test_without_sampling_joint_noise_and_two_entries_are_one():
    """Where everybody is drawn there is no sample to share: the formula is plain addition of 1 / sigma^2."""
    first, second, rate = 4.0, 7.0, 1.0 - 1e-9
    joint = epsilon_of([Spend(joint_sigma([first, second]), rate, 10)], DELTA)
    assert joint == pytest.approx(epsilon_of([Spend(first, rate, 10), Spend(second, rate, 10)], DELTA), abs=0.01)


def test_joint_noise_is_that_of_the_best_weighted_mean():
    """An attacker who sees x + s1 n1 and x + s2 n2 averages them: the least variance of any weights."""
    first, second = 1.3, 0.4
    weights = [number / 10_000 for number in range(10_001)]
    least = min((weight * first) ** 2 + ((1 - weight) * second) ** 2 for weight in weights)
    assert joint_sigma([first, second]) == pytest.approx(math.sqrt(least), rel=1e-6)
    assert joint_sigma([first]) == pytest.approx(first)


@given(st.floats(0.1, 100.0), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
@settings(deadline=None)
def test_noise_that_is_shared_out_adds_up_to_the_whole(sigma, parts):
    shares = [part / sum(parts) for part in parts]
    assert joint_sigma(shared_out(sigma, shares)) == pytest.approx(sigma, rel=1e-9)


@given(st.floats(0.3, 50.0), st.floats(0.001, 0.6), st.floats(0.001, 0.39))
@settings(deadline=None, max_examples=30)
def test_what_a_round_is_charged_covers_votes_gradients_and_loss(sigma, vote_share, loss_share):
    one = Mechanism(sigma, 0.1, 50.0, 7, 1.0, vote_share, loss_share, 2)
    released = [one.vote_sigma, one.gradient_sigma, one.loss_sigma]
    assert sum(noise**-2 for noise in released) <= one.spend.sigma**-2 * (1.0 + 1e-9)
    assert (one.spend.rate, one.spend.steps) == (0.1, 7)


# ---------------------------------------------------------------- ordinary sense


def test_epsilon_rises_with_steps_and_rate_and_falls_with_noise_and_delta():
    by_steps = [epsilon_of([Spend(1.5, 0.05, steps)], DELTA) for steps in (1, 2, 20, 400)]
    by_rate = [epsilon_of([Spend(1.5, rate, 50)], DELTA) for rate in (0.001, 0.1, 0.99)]
    by_noise = [epsilon_of([Spend(sigma, 0.05, 50)], DELTA) for sigma in (20.0, 2.0, 0.5, 0.05)]
    by_delta = [epsilon_of([Spend(1.5, 0.05, 50)], delta) for delta in (1e-2, 1e-5, 1e-8)]
    for values in (by_steps, by_rate, by_noise, by_delta):
        assert all(low < high for low, high in itertools.pairwise(values))


def test_order_and_grouping_of_the_spends_do_not_matter():
    spends = [Spend(1.0, 0.02, 50), Spend(3.0, 0.1, 20), Spend(1.0, 0.02, 30), Spend(3.0, 0.1, 1), Spend(2.0, 0.1, 0)]
    expected = (Spend(1.0, 0.02, 80), Spend(3.0, 0.1, 21))
    for order in itertools.permutations(spends):
        assert merged(order) == expected
    assert epsilon_of(spends, DELTA) == epsilon_of(spends[::-1], DELTA) == epsilon_of(expected, DELTA)


def test_nothing_spent_costs_nothing():
    assert epsilon_of([], DELTA) == epsilon_of([Spend(1.0, 0.1, 0)], DELTA) == 0.0


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(0.3, 0.5, 100), (1.0, 0.9, 400), (0.05, 0.1, 3)])
def test_beyond_an_epsilon_of_100_the_bound_is_looser_but_still_one(sigma, rate, steps):
    found = epsilon_of([Spend(sigma, rate, steps)], DELTA)
    assert found >= 100.0
    assert found >= by_pld([Spend(sigma, rate, steps)], interval=1e-2) - 0.01 * steps  # the grid rounds up each step


# ---------------------------------------------------------------- planning


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.13, 330), (1.0, 0.01, 1000), (8.0, 0.13, 330)])
def test_planned_noise_keeps_the_target_and_wastes_no_more_than_half_a_percent(epsilon, rate, steps):
    sigma = planned_sigma(epsilon=epsilon, delta=1e-6, rate=rate, steps=steps)
    assert epsilon_of([Spend(sigma, rate, steps)], 1e-6) <= epsilon
    assert epsilon_of([Spend(0.995 * sigma, rate, steps)], 1e-6) > epsilon


def test_a_plan_that_needs_little_noise_takes_the_least_that_is_counted():
    sigma = planned_sigma(epsilon=50.0, delta=1e-5, rate=0.001, steps=1)
    assert sigma == pytest.approx(0.25)
    assert epsilon_of([Spend(sigma, 0.001, 1)], DELTA) <= 50.0


def test_a_plan_that_cannot_be_kept_is_refused_with_what_to_change(monkeypatch):
    monkeypatch.setattr(accounting, "_LARGEST_SIGMA", 2.0)
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=0\.5 cannot be kept over 60 steps at rate 0\.5.*or lower"):
        planned_sigma(epsilon=0.5, delta=1e-6, rate=0.5, steps=60)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.0, 0.1, 1), (-1.0, 0.1, 1), (math.inf, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.0, 1),
     (1.0, -0.1, 1), (1.0, math.nan, 1), (1.0, 2.0, 1), (1.0, 0.1, -1)],
)  # fmt: skip
def test_a_spend_that_means_nothing_is_refused_with_a_sentence(sigma, rate, steps):
    with pytest.raises(PrivacyError, match=r"has no meaning: noise must be above 0 and the rate between 0 and 1\."):
        Spend(sigma, rate, steps)


# ---------------------------------------------------------------- the noise itself


WIDE = 5.5  # standard errors


def close(found, expected, count):
    """Whether a standard deviation of ``count`` numbers is as expected."""
    return abs(found / expected - 1.0) <= WIDE / math.sqrt(2.0 * count)


@pytest.mark.parametrize(("shape", "bound", "sigma"), [((300, 400), 0.1, 3.0), ((99_999,), 7.0, 0.5)])
def test_a_release_is_the_sum_and_noise_of_sigma_times_the_bound_and_never_the_same_twice(shape, bound, sigma):
    total = torch.full(shape, 5.0)
    first, second = (released(total, bound=bound, sigma=sigma) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(total, torch.full(shape, 5.0))
    noise = torch.stack([first, second]).double().flatten(1).numpy() - 5.0
    assert close(noise.std(), sigma * bound, noise.size)
    assert abs(noise.mean()) <= WIDE * sigma * bound / math.sqrt(noise.size)
    assert abs(np.corrcoef(noise)[0, 1]) <= WIDE / math.sqrt(total.numel())


def test_noise_is_normal_and_has_tails():
    assert stats.kstest(standard_normal(300_001).numpy(), "norm").pvalue > 1e-7
    beyond = {4.0: 0, 5.0: 0}
    for _ in range(20):
        drawn = standard_normal(2_000_001).abs_()
        for edge in beyond:
            beyond[edge] += int((drawn > edge).sum())
        assert float(drawn.max()) < 8.7
    for edge, found in beyond.items():
        expected = 40_000_020 * 2.0 * stats.norm.sf(edge)
        assert stats.poisson.ppf(1e-8, expected) <= found <= stats.poisson.isf(1e-8, expected)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2**21 - 1, 2**21 + 1])
def test_as_many_numbers_are_drawn_as_are_asked_for_and_no_block_is_repeated(count):
    drawn = standard_normal(count)
    assert drawn.shape == (count,)
    assert drawn.isfinite().all()
    assert len(drawn.unique()) >= count - 2  # of 2^21 numbers of 53 bits, two are equal once in some thousand times


DRAWS = {
    "noise": lambda: standard_normal(8).tolist(),
    "a release": lambda: released(torch.zeros(8), bound=1.0, sigma=1.0).tolist(),
    "coins": lambda: coins(200, 0.5).tolist(),
    "choices": lambda: some_of(60, 60).tolist(),
    "seeds of views": seed,
}


@pytest.mark.parametrize("name", DRAWS)
def test_no_seed_repeats_a_draw(name):
    drawn = []
    for _ in range(3):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002 - the old generator is what might be used by mistake
        random.seed(7)
        drawn.append(str(DRAWS[name]()))
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("name", DRAWS)
def test_a_forked_process_does_not_repeat_its_parents_draws(name):
    DRAWS[name]()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(DRAWS[name]()).encode())
        os._exit(0)
    os.close(write)
    own = str(DRAWS[name]())
    with os.fdopen(read) as pipe:
        theirs = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert theirs
    assert theirs != own


@pytest.mark.parametrize("rate", [0.003, 0.3, 0.5, 0.97])
def test_coins_show_their_rate_each_by_itself(rate):
    tossed = np.stack([coins(1000, rate) for _ in range(300)]).astype(float)
    assert abs(tossed.mean() - rate) <= WIDE * math.sqrt(rate * (1 - rate) / tossed.size)
    together = tossed.sum(1).var(ddof=1) / (1000 * rate * (1 - rate))
    assert abs(together - 1.0) <= WIDE * math.sqrt(2.0 / 299) + 0.1  # by batches or pairs it would be 0 or 2


def test_every_choice_of_images_is_as_likely_as_the_others():
    counts = np.zeros(5)
    for _ in range(4000):
        chosen = some_of(5, 2)
        assert len(set(chosen.tolist())) == 2
        counts[chosen] += 1
    assert (abs(counts - 1600) <= WIDE * math.sqrt(4000 * 0.4 * 0.6)).all()
    assert sorted(some_of(3, 10).tolist()) == [0, 1, 2]
