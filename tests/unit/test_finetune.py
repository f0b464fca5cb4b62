"""Fine-tuning with few labels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import fedssl.evaluation.finetune as tuning
from fedssl import intensity, progress
from fedssl.augment import random_crops
from fedssl.data.cache import ImageStore, Pixels
from fedssl.data.hospitals import LABEL
from fedssl.data.indexing.scan import read_table
from fedssl.data.labels import join_labels
from fedssl.data.store import Source, Store
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.finetune import Check, Classifier, Recipe, finetune, predict
from fedssl.evaluation.targets import Targets, classes_of

EDGE = 16
SHORT = Recipe(least_steps=6, most_steps=6, batch_size=8, checks=3)


class Drawn(ImageStore):
    """Noise about a brightness, three images a patient; notes which rows are read with and without gradients."""

    def __init__(self, patients=15, seed=0):
        rng = np.random.default_rng(seed)
        self.patients = np.repeat(np.arange(patients), 3)
        self.bright = rng.permutation(len(self.patients)) % 2 == 0
        grey = np.where(self.bright, 0.7, 0.3)[:, None, None, None]
        self.pixels = (grey + rng.normal(0, 0.05, (len(grey), 1, EDGE, EDGE))).clip(0, 1).astype(np.float32)
        self.trained, self.examined = [], []

    def __len__(self):
        return len(self.pixels)

    def read(self, rows):
        (self.trained if torch.is_grad_enabled() else self.examined).append(np.array(rows))
        zero = np.zeros(len(rows), np.float32)
        return Pixels(self.pixels[rows], zero, zero + 1, zero > 0)

    @property
    def rows(self):
        return np.arange(len(self))

    @property
    def targets(self):
        return classes_of(self.bright.tolist())


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _encoder(**options):
    return build_encoder("test_resnet", norm_groups=16, options=options)


def _tuned(store=None, recipe=SHORT, *, encoder=None, seed=0, targets=None, **others):
    store = store or Drawn()
    given = (encoder or _encoder(), store, store.rows, targets or store.targets, store.patients, recipe)
    return finetune(*given, edge=EDGE, seed=seed, **others)


def _bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def _auroc(positive, negative):
    """Count the pairs in order, ties half."""
    return np.mean([[(p > n) + 0.5 * (p == n) for n in negative] for p in positive])


@pytest.mark.parametrize("part", ["head", "last", "all"])
def test_only_the_part_named_changes_and_the_encoder_given_never(part):
    encoder = _encoder()
    before = _bits(encoder)
    state = torch.random.get_rng_state()
    recipe = replace(SHORT, part=part)
    tuned = _tuned(encoder=encoder, recipe=recipe, store=Drawn(patients=9)).model
    assert _bits(encoder) == before
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = {name for name, value in _bits(tuned.encoder).items() if value != before[name]}
    expected = {"head": set(), "last": {name for name in before if name.startswith("layer4.")}, "all": set(before)}
    assert changed == expected[part]
    assert tuned.head.weight.any()


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("test_resnet", ("layer4.",)),
        ("resnet18", ("layer4.",)),
        ("vit_tiny_patch16_224", ("blocks.11.", "norm.")),
        ("resnetv2_50x1_bit", ("stages.3.", "norm.")),
        ("convnext_atto", ("stages.3.", "head.norm.")),
        ("swin_tiny_patch4_window7_224", ("layers.3.", "norm.")),
    ],
)
def test_the_last_stage_is_the_last_block_and_the_norms_after_it(name, starts):
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0)
    assert tuning.last_stage(encoder) == [n for n, _ in encoder.named_parameters() if n.startswith(starts)]


@pytest.fixture
def forwards(monkeypatch):
    """What the classifier is given, with: trains, its encoder trains, in mixed precision."""
    seen, forward = [], Classifier.forward

    def watched(self, images):
        seen.append((images, self.training, self.encoder.training, torch.is_autocast_enabled("cpu")))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", watched)
    return seen


@pytest.mark.parametrize(("part", "precision"), [("head", "float32"), ("last", "auto"), ("all", "bf16")])
def test_a_frozen_encoder_drops_nothing_and_only_training_is_in_mixed_precision(forwards, part, precision):
    _tuned(recipe=replace(SHORT, part=part, precision=precision))
    modes = [mode for _, *mode in forwards]
    assert modes.count([True, part != "head", precision == "bf16"]) == 6
    assert modes.count([False, False, False]) == len(modes) - 6 == 4


@pytest.mark.parametrize("flip", [False, True])
def test_views_are_crops_turned_and_mirrored_of_other_grey_values(forwards, monkeypatch, flip):
    store, started, plain = Drawn(patients=9), [], tuning.Changes.view

    def watched(changes, images, generator, crops):
        started.append(generator.get_state())
        return plain(changes, images, generator, crops)

    monkeypatch.setattr(tuning.Changes, "view", watched)
    _tuned(store, flip=flip)
    for (views, *_), state, rows in zip(forwards, started, store.trained, strict=True):
        generator = torch.Generator()
        generator.set_state(state)
        images = torch.from_numpy(store.pixels[rows])
        views_by_hand = random_crops(images, generator, edge=EDGE, area=(0.6, 1.0), rotation=15.0, flip=flip)
        views_by_hand = intensity.gamma(views_by_hand, generator, strength=0.2)
        views_by_hand = intensity.linear_intensity(views_by_hand, generator, contrast=0.2, brightness=0.05)
        assert torch.equal(views, (views_by_hand - 0.25) / 0.25)


def test_equal_images_have_other_views_with_another_seed(forwards):
    store = Drawn(patients=9)
    store.pixels[:] = np.linspace(0.3, 0.9, EDGE, dtype=np.float32)
    for seed in (0, 0, 1):
        _tuned(store, seed=seed)
    first, again, other = (torch.cat([views for views, *_ in forwards[start : start + 6]]) for start in (0, 6, 12))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first, dim=0)) == len(first)


def test_the_order_is_another_with_another_seed():
    orders = []
    for seed in (0, 1):
        store = Drawn(patients=9)
        _tuned(store, seed=seed)
        orders.append(np.concatenate(store.trained).tolist())
    assert orders[0] != orders[1]


def test_equal_seeds_give_equal_bits_whatever_was_drawn_before_and_other_seeds_others():
    results = []
    for seed in (0, 0, 1):
        torch.rand(len(results) + 1)
        results.append(_tuned(encoder=_encoder(drop_rate=0.5), seed=seed))
    assert _bits(results[0].model) == _bits(results[1].model)
    assert results[0].curve == results[1].curve
    assert _bits(results[0].model) != _bits(results[2].model)


def test_dropout_is_on_while_training():
    with_dropout, without = (_tuned(Drawn(5), encoder=_encoder(drop_rate=rate)).model for rate in (0.5, 0.0))
    assert _bits(with_dropout) != _bits(without)


def test_whole_patients_decide_when_to_stop_and_never_train():
    store = Drawn()
    result = _tuned(store, recipe=replace(SHORT, least_steps=30, most_steps=30))
    trained, examined = (np.unique(np.concatenate(rows)) for rows in (store.trained, store.examined))
    assert len(result.curve) == len(store.examined)
    assert not set(store.patients[trained]) & set(store.patients[examined])
    assert sorted([*trained, *examined]) == store.rows.tolist()
    assert len(set(store.patients[examined])) == 3  # 0.2 * 15
    assert {len(rows) for rows in store.trained} == {8}


def test_each_image_trains_once_before_any_trains_twice():
    store = Drawn(patients=8)
    _tuned(store)
    for first in (0, 3):  # 24 images, 3 batches
        assert sorted(np.concatenate(store.trained[first : first + 3])) == store.rows.tolist()
    assert len(store.trained) == 6


def test_few_patients_all_train_and_the_last_weights_are_kept():
    store = Drawn(patients=9)
    result = _tuned(store, recipe=replace(SHORT, batch_size=100))
    assert store.examined == []
    assert [sorted(rows) for rows in store.trained] == [store.rows.tolist()] * 6
    assert (result.curve, result.images) == ([], 6 * 27)
    assert not result.model.training


def test_other_images_may_decide_so_that_all_labelled_patients_train():
    store = Drawn()
    others = np.array([0, 1, 2, 3, 4, 5])
    recipe = replace(SHORT, least_steps=30, most_steps=30, patience=99)
    result = _tuned(store, recipe=recipe, validate=(others, store.targets.take(others)))
    assert set(np.concatenate(store.trained)) == set(store.rows)
    assert [rows.tolist() for rows in store.examined] == [others.tolist()] * 4
    assert [check.images for check in result.curve] == [0, 80, 160, 240]


def test_validation_patients_show_every_label_or_nobody_is_spared():
    patients = np.repeat(np.arange(10), 2)
    for sick in (range(10), range(5), [3, 7], [4]):
        values = np.isin(patients, list(sick)) & (np.arange(20) % 2 == 0)
        for seed in range(10):
            held = tuning.validation_patients(classes_of(values.tolist()), patients, share=0.2, seed=seed)
            assert not set(patients[held]) & set(patients[~held])
            if held.any():
                assert len(set(patients[held])) == 2
                assert set(values[held]) == set(values[~held]) == {False, True}
            assert held.any() or len(sick) < 5


def test_a_class_that_only_an_unseen_site_has_leaves_early_stopping_on():
    store = Drawn()
    three = Targets(np.eye(3, dtype=np.float32)[store.bright.astype(int)], ["dark", "bright", "elsewhere"], True)
    nowhere = np.stack([store.bright, store.bright, np.full(45, np.nan)], 1).astype(np.float32)
    nowhere[:, 1] = 1.0
    for targets in (three, Targets(nowhere, ["bright", "always", "not known"], False)):
        result = _tuned(store, targets=targets)
        assert len(result.curve) == 4
        assert all(0.0 <= check.value <= 1.0 for check in result.curve)
        some = np.arange(6)
        result = _tuned(store, targets=targets, validate=(some, targets.take(some)))
        assert len(result.curve) == 4


def test_what_the_images_to_learn_from_show_both_ways_alone_decides_when_to_stop(monkeypatch):
    store, asked = Drawn(), []
    monkeypatch.setattr(tuning, "mean_auroc", lambda scores, targets, outputs: asked.append(outputs) or 0.5)
    values = np.stack([store.bright, np.ones(45)], 1).astype(np.float32)
    others = Targets(np.array([[0, 0], [1, 1]], np.float32), ["bright", "always"], False)
    validate = (np.array([0, 1]), others)
    _tuned(store, targets=Targets(values, ["bright", "always"], False), validate=validate)
    assert asked == [[0]] * 4


@pytest.mark.parametrize(("share", "expected"), [(0.01, 2), (0.2, 4), (0.34, 7)])
def test_the_share_of_validation_patients_is_rounded_and_at_least_two(share, expected):
    patients = np.repeat(np.arange(20), 2)
    held = tuning.validation_patients(classes_of([0, 1] * 20), patients, share=share, seed=0)
    assert len(set(patients[held])) == expected


def test_the_best_weights_are_restored_and_patience_ends_the_training(monkeypatch):
    store, values, seen = Drawn(), iter([0.5, 0.6, 0.9, 0.8, 0.9, 0.7]), []
    monkeypatch.setattr(tuning, "mean_auroc", lambda scores, *_: seen.append(scores) or next(values))
    recipe = replace(SHORT, least_steps=20, most_steps=20, checks=10, patience=3)
    result = _tuned(store, recipe=recipe)
    assert result.curve == [Check(16 * number, value) for number, value in enumerate([0.5, 0.6, 0.9, 0.8, 0.9, 0.7])]
    assert result.images == 32
    assert len(store.trained) == 10
    again = predict(result.model, store, store.examined[0], edge=EDGE, exclusive=True)
    assert np.array_equal(again, seen[2])
    assert not np.array_equal(again, seen[5])


def test_the_first_look_finds_an_untrained_head_which_knows_nothing():
    assert _tuned().curve[0] == Check(0, 0.5)


@pytest.mark.parametrize("part", ["head", "all"])
@pytest.mark.parametrize("exclusive", [True, False])
def test_it_learns_brightness(part, exclusive):
    store, fresh = Drawn(20), Drawn(20, seed=1)
    targets = store.targets if exclusive else Targets(store.bright[:, None].astype(np.float32), ["bright"], False)
    recipe = Recipe(part=part, lr=3e-3, head_lr=3e-2, least_steps=60)
    result = _tuned(store, recipe, targets=targets)
    scores = predict(result.model, fresh, fresh.rows, edge=EDGE, exclusive=exclusive)[:, -1]
    assert _auroc(scores[fresh.bright], scores[~fresh.bright]) > 0.95


def test_mixed_precision_learns_too_and_predicts_in_float32():
    store = Drawn(20)
    result = _tuned(store, Recipe(lr=3e-3, head_lr=3e-2, least_steps=60, precision="bf16"))
    scores = predict(result.model, store, store.rows, edge=EDGE, exclusive=True)
    assert scores.dtype == np.float32
    assert _auroc(scores[store.bright, 1], scores[~store.bright, 1]) > 0.95


def test_the_loss_of_classes_is_that_of_a_loop_over_an_unbalanced_batch():
    labels, batch = [0, 0, 0, 0, 0, 2, 2, 0], [2, 4, 5]
    targets = Targets(np.eye(4, dtype=np.float32)[labels], list("abcd"), True)  # b and d are absent
    scores = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = 0.0
    for row, image in zip(scores.tolist(), batch, strict=True):
        weight = 8 / (2 * labels.count(labels[image]))
        expected -= weight * math.log(math.exp(row[labels[image]]) / sum(map(math.exp, row))) / 3
    weights = torch.from_numpy(tuning.balance(targets)).float()
    values = torch.from_numpy(targets.values[batch])
    loss = tuning.balanced_loss(torch.from_numpy(scores), values, weights, exclusive=True)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_findings_is_that_of_a_loop_over_what_is_known():
    nan = float("nan")
    values = np.array([[1, 0], [0, nan], [0, 1], [nan, 1], [0, 1]], np.float32)
    scores = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    weight = [3 / 1, 1 / 3]  # negative / positive
    terms = []
    for image in range(5):
        for finding in range(2):
            chance = 1 / (1 + math.exp(-scores[image, finding]))
            if values[image, finding] == 1:
                terms.append(-weight[finding] * math.log(chance))
            elif values[image, finding] == 0:
                terms.append(-math.log(1 - chance))
    assert len(terms) == 8
    weights = torch.from_numpy(tuning.balance(Targets(values, ["a", "b"], False))).float()
    loss = tuning.balanced_loss(torch.from_numpy(scores), torch.from_numpy(values), weights, exclusive=False)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    nothing = torch.full((5, 2), nan)
    assert tuning.balanced_loss(torch.from_numpy(scores), nothing, weights, exclusive=False).item() == 0.0


def test_a_finding_without_positive_or_negative_images_has_weight_one():
    values = np.array([[1, 0, np.nan], [1, 0, np.nan]], np.float32)
    assert tuning.balance(Targets(values, ["a", "b", "c"], False)).tolist() == [1.0, 1.0, 1.0]


def test_the_mean_auroc_counts_pairs_of_known_images():
    nan = float("nan")
    values = np.array([[1, nan], [0, 1], [0, 0], [nan, 1], [1, 0]], np.float32)
    scores = np.random.default_rng(0).random((5, 2)).astype(np.float32)
    expected = np.mean([_auroc(scores[values[:, o] == 1, o], scores[values[:, o] == 0, o]) for o in range(2)])
    targets = Targets(values, ["a", "b"], False)
    assert tuning.mean_auroc(scores, targets, [0, 1]) == pytest.approx(expected)
    expected = _auroc(scores[values[:, 1] == 1, 1], scores[values[:, 1] == 0, 1])
    assert tuning.mean_auroc(scores, targets, [1]) == pytest.approx(expected)


def test_logits_are_those_of_single_images_and_probabilities_their_softmax_or_sigmoid():
    store = Drawn(50)
    model = _tuned(store).model
    rows = store.rows[::-1].copy()
    values = tuning.logits(model, store, rows, edge=EDGE)
    for place in (0, 127, 128, 149):
        image = torch.from_numpy(store.pixels[rows[place : place + 1]])
        np.testing.assert_allclose(model((image - 0.25) / 0.25).detach().numpy()[0], values[place], atol=1e-5)
    chances = predict(model, store, rows, edge=EDGE, exclusive=True)
    np.testing.assert_allclose(chances, np.exp(values) / np.exp(values).sum(1, keepdims=True), rtol=1e-5)
    chances = predict(model, store, rows, edge=EDGE, exclusive=False)
    np.testing.assert_allclose(chances, 1 / (1 + np.exp(-values)), rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "recipe", "steps"),
    [
        (320, Recipe(), 150),  # 15 passes of 10 batches
        (40, Recipe(), 100),  # 19, but at least 100
        (10, Recipe(epochs=120), 120),  # one batch a pass
        (100000, Recipe(), 1000),
        (100, Recipe(epochs=0.5, batch_size=10, least_steps=1), 5),
    ],
)
def test_the_planned_steps_are_those_by_hand(images, recipe, steps):
    assert recipe.steps(images) == steps


def test_the_learning_rate_warms_up_then_falls_to_nothing_and_the_head_has_its_own(monkeypatch):
    rates = []
    monkeypatch.setattr(tuning, "set_rate", lambda optimizer, factor: rates.append((factor, optimizer.param_groups)))
    _tuned(recipe=replace(SHORT, least_steps=40, most_steps=40, patience=99))
    factors = [factor for factor, _ in rates]
    assert factors[:2] == pytest.approx([0.25, 0.75])  # two of 40 steps
    assert factors[2] > 0.99
    assert sorted(factors[2:], reverse=True) == factors[2:]
    assert factors[-1] < 0.01
    groups = [(group["base_lr"], group["weight_decay"], {p.ndim for p in group["params"]}) for group in rates[0][1]]
    assert groups == [(5e-4, 0.05, {4}), (5e-4, 0.0, {1}), (5e-3, 0.05, {2}), (5e-3, 0.0, {1})]


def test_every_step_is_told(heard):
    _tuned(store=Drawn(9))
    assert heard == [progress.Done("fine-tuning", step, 6) for step in range(1, 7)]


def test_real_files_with_ct_train(hospitals, tmp_path):
    from fedssl.data.indexing.ingest import Decoding

    store = Store(tmp_path, Source(hospitals), Decoding(32)).open()
    rows, entries = join_labels(store, read_table(hospitals / "labels.csv"), [LABEL])
    result = finetune(
        _encoder(),
        store,
        rows,
        classes_of(entries[LABEL].tolist()),
        store.column("patient")[rows],
        SHORT,
        edge=24,
        seed=0,
    )
    assert len(result.curve) == 4
    assert predict(result.model, store, rows[:5], edge=24, exclusive=True).shape == (5, 2)


def test_an_impossible_recipe_is_refused_with_every_value_named():
    impossible = {
        "part": "tail",
        "lr": 0.0,
        "head_lr": math.nan,
        "weight_decay": -1.0,
        "epochs": math.inf,
        "least_steps": 0,
        "most_steps": 0,
        "batch_size": 0,
        "checks": -1,
        "patience": 0,
        "validation": 1.0,
        "precision": "fp8",
    }
    with pytest.raises(ConfigError) as refused:
        Recipe(**impossible)
    assert all(f"finetune.{name}={value} must be" in str(refused.value) for name, value in impossible.items())
    assert "study." not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^finetune.least_steps=100 must be at most most_steps"):
        Recipe(most_steps=99)


def test_labels_that_teach_nothing_are_refused():
    store = Drawn()
    for targets in (classes_of(["a"] * 45), Targets(np.full((45, 1), np.nan, np.float32), ["x"], False)):
        with pytest.raises(DataError, match="45 images to learn from are all the same"):
            _tuned(store, targets=targets)
    same = np.flatnonzero(store.bright)
    with pytest.raises(DataError, match="decide when to stop"):
        _tuned(store, validate=(same, store.targets.take(same)))


def test_a_training_that_diverges_is_explained():
    with pytest.raises(ConfigError, match=r"not finite.*Lower finetune.lr"):
        _tuned(recipe=replace(SHORT, head_lr=1e30, lr=1e30))
    for patients, message in ((9, "The loss is not finite in step 1 of 6"), (15, "gives values that are not finite")):
        store = Drawn(patients)
        store.pixels[:] = np.nan
        with pytest.raises(ConfigError, match=message):
            _tuned(store)
