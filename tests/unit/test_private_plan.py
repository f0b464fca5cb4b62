"""What a private run would cost, said before anybody trains; and what a report says of what was spent."""

import json
import math

import pytest
from private_parts import PLAIN, clustering
from typer.testing import CliRunner

from fedssl.augment import make_views
from fedssl.cli import app
from fedssl.evaluation.report import _privacy
from fedssl.privacy.accounting import Spend, epsilon_of
from fedssl.privacy.engines.loop import Loop
from fedssl.privacy.mechanism import Mechanism
from fedssl.privacy.plan import measure, outlook, warnings_of

SMALL = [
    "encoder=tiny", "privacy.engine=loop", "privacy.patients=300", "privacy.batch=24", "privacy.images=1",
    "privacy.steps=5", "federation.rounds=4", "training.threads=1", "augment.crops.global.edge=32",
    "augment.crops.local.count=0", "heads.hidden=32", "heads.width=16",
]  # fmt: skip


def mechanism(sigma=2.0, batch=50.0, rate=0.1):
    return Mechanism(sigma, rate, batch, 10, clip=1.0, vote_share=0.1, loss_share=0.01, images=1)


def test_the_outlook_is_what_the_formulas_say():
    found = outlook(mechanism(), delta=1e-6, steps=200, parameters=10_000, votes=8, bound=1.2)
    sigma = 2.0 / math.sqrt(1 - 0.1 - 0.01)
    assert found.gradient_noise == pytest.approx(sigma * 100 / 50)
    assert found.signal_to_noise == pytest.approx(200 / (found.gradient_noise * math.sqrt(200)))
    assert found.vote_noise == pytest.approx(8 * (2.0 / math.sqrt(0.1)) * 1.2 / 50)
    assert found.epsilon == epsilon_of([Spend(2.0, 0.1, 200)], 1e-6)
    assert found.epsilon_round == epsilon_of([Spend(2.0, 0.1, 10)], 1e-6)


def test_a_plan_without_hope_says_so_and_a_good_one_says_nothing():
    poor = outlook(mechanism(), delta=1e-6, steps=10, parameters=10_000_000, votes=64, bound=1.2)
    told = " ".join(warnings_of(poor, mechanism(rate=0.6), patients=80, public_start=False))
    for words in ("no better than its start", "follow the noise", "80 patients are few", "60% of the steps"):
        assert words in told
    good_mechanism = mechanism(sigma=1.0, batch=2000.0, rate=0.05)
    good = outlook(good_mechanism, delta=1e-6, steps=400, parameters=100_000, votes=8, bound=1.2)
    assert warnings_of(good, good_mechanism, patients=40_000, public_start=False) == []


def test_a_public_start_is_not_asked_for_twice():
    found = outlook(mechanism(), delta=1e-6, steps=10, parameters=1000, votes=2, bound=1.0)
    told = warnings_of(found, mechanism(), patients=80, public_start=True)
    assert not any("encoder.weights" in sentence for sentence in told)


def test_time_is_measured_on_noise_and_scaled_to_the_batch_and_the_round():
    views = make_views(crops={"global": {"count": 2, "edge": 32, "area": [0.5, 1.0]}})
    cost = measure(Loop(clustering(), PLAIN), views, mechanism(), in_chans=1)
    assert cost.round_s == pytest.approx(10 * cost.step_s)
    assert cost.step_s > 0
    assert cost.memory_gb > 0.1


def test_the_command_prints_the_plan_of_every_size_of_site_and_warns():
    sizes = "privacy.patients={NORTH: 300, SOUTH: 90}"
    done = CliRunner().invoke(
        app, ["privacy", "plan", *[s for s in SMALL if "patients" not in s], sizes, "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["patients"], row["planned_epsilon"]) for row in found["rows"]] == [
        (patients, epsilon) for patients in (300, 90) for epsilon in (8.0, 3.0, 1.0)
    ]
    for row in found["rows"]:
        assert row["epsilon"] == pytest.approx(row["planned_epsilon"], rel=0.01)
        assert row["epsilon"] <= row["planned_epsilon"]
        assert row["steps"] == 5 * 5  # four rounds and a spare one
    assert any("90 patients" in text for text in found["warnings"])
    assert found["cost"]["run_s"] == pytest.approx(4 * found["cost"]["round_s"])


def test_the_command_says_in_a_sentence_what_cannot_be_planned():
    for wrong, words in (("privacy.epsilon=0.01", "at least 0.1"), ("privacy.batch=300", "must be below"),
                         ("privacy.delta=0.5", "too large"), ("method=simclr", "NT-Xent")):  # fmt: skip
        done = CliRunner().invoke(app, ["privacy", "plan", *SMALL, wrong])
        assert done.exit_code == 2
        assert words in done.output


def test_a_report_says_what_was_spent_and_who_has_no_guarantee():
    rows = [
        {"site": "A", "round": 1, "epsilon": 1.0, "delta": 1e-6}, {"site": "B", "round": 1},
        {"site": "A", "round": 2, "epsilon": 2.5, "delta": 1e-6}, {"site": "B", "round": 2},
    ]  # fmt: skip
    spent, others = _privacy(rows)
    assert "Site A: epsilon 2.50 (delta 1e-06)" in spent
    assert others == "Without differential privacy: B."
    assert _privacy([{"site": "B", "round": 1}]) == []
