"""Hybrid training: a self-supervised method plus a supervised loss where a site has labels."""

import pytest
import torch
from torch.nn import functional as F

from fedssl.build import build_method
from fedssl.config import load
from fedssl.data.batches import ViewBatch
from fedssl.errors import ConfigError
from fedssl.optim import adamw

_SMALL = ["data.root=.", "encoder=tiny", "heads.num_prototypes=8", "heads.hidden=16", "heads.width=8"]
BASES = ["contrastive_clustering", "simclr", "swav", "moco", "byol", "barlow", "relic"]


def _hybrid(base="contrastive_clustering", weight=0.5):
    return build_method(
        load([*_SMALL, "method=hybrid", f"method.base={base}", "method.classes=[a,b]", f"method.weight={weight}"])
    )


def _batch(seed, labels=(0, 1, -1, -1, 1, 0, -1, 1)):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(len(labels), 1, edge, edge, generator=generator) for edge in (32, 32, 24)]
    return ViewBatch(views, torch.zeros(2, len(labels), dtype=torch.long), torch.tensor(labels))


def _train(method, labels=None):
    optimizer = adamw(method, lr=1e-3, weight_decay=0.1)
    method.train()
    method.begin_round()
    for step in range(3):
        method.begin_step(step / 3)
        batch = _batch(step) if labels is None else _batch(step, labels)
        optimizer.zero_grad()
        method.loss(batch).total.backward()
        optimizer.step()
        method.after_step()
    return method


@pytest.mark.parametrize("base", BASES)
def test_weight_zero_is_the_pure_method_bit_for_bit(base):
    pure = _train(build_method(load([*_SMALL, f"method={base}"])))
    hybrid = _train(_hybrid(base, weight=0.0))
    expected = dict(pure.named_parameters())
    found = dict(hybrid.base.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("base", BASES)
def test_a_site_without_labels_trains_the_pure_method(base):
    pure = _train(build_method(load([*_SMALL, f"method={base}"])))
    hybrid = _train(_hybrid(base, weight=0.7), labels=(-1,) * 8)
    found = dict(hybrid.base.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in pure.named_parameters())


def test_the_loss_is_the_weighted_sum_and_only_labelled_images_are_classified():
    hybrid = _hybrid("simclr", weight=0.3).eval()
    batch = _batch(1)
    loss = hybrid.loss(batch)
    plain = hybrid.base.loss(batch).total
    rows = [row for row, label in enumerate(batch.label.tolist()) if label >= 0]
    logits = torch.stack([hybrid.classifier(hybrid.encoder(batch.views[0][row][None]))[0] for row in rows])
    supervised = sum(-F.log_softmax(logits[i], 0)[batch.label[row]] for i, row in enumerate(rows)) / len(rows)
    torch.testing.assert_close(loss.total, 0.7 * plain + 0.3 * supervised)
    torch.testing.assert_close(loss.terms["supervised"], supervised.detach())


def test_labels_teach_the_classifier_what_the_images_show():
    hybrid = _hybrid("simclr", weight=1.0)
    optimizer = adamw(hybrid, lr=3e-3, weight_decay=0.0)
    label = torch.arange(16) % 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        image = torch.randn(16, 1, 32, 32, generator=generator) * 0.5 + label[:, None, None, None]
        batch = ViewBatch([image, image.flip(3)], torch.zeros(2, 16, dtype=torch.long), label)
        optimizer.zero_grad()
        loss = hybrid.loss(batch)
        loss.total.backward()
        optimizer.step()
    assert loss.terms["supervised"].item() < 0.1


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("method.classes=[true,false]", "put quotes"),
        ("method.classes=absent", "at least two different labels"),
        ("method.classes=[a,a]", "at least two different labels"),
        ("method.classes=[]", "at least two different labels"),
        ("method.weight=2", "must lie between 0"),
    ],
)
def test_classes_and_weights_that_cannot_be_meant_are_refused(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_method(load([*_SMALL, "method=hybrid", "method.classes=[a,b]", setting]))


def test_hybrid_without_classes_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"method\.classes"):
        load([*_SMALL, "method=hybrid"])


def test_an_unknown_base_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="there are barlow"):
        load([*_SMALL, "method=hybrid", "method.classes=[a,b]", "method.base=simsiam"])
