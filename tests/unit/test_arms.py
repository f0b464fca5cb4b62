"""The arms of a comparison: as many images each, and every folder holds what its name says."""

import json

import numpy as np
import pytest

from fedssl.build_images import open_images, simulated_sites
from fedssl.config import load
from fedssl.data.batches import Batches
from fedssl.errors import ConfigError
from fedssl.evidence.frozen import freeze, task_key, weights_key
from fedssl.evidence.settings import tasks_of
from fedssl.overrides import quoted
from simulations import study as studies
from simulations.arms import only_one_site


def _seen(overrides, store):
    """Images that all sites see in a round, batch by batch."""
    config = load(overrides)
    training = config["training"]
    return sum(
        len(rows)
        for images in simulated_sites(config, store).values()
        for rows, _ in Batches(
            images,
            training["batch_size"],
            training["local_epochs"],
            0,
            config["pairing"],
            steps=training["local_steps"],
        ).positions()
    )


@pytest.mark.parametrize(
    "more",
    [
        ["training.batch_size=16"],
        ["training.batch_size=64"],
        ["training.batch_size=32", "training.local_epochs=2.5"],
        ["training.batch_size=32", "training.local_steps=3"],
        ["training.batch_size=8", "pairing=patient"],
        ["training.batch_size=16", "data.sites=[EAST,SOUTH]"],
    ],
)
def test_a_site_alone_and_all_pooled_see_as_many_images_as_the_federation(tiny, more):
    overrides = [*tiny, *more]
    config = load(overrides)
    store = open_images(config)
    sites = simulated_sites(config, store)
    federated = _seen(overrides, store)
    for site in [None, *sites]:
        own = only_one_site(config, sites, overrides, site)
        batch = load(own)["training"]["batch_size"]
        assert abs(_seen(own, store) - federated) <= batch / 2  # half a batch: no fewer can be added


def test_a_federation_that_takes_some_sites_a_round_is_matched_on_average(tiny):
    overrides = [*tiny, "federation.participation=0.5", "federation.min_sites=1", "training.batch_size=8"]
    config = load(overrides)
    store = open_images(config)
    own = only_one_site(config, simulated_sites(config, store), overrides, None)
    assert _seen(own, store) == pytest.approx(_seen(overrides, store) / 2, abs=4)


@pytest.mark.parametrize("name", ["3", "a,b", "ST MARY'S", "back\\", 'q"x', "x{y}", "a${b}", "[c]", " d "])
def test_any_name_of_a_site_goes_through_the_settings_unchanged(name):
    config = load(["data.root=/x", f"simulation.only={quoted(name)}", f"data.sites=[{quoted(name)},b]"])
    assert config["simulation"]["only"] == name
    assert config["data"]["sites"] == [name, "b"]


@pytest.mark.parametrize(
    "more",
    [
        ["optim.lr=0.01"], ["seed=7"], ["training.threads=2"], ["federation.patience=3"], ["data.test_fraction=0.5"],
        ["training.precision=bf16", "augment.crops.local.edge=24"], ["data.sites=[EAST,SOUTH]"],
    ],
)  # fmt: skip
def test_what_decides_weights_decides_their_folder(tiny, more):
    store = open_images(load(tiny))
    assert weights_key(load([*tiny, *more]), store) != weights_key(load(tiny), store)


def test_start_weights_of_another_content_make_another_folder_and_a_path_alone_does_not(tiny, tmp_path):
    store = open_images(load(tiny))
    keys = []
    for name, content in [("a", b"1"), ("b", b"1"), ("c", b"2")]:
        (tmp_path / f"{name}.npz").write_bytes(content)
        keys.append(weights_key(load([*tiny, f"encoder.weights={tmp_path / name}.npz"]), store))
    assert keys[0] == keys[1]
    assert len({weights_key(load(tiny), store), keys[1], keys[2]}) == 3


@pytest.mark.parametrize("more", [["evaluation.seeds=3"], ["federation.wait_s=5"], ["run_dir=elsewhere"], ["name=x"]])
def test_what_does_not_decide_weights_leaves_the_folder(tiny, more):
    store = open_images(load(tiny))
    assert weights_key(load([*tiny, *more]), store) == weights_key(load(tiny), store)


def test_a_protocol_names_no_path_of_the_machine(tiny, tmp_path):
    (tmp_path / "bit.npz").write_bytes(b"1")
    config = load([*tiny, f'study.variants={{a: ["encoder.weights={tmp_path}/bit.npz"]}}'])
    freeze(config, open_images(config), tmp_path)
    assert str(tmp_path) not in (tmp_path / "protocol.json").read_text()


def test_fits_belong_to_images_labels_patients_and_splits(tiny):
    from dataclasses import replace

    config = load(tiny)
    store = open_images(config)
    (task,) = tasks_of(config, store).values()
    known = task_key(store, task)
    test = task.tests["unseen site"]
    other = replace(task.images, rows=np.where(test, np.roll(task.rows, 1), task.rows))
    moved = replace(task.images, patients=task.patients + 1)
    assert task_key(store, replace(task, images=other)) != known
    assert task_key(store, replace(task, images=moved)) != known
    assert task_key(store, replace(task, train=task.train & (np.cumsum(task.train) > 1))) != known
    assert task_key(store, replace(task, tests={"unseen site": test})) != known


@pytest.mark.parametrize(
    "changed",
    ["data.test_fraction=0.0", "data.unseen_sites=[]", "simulation.partition=iid", "encoder=resnet18", "seed=3",
     "encoder.in_chans=3", "federation.sites=[EAST]", "federation.participation=0.5", "evaluation.seeds=1",
     "privacy=patient"],
)  # fmt: skip
def test_a_variant_changes_neither_images_nor_splits_nor_the_encoder(tiny, changed):
    config = load([*tiny, f'study.variants={{a: ["{changed}"]}}'])
    with pytest.raises(ConfigError, match=f"must not change {changed.split('=', maxsplit=1)[0]}"):
        studies._check(config)


def test_a_variant_may_change_the_pretraining(tiny):
    allowed = ["method=simclr", "optim.lr=0.01", "aggregation=adam", "encoder.weights=/x.npz"]
    studies._check(load([*tiny, f"study.variants={{a: {json.dumps(allowed)}}}"]))
