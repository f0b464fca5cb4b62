"""Settings are refused before work begins, and what a run asks of a hospital has limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedssl.build import build_method, check_settings
from fedssl.build_site import build_agent
from fedssl.config import fingerprint, load
from fedssl.data.batches import Batches, ViewBatch
from fedssl.errors import ConfigError, FederationError
from fedssl.methods.simclr import SimCLR
from fedssl.optim import Schedule
from fedssl.order import Order

_SMALL = ["data.root=.", "encoder=tiny", "heads.num_prototypes=8", "heads.hidden=16", "heads.width=8"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["augment.crops.global.count=1"],
        ["optim.schedule=foo"],
        ["optim.warmup=abc"],
        ["pairing=[image]"],
        ["collapse=null"],
        ["heads.num_prototypes=0"],
        ["heads.width=0"],
        ["method=moco", "method.momentum=2"],
        ["method=simclr", "method.temperature=0"],
        ["method.epsilon=0"],
        ["method.modalities=partitioned"],  # five blocks of eight prototypes
        ["method.modalities=apart"],
        ["method.blocks=[ct,ct]"],
        ["method=simclr", "collapse.contrast=2"],
        ["method=simclr", "collapse.reseed=true"],
        ["encoder.options={checkpoint_path: /etc/passwd}"],
        ["encoder.options.pretrained=true"],
    ],
)
def test_a_setting_that_fits_nothing_is_refused_before_work_begins(overrides):
    with pytest.raises(ConfigError):
        check_settings(load([*_SMALL, *overrides]))


def test_options_of_an_encoder_are_set_one_by_one():
    config = load([*_SMALL, "encoder.options.drop_path_rate=0.1"])
    assert config["encoder"]["options"] == {"drop_path_rate": 0.1}
    check_settings(config)


def test_a_modality_gets_its_own_change_without_a_plus():
    config = load([*_SMALL, "augment.modalities.ct.flip=true"])
    assert config["augment"]["modalities"] == {"ct": {"flip": True}}


@pytest.mark.parametrize("encoder", ["resnet18", "vit_small_patch16_224"])
def test_an_experiment_takes_the_encoder_that_is_chosen(encoder):
    assert load(["data.root=.", "+experiment=demo", f"encoder={encoder}"])["encoder"]["name"] == encoder
    assert load(["data.root=.", "+experiment=demo", "optim=lars"])["optim"]["lr"] == 0.15


def test_the_column_of_labels_is_part_of_what_a_run_is():
    assert fingerprint(load([*_SMALL, "data.label=a"])) != fingerprint(load([*_SMALL, "data.label=b"]))


@pytest.fixture
def hospital(hospitals, tmp_path, monkeypatch):
    """A hospital's own node with a table of labels, and the rows of the table."""
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path))
    files = sorted(path.relative_to(hospitals / "EAST") for path in (hospitals / "EAST").rglob("*.dcm"))
    rows = [f"{file},{file.parts[0]},{'ab'[number % 2]}" for number, file in enumerate(files)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,patient,finding", *rows]))
    return {"data-dir": str(hospitals / "EAST"), "site": "EAST", "labels": str(tmp_path / "labels.csv")}


def test_the_hospital_says_which_column_holds_labels_whatever_the_run_asks(hospital, tiny):
    asked = load([*tiny, "method=hybrid", "method.classes=[EAST-0001,nobody]", "data.label=patient"])
    agent = build_agent(asked, hospital | {"label": "finding"})
    assert set(agent.labels.tolist()) == {"a", "b"}


def test_a_class_that_fewer_than_three_patients_share_teaches_nothing(hospital, tiny):
    asked = load([*tiny, "method=hybrid", "method.classes=[EAST-0001,EAST-0002,nobody]"])
    agent = build_agent(asked, hospital | {"label": "patient"})
    batches = Batches(agent.images, 8, 1.0, seed=0, labels=agent.labels, classes=agent.method.classes)
    assert all((batch.label == -1).all() for batch in batches)


def test_a_term_that_a_method_does_not_declare_never_leaves_the_site(hospital, tiny, monkeypatch):
    agent = build_agent(load([*tiny, "method=simclr"]), hospital)
    plain = SimCLR.loss

    def with_a_pixel(self, batch):
        loss = plain(self, batch)
        return replace(loss, terms={**loss.terms, "pixel": batch.views[0][0, 0, 0, 0]})

    monkeypatch.setattr(SimCLR, "loss", with_a_pixel)
    from fedssl.update import shared_state

    with pytest.raises(FederationError, match="does not declare"):
        agent.train(Order("ab" * 8, 1, 2, "f"), shared_state(agent.method))


def test_a_round_with_stochastic_depth_is_a_function_of_its_seed(hospital, tiny):
    settings = load([*tiny, "method=simclr", "encoder.options.drop_path_rate=0.5"])
    from fedssl.update import shared_state

    start = shared_state(build_method(settings))
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(build_agent(settings, hospital).train(Order("ab" * 8, 1, 2, "f"), start).state)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert any(not torch.equal(ends[0][name], start[name]) for name in start)


def test_the_only_image_of_its_modality_gets_no_code():
    method = build_method(load([*_SMALL, "method.modalities=per-modality"]))
    scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    codes = method.equipartition.codes(scores, torch.tensor([1, 1, 1, 3, 1, 1]))
    np.testing.assert_allclose(codes.sum(1), [1, 1, 1, 0, 1, 1], atol=1e-5)
    views = [torch.randn(6, 1, 32, 32) for _ in range(2)]
    modality = torch.tensor([[1, 1, 1, 3, 1, 1]] * 2)
    assert torch.isfinite(method.loss(ViewBatch(views, modality, torch.full((6,), -1))).total)


def test_a_schedule_needs_a_share():
    with pytest.raises(ConfigError, match="warm-up between 0 and 1"):
        Schedule("cosine", 1.5)
