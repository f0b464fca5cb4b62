"""The configuration: composed, checked at once, hashed."""

import pytest

from fedssl.build import build_method
from fedssl.config import CONFIG_FOLDER, as_text, fingerprint, instantiate_node, load, overrides_of
from fedssl.errors import ConfigError

ROOT = "data.root=somewhere"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.batchsize=3", "did you mean training.batch_size"),
        ("federation.round=3", "did you mean federation.rounds"),
        ("+training.extra=1", "unknown"),
        ("encoder=resnet19", "there are resnet18"),
        ("experiment=demo", "with a plus"),
        ("verbose", "not key=value"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(override, hint):
    with pytest.raises(ConfigError, match=hint.replace("+", r"\+")):
        load([ROOT, override])


def test_a_missing_root_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"data\.root=FOLDER"):
        load([])


def test_all_impossible_values_are_reported_at_once():
    with pytest.raises(ConfigError) as problem:
        load([ROOT, "training.batch_size=1", "federation.rounds=0", "training.precision=fp8", "data.test_fraction=1.5"])
    for key in ("training.batch_size", "federation.rounds", "training.precision", "data.test_fraction"):
        assert key in str(problem.value)


def test_the_fingerprint_ignores_the_order_of_overrides_paths_and_devices():
    first = fingerprint(load([ROOT, "seed=1", "training.batch_size=8"]))
    assert (
        fingerprint(load(["training.batch_size=8", "data.root=elsewhere", "seed=1", "training.device=cpu", "name=x"]))
        == first
    )
    assert fingerprint(load([ROOT, "seed=2", "training.batch_size=8"])) != first
    assert fingerprint(load([ROOT, "seed=1", "training.batch_size=8", "optim.lr=0.1"])) != first


def test_overrides_survive_the_one_string_that_flower_carries():
    overrides = ["data.root=/data/site a", "name='my run'", "data.sites=[A,B]"]
    assert overrides_of(as_text(overrides)) == overrides


def test_a_path_may_hold_blanks_commas_and_brackets():
    assert load(["data.root=/data/MR (2020), new's"])["data"]["root"] == "/data/MR (2020), new's"


def test_a_target_hidden_inside_a_setting_is_refused():
    with pytest.raises(ConfigError, match="refused"):
        build_method(load([ROOT, "encoder=tiny", "encoder.name={_target_:os.getcwd}"]))


@pytest.mark.parametrize(
    "target", ["fedssl.storage.os.getcwd", "os.system", "subprocess.run", "builtins.eval", "fedsslx.evil"]
)
def test_only_our_own_and_torchs_optimisers_may_be_built_from_a_configuration(target):
    with pytest.raises(ConfigError, match="refused"):
        instantiate_node({"_target_": target})


def test_a_wrong_argument_of_a_method_is_explained():
    config = load([ROOT, "encoder=tiny"])
    config["method"]["temprature"] = 1
    with pytest.raises(ConfigError, match="temprature"):
        build_method(config)


@pytest.mark.parametrize("path", sorted((CONFIG_FOLDER / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_composes(path):
    assert load([ROOT, f"+experiment={path.stem}"])["name"] == path.stem


@pytest.mark.parametrize("path", sorted((CONFIG_FOLDER / "encoder").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_encoder_file_builds(path):
    assert build_method(load([ROOT, f"encoder={path.stem}"])).width > 0


def test_sites_whose_names_are_numbers_stay_names():
    data = load(["data.root=.", "data.sites=[1,2]", "data.unseen_sites=[3]"])["data"]
    assert data["sites"] == ["1", "2"]
    assert data["unseen_sites"] == ["3"]
