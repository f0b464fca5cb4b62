"""Every file of configs/method: what it may share, and three rounds of it on synthetic hospitals."""

import math

import pytest
import torch

from fedssl.build import build_method
from fedssl.checkpoint import load_checkpoint
from fedssl.collapse import diagnose
from fedssl.config import CONFIG_FOLDER, load
from fedssl.data.batches import ViewBatch
from fedssl.errors import FederationError
from fedssl.label_efficiency import evaluate_run
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from fedssl.update import load_shared_state, shared_state
from simulations.run import simulate

# A new method needs a line here: what of it may leave a hospital is a decision, not an accident.
MAY_LEAVE = {
    "contrastive_clustering": {"encoder", "projector", "prototypes"},
    "simclr": {"encoder", "projector"},
    "swav": {"encoder", "projector", "prototypes"},
    "moco": {"encoder", "projector"},
    "byol": {"encoder", "projector", "predictor"},
    "barlow": {"encoder", "projector"},
    "relic": {"encoder", "projector", "predictor"},
    "hybrid": {"encoder", "prototypes", "base.projector", "classifier"},
    "private_clustering": {"encoder", "projector", "prototypes", "potentials", "centre"},
}
MOVED_BY_VOTES = {"private_clustering": {"potentials", "centre"}}  # and not by gradients
METHODS = sorted(path.stem for path in (CONFIG_FOLDER / "method").glob("*.yaml"))


def _choice(method):
    return [f"method={method}", *(["method.classes=[0,1]"] if method == "hybrid" else [])]


def _built(method, *more):
    small = ["heads.num_prototypes=8", "heads.hidden=16", "heads.width=8"]
    return build_method(load(["data.root=.", "encoder=tiny", *_choice(method), *small, *more]))


def _batch(method, count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(count, 1, edge, edge, generator=generator) for edge in (32, 32, 24)]
    return ViewBatch(views, torch.zeros(2, count, dtype=torch.long), torch.arange(count) % 2)


@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_a_site_is_what_was_decided_and_nothing_else(method):
    built = _built(method)
    built.train()
    built.begin_round()
    built.begin_step(0.5)
    built.loss(_batch(built)).total.backward()
    state = shared_state(built)
    rooms = {".".join(name.split(".")[:2]) if name.startswith("base.") else name.split(".")[0] for name in state}
    assert rooms == MAY_LEAVE[method]
    buffers = {name for name, _ in built.named_buffers()}
    assert not buffers & set(state)
    learned = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    # all that learns is shared; slow copies, queues and statistics are not
    assert set(state) == learned | MOVED_BY_VOTES.get(method, set())
    assert not any("target" in name or "queue" in name or "running" in name for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_state_round_trips_into_a_method_of_another_seed(method):
    source, target = _built(method), _built(method, "seed=7")
    load_shared_state(target, shared_state(source))
    for model in (source, target):
        model.begin_round()
    first, second = (model.loss(_batch(model)) for model in (source, target))
    assert torch.equal(first.total, second.total)
    assert set(first.terms) == set(source.terms)


@pytest.mark.parametrize("method", METHODS)
def test_a_round_begins_without_anything_of_the_round_before(method):
    used, fresh = _built(method), _built(method)
    used.begin_round()
    for step in range(3):
        used.begin_step(step / 3)
        used.loss(_batch(used, seed=step + 1))
    load_shared_state(used, shared_state(fresh))
    for model in (used, fresh):
        model.begin_round()
        model.begin_step(0.0)
    assert torch.equal(used.loss(_batch(used)).total, fresh.loss(_batch(fresh)).total)


@pytest.mark.parametrize("method", METHODS)
def test_three_rounds_on_synthetic_hospitals_are_finite_and_do_not_collapse(method, tiny, tmp_path):
    run = tmp_path / "run"
    simulate([*tiny, *_choice(method), "data.sites=[EAST,WEST]", "federation.rounds=3", f"run_dir={run}"])
    rows = read_jsonl(RunFolder(run).metrics)
    assert len(rows) == 6
    model = _built(method)
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert set(model.terms) <= set(row)
        facts = {"num_prototypes": model.num_prototypes, "width": model.width, "samples": int(row["images"])}
        told = {name: value for name, value in row.items() if name != "clustering"}  # above ln K until codes settle
        assert diagnose(told, **facts) == []
    state = load_checkpoint(RunFolder(run).last).state
    assert {key for key in state if not torch.isfinite(state[key]).all()} == set()
    start = shared_state(build_method(load([*tiny, *_choice(method)])))
    assert start.keys() == state.keys()
    # w = 0.5 without labels: the classifier is shared, but nothing has moved it
    still = {name for name in state if torch.equal(start[name], state[name])}
    assert still == ({"classifier.weight", "classifier.bias"} if method == "hybrid" else set())


@pytest.mark.parametrize("pairing", ["patient", "series"])
def test_other_pairings_train_too(pairing, tiny, tmp_path):
    run = tmp_path / "run"
    simulate([*tiny, "method=simclr", f"pairing={pairing}", "data.sites=[EAST,WEST]", f"run_dir={run}"])
    assert all(math.isfinite(row["loss"]) for row in read_jsonl(RunFolder(run).metrics))


def test_a_hybrid_federation_learns_from_the_labels_of_its_training_patients_alone(tiny, hospitals, tmp_path):
    run = tmp_path / "run"
    labels = [f"data.labels={hospitals / 'labels.csv'}", "data.label=lesion"]
    simulate([*tiny, *_choice("hybrid"), *labels, f"run_dir={run}"])
    rows = read_jsonl(RunFolder(run).metrics)
    assert all(0 < row["supervised"] < 5 for row in rows)
    start = shared_state(build_method(load([*tiny, *_choice("hybrid")])))
    state = load_checkpoint(RunFolder(run).last).state
    assert not torch.equal(state["classifier.weight"], start["classifier.weight"])
    assert evaluate_run(run, hospitals / "labels.csv", {"label": "lesion"})["scores"]


def test_a_label_table_that_does_not_fit_is_said_before_training(tiny, tmp_path):
    (tmp_path / "labels.csv").write_text("file,finding\nEAST/nobody/000.dcm,1\n")
    settings = [*tiny, *_choice("hybrid"), f"data.labels={tmp_path / 'labels.csv'}", "data.label=finding"]
    with pytest.raises(FederationError, match="None of the 1 labels belongs to an image"):
        simulate([*settings, f"run_dir={tmp_path / 'run'}"])
