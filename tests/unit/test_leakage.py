"""The leakage audit: planted leaks are found, luck is not called a leak, and figures equal slow counts."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import norm
from stores import store_of

from fedssl.augment import make_views
from fedssl.build_images import canary_patients, simulated_images, simulated_sites
from fedssl.build_site import build_agent
from fedssl.checkpoint import Checkpoint
from fedssl.config import fingerprint, load
from fedssl.data.batches import image_batch
from fedssl.data.cache import Pixels, Subset
from fedssl.data.canaries import CanarySubset, half_of_patients, pattern, planted_patients
from fedssl.data.pseudonym import numbered
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError
from fedssl.evaluation.leakage.attributes import attribute_rows
from fedssl.evaluation.leakage.likelihood_ratio import (
    Shadows,
    each_against_the_others,
    fisher_z,
    likelihood_ratios,
    ratio_rows,
)
from fedssl.evaluation.leakage.membership import agreement, attack_figures, by_patient, difference, leaks
from fedssl.evaluation.leakage.points import view_agreement
from fedssl.evaluation.leakage.prototypes import nearest_images
from fedssl.methods.simclr import SimCLR
from fedssl.overrides import quoted
from fedssl.release.card import write_card
from fedssl.run_folder import RunFolder
from fedssl.storage import write_json
from fedssl.weights import identity
from simulations.repeat import repeated

ODD = "ST. MARY'S, {A}"  # name of a site


def _figures(scores, member, **more):
    return attack_figures(scores, member, np.arange(len(scores)), **{"resamples": 200, **more})


def _half(patients):
    return np.arange(patients) % 2 == 0


# ---- membership: figures against slow counts


def _pairs_won(scores, member):
    won = [float(a > b) + 0.5 * float(a == b) for a in scores[member] for b in scores[~member]]
    return sum(won) / len(won)


def _found(scores, member, rate):
    """The best share of members among all thresholds that accuse at most a share ``rate`` of the others."""
    best = 0.0
    for threshold in [*scores.tolist(), math.inf]:
        if sum(s >= threshold for s in scores[~member]) <= rate * (~member).sum():
            best = max(best, sum(s >= threshold for s in scores[member]) / member.sum())
    return best


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_an_attack_equal_counts_in_loops(seed):
    rng = np.random.default_rng(seed)
    member = rng.random(150) < 0.3
    scores = rng.standard_normal(150) + 0.7 * member
    if seed > 2:
        scores = scores.round(0 if seed == 3 else 1)  # ties
    found = _figures(scores, member, resamples=20)
    assert found["auroc"]["value"] == pytest.approx(_pairs_won(scores, member))
    assert found["tpr_at_10"]["value"] == pytest.approx(_found(scores, member, 0.1))
    assert found["tpr_at_1"]["value"] == pytest.approx(_found(scores, member, 0.01))
    assert (found["members"], found["held_out"]) == (member.sum(), (~member).sum())


def test_the_advantage_is_that_of_accusing_the_upper_half():
    rng = np.random.default_rng(0)
    member, scores = _half(80), rng.standard_normal(80) + _half(80)
    upper = scores > np.median(scores)
    assert _figures(scores, member)["advantage"]["value"] == pytest.approx(upper[member].mean() - upper[~member].mean())


def test_the_agreement_of_views_is_the_mean_cosine_over_pairs():
    points = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for image, value in zip(points, agreement(points), strict=True):
        cosines = [
            image[i] @ image[j] / np.linalg.norm(image[i]) / np.linalg.norm(image[j])
            for i in range(4)
            for j in range(4)
            if i != j
        ]
        assert value == pytest.approx(np.mean(cosines), abs=1e-6)


def test_a_planted_leak_is_found_and_its_rate_is_above_chance():
    rng = np.random.default_rng(1)
    member = _half(200)
    found = _figures(rng.standard_normal(200) + 1.5 * member, member)
    assert leaks(found["auroc"])
    assert leaks(found["advantage"])
    assert leaks(found["tpr_at_10"])


@pytest.mark.parametrize(("members", "others"), [(34, 16), (110, 105)])
def test_luck_is_called_a_leak_no_more_often_than_the_interval_says(members, others):
    called = {"auroc": 0, "advantage": 0, "tpr_at_10": 0}
    for seed in range(80):
        scores = np.random.default_rng(seed).standard_normal(members + others)
        found = _figures(scores, np.arange(members + others) < members)
        for name in called:
            called[name] += leaks(found[name])
    assert max(called.values()) <= 6  # 2.5 % are 2; 7 or more have a chance of .5 %


def test_a_rate_below_one_patient_and_a_side_below_ten_patients_have_no_figure():
    rng = np.random.default_rng(0)
    assert _figures(rng.standard_normal(60), np.arange(60) < 30)["tpr_at_1"] is None
    few = _figures(rng.standard_normal(60), np.arange(60) < 9)
    assert (few["members"], few["auroc"], few["advantage"], few["tpr_at_10"]) == (9, None, None, None)


def test_what_an_untrained_encoder_tells_too_is_no_gain():
    rng = np.random.default_rng(0)
    member, luck = _half(60), rng.standard_normal(60) + _half(60)
    assert not leaks(difference(luck + 0.01 * rng.standard_normal(60), luck, member, resamples=200))
    assert leaks(difference(rng.standard_normal(60) + 3 * member, rng.standard_normal(60), member, resamples=200))


# ---- an encoder that knows its patients by heart


@dataclass(frozen=True)
class _Made(Subset):
    values: np.ndarray

    def column(self, name):
        return np.full(len(self.rows), "MR")

    def read(self, positions):
        count = len(positions)
        zero, one = np.zeros(count, np.float32), np.ones(count, np.float32)
        return Pixels(self.values[self.rows[positions]], zero, one, np.zeros(count, bool))


def _patients(number, images):
    """Images of a patient are one smooth random picture with little noise: [patients x images, 1, 24, 24]."""
    rng = np.random.default_rng(0)
    values = np.empty((number, images, 1, 24, 24), np.float32)
    for own in values:
        picture = gaussian_filter(rng.standard_normal((24, 24)), 2)
        picture = (picture - picture.min()) / np.ptp(picture)
        own[:, 0] = (picture + 0.05 * rng.standard_normal((images, 24, 24))).clip(0, 1)
    return values.reshape(number * images, 1, 24, 24)


def test_an_encoder_fitted_to_a_handful_of_patients_is_flagged_and_an_untrained_one_is_not():
    torch.set_num_threads(1)
    values, patients = _patients(24, 4), np.repeat(np.arange(24), 4)
    member = patients % 2 == 0
    views = make_views(crops={"global": {"count": 2, "edge": 24, "area": [0.3, 1.0]}}, noise=0.05, contrast=0.3)
    method = SimCLR(build_encoder("test_resnet", norm_groups=16), hidden=32, width=16, temperature=0.2)

    def attacked():
        found = view_agreement(method, _Made(None, np.arange(96), values), views, seed=0)
        return {name: _figures(by_patient(score, patients), member[::4])["auroc"] for name, score in found.items()}

    assert not any(map(leaks, attacked().values()))
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    images, generator = _Made(None, np.flatnonzero(member), values), torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        method.train()
        batch = image_batch(images.read(np.arange(12) * 4 + rng.integers(4, size=12)))
        loss = method.loss(views(batch, generator)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = attacked()
    assert leaks(found["projections"])
    assert leaks(found["features"])


def test_the_same_views_are_shown_to_every_encoder_and_batches_mix_all_images():
    values = _patients(6, 2)
    views = make_views(crops={"global": {"count": 2, "edge": 24, "area": [0.3, 1.0]}}, noise=0.05)
    method = SimCLR(build_encoder("test_resnet", norm_groups=16), hidden=32, width=16, temperature=0.2)
    first, second = (view_agreement(method, _Made(None, np.arange(12), values), views, seed=3) for _ in range(2))
    for name in ("features", "projections"):
        assert np.array_equal(first[name], second[name])


# ---- likelihood ratios


def test_with_known_gaussians_the_ratio_equals_the_analytic_one():
    rng = np.random.default_rng(0)
    inside = np.arange(4000)[:, None] % 2 == np.zeros((1, 5), int)
    means, spread = np.array([-1.0, 0.0, 0.5, 1.0, 2.0]), np.array([1.0, 2.0, 0.5, 1.0, 0.7])
    shadows = rng.standard_normal((4000, 5)) * spread + means + 0.8 * inside
    target = np.array([0.3, -1.0, 1.5, 0.0, 2.9])
    wanted = norm.logpdf(target, means + 0.8, spread) - norm.logpdf(target, means, spread)
    assert likelihood_ratios(target, shadows, inside) == pytest.approx(wanted, abs=0.15)


def test_few_shadows_share_one_variance_around_each_patients_own_mean():
    rng = np.random.default_rng(0)
    inside = np.stack([(np.arange(4000) + shadow) % 2 == 0 for shadow in range(4)])
    base = 50.0 * rng.standard_normal(4000)  # between patients: must not count
    shadows = base + inside + 0.5 * rng.standard_normal((4, 4000))
    own = [np.where(side, shadows, 0).sum(0) / 2 for side in (inside, ~inside)]
    target = base + 0.5
    wanted = (-((target - own[0]) ** 2) + (target - own[1]) ** 2) / (2 * 0.5**2)
    assert np.corrcoef(likelihood_ratios(target, shadows, inside), wanted)[0, 1] > 0.99


def _shadows_of(patients, number, effect, seed):
    rng = np.random.default_rng(seed)
    sites = np.full(patients, "A")
    inside = np.stack([half_of_patients(np.arange(patients), sites, shadow, seed) for shadow in range(number)])
    return rng.standard_normal((number, patients)) + effect * inside, inside


def test_shadows_attack_each_other_without_bias_where_nothing_leaks():
    shadows, inside = _shadows_of(3000, 4, 0.0, 0)
    fair = each_against_the_others(shadows, inside)
    assert _pairs_won(fair[0][:400], inside[0][:400]) == pytest.approx(0.5, abs=0.08)
    areas = [_rank_area(fair[number], inside[number]) for number in range(4)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.02)
    others = np.arange(4) != 0  # what the code must not do: the partner stays and gives the patient away
    unfair = likelihood_ratios(shadows[0], shadows[others], inside[others])
    assert abs(_rank_area(unfair, inside[0]) - 0.5) > 0.05


def _rank_area(scores, member):
    ranks = np.argsort(np.argsort(scores)) + 1.0
    return (ranks[member].sum() - member.sum() * (member.sum() + 1) / 2) / (member.sum() * (~member).sum())


def _who(patients, inside, planted):
    return Shadows(np.arange(patients), _half(patients), inside, np.arange(patients) < planted)


def test_a_leak_of_canaries_alone_is_told_from_one_of_all_patients():
    patients, number = 120, 8
    cosines, inside = _shadows_of(patients, number, 0.0, 1)
    cosines[:, :20] += 3.0 * inside[:, :20]
    rng = np.random.default_rng(0)
    rows = ratio_rows(
        np.tanh(rng.standard_normal(patients) / 3), np.tanh(cosines / 3), _who(patients, inside, 20), resamples=200
    )
    found = {(row["attacked"], row["who"]): row["auroc"] for row in rows}
    assert leaks(found["shadows", "canaries"])
    assert not leaks(found["shadows", "patients"])
    assert not leaks(found["target", "patients"])


def test_a_target_that_remembers_its_patients_is_found_with_eight_shadows():
    patients = 120
    shadows, inside = _shadows_of(patients, 8, 2.0, 2)
    own = np.random.default_rng(5).standard_normal(patients) + 2.0 * _half(patients)
    rows = ratio_rows(np.tanh(own / 5), np.tanh(shadows / 5), _who(patients, inside, 0), resamples=200)
    assert leaks(rows[0]["auroc"])
    assert len(rows) == 2  # no canaries, no figure of them


def test_cosines_of_one_stay_finite():
    assert np.isfinite(fisher_z(np.array([-1.0, 0.0, 1.0]))).all()


# ---- prototypes


def _cloud(seed, patients=24, images=4, width=16):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((patients, 1, width))
    points = (centre + 0.4 * rng.standard_normal((patients, images, width))).reshape(-1, width)
    prototypes = rng.standard_normal((16, width))
    owner = np.repeat(np.arange(patients), images)
    return _unit(points), _unit(prototypes), owner, owner % 2 == 0


def _unit(points):
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_a_prototype_equal_to_a_training_image_is_flagged():
    points, prototypes, owner, member = _cloud(0)
    prototypes[3] = points[np.flatnonzero(member)[5]]
    found = nearest_images(points @ prototypes.T, member, owner, resamples=100)
    assert (found["sits_on_member"], found["sits_on_held_out"], found["alarm"]) == (1, 0, True)
    assert found["nearest_member"] < 1e-6 < found["nearest_held_out"]


def test_prototypes_near_training_patients_are_flagged_and_others_are_not():
    alarms = 0
    for seed in range(60):
        points, prototypes, owner, member = _cloud(seed)
        found = nearest_images(points @ prototypes.T, member, owner, resamples=100)
        alarms += found["alarm"]
        assert found["member_nearest"]["low"] <= found["member_nearest"]["value"] <= found["member_nearest"]["high"]
    assert alarms <= 5
    points, _, owner, member = _cloud(0)
    near = _unit(points[member][::3] + 0.05 * np.random.default_rng(0).standard_normal((16, 16)))
    assert nearest_images(points @ near.T, member, owner, resamples=100)["alarm"]


def test_sides_have_equally_many_patients_and_images_and_nine_are_too_few():
    points, prototypes, owner, _ = _cloud(0)
    member = owner < 14
    found = nearest_images(points @ prototypes.T, member, owner, resamples=50)
    assert (found["patients"], found["images"]) == (10, 40)
    few = nearest_images(points @ prototypes.T, owner < 9, owner, resamples=50)
    assert few == {"too_few": True, "members": 9, "held_out": 15}


# ---- attributes


def test_a_site_that_features_hold_is_told_and_noise_is_not():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 3)
    sites, train = np.array(["A", "B", "C"])[patients % 3], patients % 5 > 1
    told = np.eye(3)[patients % 3] + 0.3 * rng.standard_normal((180, 3))
    noise = rng.standard_normal((180, 3))
    unknown = np.where(patients < 58, "", "F")
    rows = attribute_rows(
        {"site": sites, "sex": unknown}, patients, train, {"trained": told, "untrained": noise}, resamples=100
    )
    found = {(row["what"], row["encoder"]): row["balanced_accuracy"] for row in rows}
    assert leaks(found["site", "trained"])
    assert not leaks(found["site", "untrained"])
    assert found["site", "trained"]["chance"] == pytest.approx(1 / 3)
    assert found["sex", "trained"] is None


# ---- halves and canaries


def test_halves_are_of_patients_about_half_at_every_site_and_opposite_in_pairs():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 61, 500)
    sites = np.array(["A", "B", "C"])[patients % 3]
    halves = [half_of_patients(patients, sites, shadow, 7) for shadow in range(6)]
    for half in halves:
        for patient in np.unique(patients):
            assert len(set(half[patients == patient].tolist())) == 1
        for site in "ABC":
            here = np.unique(patients[sites == site])
            assert abs(len(np.unique(patients[half & (sites == site)])) - len(here) / 2) <= 0.5
    for pair in (0, 2, 4):
        assert (halves[pair] ^ halves[pair + 1]).all()
    assert (halves[0] != halves[2]).any()
    assert np.array_equal(halves[3], half_of_patients(patients, sites, 3, 7))
    assert (halves[0] != half_of_patients(patients, sites, 0, 8)).any()


def test_canaries_keep_their_pictures_between_reads_and_leave_the_others_alone(hospitals, tmp_path):
    store = store_of(hospitals / "EAST", tmp_path / "store", site="EAST").open()
    plain, patients = Subset(store, np.arange(len(store))), numbered(store.column("group"))
    planted = planted_patients(patients, 2, 5)
    images = CanarySubset.of(plain, patients, planted, 5)
    here = np.isin(patients, planted)
    assert 0 < here.sum() < len(here)
    order = np.random.default_rng(0).permutation(len(store))
    first, again = images.read(np.arange(len(store))), images.read(order)
    assert np.array_equal(first.values[order], again.values)
    assert np.array_equal(first.values[~here], plain.read(np.flatnonzero(~here)).values)
    for place in np.flatnonzero(here):
        assert np.array_equal(first.values[place, 0], pattern(int(patients[place]), 16, 5))
    assert not np.array_equal(pattern(int(planted[0]), 16, 5), pattern(int(planted[1]), 16, 5))
    assert (first.low[here] == 0).all()
    assert (first.high[here] == 1).all()


@pytest.mark.parametrize("more", [("simulation.partition=iid", "simulation.sites=3"), ("simulation.pool=true",)])
def test_a_shadow_trains_on_half_of_all_patients_with_canaries_at_their_sites(tiny, more):
    from fedssl.build_images import open_images

    config = load([*tiny, *more, "simulation.shadow=1", "simulation.canaries=6"])
    store = open_images(config)
    sites = simulated_sites(config, store)
    rows = np.concatenate([images.rows for images in sites.values()])
    assert sorted(rows.tolist()) == sorted(simulated_images(config, store).rows.tolist())
    patients = numbered(store.column("group"))
    everyone = np.unique(patients[store.column("site") != "NORTH"])
    assert abs(len(np.unique(patients[rows])) - len(everyone) / 2) <= 2
    planted = canary_patients(config, store)
    assert len(planted) == 6
    assert set(planted.tolist()) <= set(everyone.tolist())
    for images in sites.values():
        read = images.read(np.arange(len(images))).values
        for value, patient in zip(read, patients[images.rows].tolist(), strict=True):
            is_canary = np.array_equal(value[0], pattern(patient, 40, config["seed"]))
            assert is_canary == (patient in planted.tolist())


def test_a_hospital_never_trains_a_shadow_and_canaries_need_one(tiny, hospitals):
    with pytest.raises(ConfigError, match="nobody is held out"):
        build_agent(
            load([*tiny, "simulation.shadow=0"]), {"data-dir": str(hospitals / "EAST"), "site": "EAST"}
        )  # else it would train on its own test patients
    with pytest.raises(ConfigError, match=r"simulation.canaries"):
        load([*tiny, "simulation.canaries=3"])
    with pytest.raises(ConfigError, match=r"simulation.shadow"):
        load([*tiny, "simulation.shadow=-1"])


# ---- the same settings again


@pytest.mark.parametrize(
    "more",
    [
        ["method=byol", "optim=lars", "optim.plain_lr=0.01", "aggregation=trimmed_mean", "local=proximal"],
        ["method=hybrid", "method.base=swav", "method.classes=[yes, 'a b']", "method.base.temperature=0.2"],
        ["augment=by_modality", "augment.modalities.ct.gamma=0.1", "encoder=resnet50", "encoder.norm_groups=16"],
        ["encoder=vit_small_patch16_224", "simulation.partition=dirichlet", "data.labels=some where/a,b.csv"],
        [f"data.unseen_sites=[NORTH, {quoted(ODD)}]", "federation.participation=0.5", "seed=7", "pairing=patient"],
    ],
)
def test_overrides_made_from_a_resolved_configuration_make_the_same_settings(tiny, more):
    config = load([*tiny, *more])
    again = load(repeated(config, fingerprint(config)))
    assert fingerprint(again) == fingerprint(config)
    for section in ("data", "encoder", "method", "augment", "training", "federation", "simulation"):
        assert again[section] == config[section]


def test_settings_of_another_version_are_refused_with_what_to_do(tiny):
    with pytest.raises(ConfigError, match="without --shadows"):
        repeated(load(tiny), "0123456789ab")


# ---- the card


def _run(tmp_path, tiny, **privacy):
    folder = RunFolder(tmp_path / "run")
    folder.start(overwrite=False)
    config = load(tiny)
    folder.save_config({**config, **privacy})
    method = SimCLR(build_encoder("test_resnet", norm_groups=16), hidden=8, width=4, temperature=0.2)
    state = {name: value.detach() for name, value in method.named_parameters()}
    known = identity(Checkpoint(state, "ab" * 8, 2, "f" * 12, images_seen=99, sites=["EAST", "a|b <x>"]), method)
    return folder, known


def test_a_card_says_who_what_and_that_nothing_is_private_or_audited(tmp_path, tiny):
    folder, known = _run(tmp_path, tiny)
    text = write_card(folder, known).read_text()
    assert known["sha256"] in text
    assert "ffffffffffff" in text
    assert "EAST, a\\|b \\<x\\>" in text
    assert "No differential privacy" in text
    assert "Not audited" in text
    assert "Not evaluated" in text
    for heading in ("Model details", "Intended use", "Training data", "Evaluation", "Privacy", "Leakage", "Limits"):
        assert f"## {heading}\n" in text
    assert str(tmp_path) not in text


def test_a_card_gives_the_epsilon_of_each_site_up_to_the_round_of_the_weights(tmp_path, tiny):
    folder, known = _run(tmp_path, tiny, privacy={"unit": "patient", "delta": 1e-6})
    sites = ["EAST", "SOUTH", "WEST"]
    folder.record_round({"round": 1, "privacy/epsilon": {"EAST": 0.5, "SOUTH": 0.7}, "federation/sites": sites})
    folder.record_round({"round": 2, "privacy/epsilon": {"EAST": 1.25}, "federation/sites": ["EAST", "WEST"]})
    folder.record_round({"round": 3, "privacy/epsilon": {"EAST": 9.0}, "federation/sites": sites})
    text = write_card(folder, known).read_text()
    assert "EAST: epsilon 1.25\n" in text
    assert "SOUTH: epsilon 0.7\n" in text
    assert "Without differential privacy: WEST" in text
    assert "delta 1e-06" in text


def test_figures_of_other_weights_are_not_on_the_card(tmp_path, tiny):
    folder, known = _run(tmp_path, tiny)
    audit = {"checkpoint": {"sha256": "0" * 64}, "sentences": ["SOMETHING LEAKS"], "limits": [], "synthetic": False,
             "data": {"members": 1, "held_out": 1, "images": 2}}  # fmt: skip
    write_json(folder.path / "audit.json", audit, "the audit")
    assert "SOMETHING" not in write_card(folder, known).read_text()
    audit["checkpoint"] = {"sha256": known["sha256"]}
    (folder.path / "audit.json").write_text(json.dumps(audit))
    assert "SOMETHING LEAKS" in write_card(folder, known).read_text()
