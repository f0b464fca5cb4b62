"""The hospital's desk with a real agent behind it: policy first, then the manifest, one answer to a question."""

import io
import json
from datetime import date

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedssl import wire
from fedssl.answering import configuration, forget_sites
from fedssl.build import build_method, first_state
from fedssl.config import as_text, fingerprint
from fedssl.deployment.agent import make_desk
from fedssl.deployment.dry_run import dry_run
from fedssl.deployment.settings import SiteKit
from fedssl.frames import Frame, read_frame
from fedssl.order import Order
from fedssl.packing import pack, unpack
from fedssl.site.egress import verify

RUN = "ab" * 8


@pytest.fixture
def plan(tiny):
    kept = [text for text in tiny if not text.startswith("data.root")]
    return [*kept, "training.local_steps=2", "heads.num_prototypes=4"]


@pytest.fixture
def kit(hospitals, plan, tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    own = {"site": "EAST", "server": "localhost:1", "data": str(hospitals / "EAST"), "plan": plan}
    (folder / "site.yaml").write_text(yaml.safe_dump(own))
    policy(folder)
    forget_sites()
    yield SiteKit.read(folder)
    forget_sites()


def policy(folder, **rules):
    told = {"version": 1, "expires": date(2030, 1, 1), **rules}
    (folder / "policy.yaml").write_text(yaml.safe_dump(told))


def question(plan, number=1, *, kind="train", state=None, **changed):
    overrides = as_text(["data.root=unused", *plan])
    config = configuration(overrides)
    order = Order(RUN, number, 2, fingerprint(config), **changed)
    state = state or first_state(config, build_method(config))
    content = wire.write_order(order, pack(state) if kind == "train" else None)
    return Frame({"kind": kind, "overrides": overrides}, content)


def start_of(plan):
    config = configuration(as_text(["data.root=unused", *plan]))
    return first_state(config, build_method(config))


class Answer:
    """What a desk gave, read back from its bytes."""

    def __init__(self, parts):
        self.bytes = b"".join(parts)
        self.content = read_frame(io.BytesIO(self.bytes)).content
        self.reason = str(self.content.config_records["refused"]["reason"]) if "refused" in self.content else ""
        if not self.reason and "state" in self.content:
            self.state = unpack(self.content.array_records["state"], self.content.config_records["layout"])


def manifest(desk):
    return verify(desk.egress.path, desk.egress.anchor)


def test_the_same_question_gets_the_same_bits_without_training_again_also_after_a_kill(kit, plan, heard):
    asked = question(plan)
    first = Answer(make_desk(kit).answer(asked))
    trained = sum("Step" in type(event).__name__ for event in heard)
    assert first.reason == ""
    assert trained > 0
    forget_sites()  # a new process
    desk = make_desk(kit)
    again = Answer(desk.answer(asked))
    assert again.bytes == first.bytes
    assert sum("Step" in type(event).__name__ for event in heard) == trained
    entries = manifest(desk)
    assert [entry["kind"] for entry in entries] == ["train", "train"]
    assert entries[0]["sha256"] == entries[1]["sha256"]
    assert {tensor["name"] for tensor in entries[0]["tensors"]} == set(first.state)


def test_a_round_that_is_over_and_a_second_question_in_a_round_are_refused_as_replays(kit, plan):
    desk = make_desk(kit)
    state = Answer(desk.answer(question(plan))).state
    assert Answer(desk.answer(question(plan, 2, state=state, last=1))).reason == ""
    assert "refuses round 1 as a replay" in Answer(desk.answer(question(plan))).reason
    moved = {name: value + 1 for name, value in state.items()}
    assert "with another state before" in Answer(desk.answer(question(plan, 2, state=moved, last=1))).reason
    assert [entry["kind"] for entry in manifest(desk)] == ["train", "train", "refusal", "refusal"]


def test_column_sums_are_told_for_few_questions_a_round_and_only_where_the_plan_has_them(kit, plan):
    sinkhorn = [*plan, "federation.equipartition=federated-sinkhorn", "federation.sinkhorn_iterations=2"]
    desk = make_desk(kit)

    def sums(settings, potentials=None, **changed):
        asked = question(settings, **changed)
        asked.facts["kind"] = "query.marginals"
        if potentials is not None:
            asked.content["guide"] = ArrayRecord({"potentials": Array(np.full(4, potentials))})
        return Answer(desk.answer(asked))

    assert "tells column sums only with federation.equipartition" in sums(plan).reason
    first = sums(sinkhorn)
    assert first.reason == ""
    assert first.content.array_records["counts"]["sums"].numpy().shape == (4,)
    assert [sums(sinkhorn, potentials=float(one)).reason for one in (0, 1, 2, 1, 0)] == [""] * 5
    assert "was asked 4 times for its column sums" in sums(sinkhorn, potentials=9.0).reason
    assert "an order that cannot be" in sums(sinkhorn, number=-1).reason
    assert Answer(desk.answer(question(sinkhorn))).reason == ""
    assert {entry["kind"] for entry in manifest(desk)} == {"marginals", "refusal", "train"}


@pytest.mark.parametrize("changed", [{"contrast": 2.0}, {"precision": "bfloat16"}])
def test_the_same_state_in_another_order_of_the_same_round_is_refused(kit, plan, changed):
    desk = make_desk(kit)
    assert Answer(desk.answer(question(plan))).reason == ""
    assert "with another state before" in Answer(desk.answer(question(plan, **changed))).reason


@pytest.mark.parametrize("changed", [{"number": 0}, {"number": -1}, {"number": 3}, {"last": 2}, {"last": -1}])
def test_an_order_that_cannot_be_is_refused(kit, plan, changed):
    answer = Answer(make_desk(kit).answer(question(plan, **changed)))
    assert "an order that cannot be" in answer.reason or "asked to train no round" in answer.reason


def test_a_run_name_that_is_none_is_refused_before_anything_is_written(kit, plan):
    asked = question(plan)
    asked.content["order"]["run"] = "x" * 3_000_000
    desk = make_desk(kit)
    assert "an order that cannot be" in Answer(desk.answer(asked)).reason
    assert not (kit.state / "rounds.json").exists()
    assert desk.egress.path.stat().st_size < 3000


def test_the_policy_refuses_before_the_images_are_touched_and_the_manifest_says_so(kit, plan):
    policy(kit.folder, methods=["simclr"])
    desk = make_desk(kit)
    told = Answer(desk.answer(question(plan))).reason
    assert "of policy.yaml, methods: contrastive_clustering is not among simclr" in told
    assert not (kit.state / "rounds.json").exists()
    (entry,) = manifest(desk)
    assert (entry["kind"], entry["reason"], entry["round"]) == ("refusal", told, 1)


def test_a_tensor_that_the_policy_does_not_let_out_stays_and_only_the_reason_leaves(kit, plan):
    policy(kit.folder, tensors=["encoder."])
    desk = make_desk(kit)
    answer = Answer(desk.answer(question(plan)))
    assert "tensors: " in answer.reason
    assert "is not among them" in answer.reason
    assert len(answer.bytes) < 2000
    assert manifest(desk)[0]["tensors"] == []


def test_column_sums_too_are_measured_against_the_caps_of_a_message(kit, plan):
    policy(kit.folder, resources={"upload_mb_per_message": 0.00001})
    asked = question([*plan, "federation.equipartition=federated-sinkhorn"])
    asked.facts["kind"] = "query.marginals"
    desk = make_desk(kit)
    assert "resources.upload_mb_per_message" in Answer(desk.answer(asked)).reason
    (entry,) = manifest(desk)
    assert (entry["kind"], entry["round"], entry["counts"]) == ("refusal", 1, [])


def test_nothing_leaves_when_the_manifest_was_altered(kit, plan, heard):
    desk = make_desk(kit)
    desk.answer(question(plan, 0, kind="query"))
    path = desk.egress.path
    path.write_bytes(path.read_bytes().replace(b"presence", b"absence_"))
    answer = Answer(desk.answer(question(plan)))
    assert "cannot write its egress manifest, so nothing leaves" in answer.reason
    assert any("Entry 0 of the egress manifest is damaged" in str(event) for event in heard)


def test_settings_that_refer_to_others_are_refused_and_their_values_are_not_told(kit, plan, monkeypatch):
    monkeypatch.setenv("PACS_SECRET", "open-sesame")
    asked = question(plan)
    asked.facts["overrides"] += " 'name=${oc.env:PACS_SECRET}'"
    answer = Answer(make_desk(kit).answer(asked))
    assert "they could refer to what is none of its business" in answer.reason
    assert b"sesame" not in answer.bytes


@pytest.mark.parametrize(
    "override",
    ["method._target_=fedssl.storage.write_json", "hydra.searchpath=[file:///tmp]", "+experiment=../../../tmp/x"],
)
def test_settings_that_could_call_or_name_anything_are_refused(kit, plan, override):
    asked = question(plan)
    asked.facts["overrides"] += f" {override}"
    assert "does not take" in Answer(make_desk(kit).answer(asked)).reason


def test_the_server_does_not_say_how_the_hospitals_machine_decodes_or_where_anything_lies(kit, plan, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    extra = [f"data.store={elsewhere}", f"run_dir={elsewhere}", "data.workers=64", "data.budget_gb=0.000001",
             f"encoder.weights={elsewhere}", f"data.labels={elsewhere}", "data.burned_in=allow"]  # fmt: skip
    answer = Answer(make_desk(kit).answer(question([*plan, *extra], state=start_of(plan))))
    assert answer.reason == ""
    assert not elsewhere.exists()


_NONSENSE = [{}, {"kind": 3, "overrides": ""}, {"kind": "train"}, {"kind": "train", "overrides": "a=1"}]


@pytest.mark.parametrize("facts", _NONSENSE)
def test_a_question_that_makes_no_sense_gets_a_sentence(kit, facts):
    answer = Answer(make_desk(kit).answer(Frame(facts, RecordDict({"order": ConfigRecord({"protocol": 1})}))))
    assert answer.reason
    assert str(kit.folder) not in answer.reason


def test_another_fingerprint_is_refused_with_both(kit, plan):
    asked = question([*plan, "seed=1"])
    asked.facts["overrides"] = question(plan).facts["overrides"]
    assert "use equal versions and overrides" in Answer(make_desk(kit).answer(asked)).reason


def test_a_dry_run_shows_what_would_leave_and_leaves_nothing_behind(kit, plan):
    entry = dry_run(kit)
    assert entry["reason"] == ""
    config = configuration(as_text(["data.root=unused", *plan]))
    expected = first_state(config, build_method(config))
    assert {one["name"]: tuple(one["shape"]) for one in entry["tensors"]} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    assert sum(one["bytes"] for one in entry["tensors"]) == sum(value.numel() * 4 for value in expected.values())
    assert not (kit.state / "egress").exists()
    assert list((kit.state.parent).rglob("answer_*")) == []


def test_a_dry_run_of_a_private_site_spends_nothing(kit, hospitals, plan):
    own = yaml.safe_load((kit.folder / "site.yaml").read_text())
    own["plan"] = [*plan, "privacy=patient", "method=private_clustering", "privacy.patients=40", "privacy.batch=8"]
    (kit.folder / "site.yaml").write_text(yaml.safe_dump(own))
    entry = dry_run(SiteKit.read(kit.folder))
    assert entry["tensors"]
    assert "epsilon" in entry["metrics"]
    assert not list(kit.state.rglob("ledger.jsonl"))


def test_the_agent_says_what_it_does_in_its_state_file(kit, plan):
    from fedssl.deployment.agent import _tell

    desk = make_desk(kit)
    desk.answer(question(plan))
    _tell(kit, desk, "waiting")
    told = json.loads((kit.state / "agent.json").read_text())
    assert (told["state"], told["round"], told["kind"]) == ("waiting", 1, "train")
    assert len(told["policy"]) == 64
