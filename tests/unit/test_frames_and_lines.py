"""Messages between relay and agent: nothing is lost, nobody else is answered, and a killed agent is asked again."""

import contextlib
import io
import json
import os
import socket
import struct
import threading
from math import inf, isnan, nan

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedssl import relay as relaying
from fedssl.deployment.lines import Lines, listen
from fedssl.deployment.replays import Replays
from fedssl.deployment.users import uid_of
from fedssl.errors import ConfigError, DataError, FederationError, FedsslError, PolicyError
from fedssl.frames import read_frame, send_frame, write_frame
from fedssl.relay import relay

ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bits": np.array([1, 65535], dtype=np.uint16),
    "empty": np.zeros((0, 4)),
    "number": np.array(2.5),
}


def content_of(arrays=ARRAYS, config=None, metrics=None):
    return RecordDict(
        {
            "state": ArrayRecord({name: Array(value) for name, value in arrays.items()}),
            "layout": ConfigRecord(config or {"text": "ä", "flag": True, "list": [1, 2], "raw": b"\x00\xff"}),
            "metrics": MetricRecord(metrics or {"loss": 0.1, "steps": 3}),
        }
    )


def frame_of(content, facts=None):
    return b"".join(write_frame(facts or {"kind": "train"}, content))


def test_a_frame_brings_back_every_array_and_value_bit_for_bit():
    found = read_frame(io.BytesIO(frame_of(content_of(), {"kind": "train", "overrides": "a=1"})))
    assert found.facts == {"kind": "train", "overrides": "a=1"}
    for name, value in ARRAYS.items():
        again = found.content.array_records["state"][name].numpy()
        assert again.dtype == value.dtype
        assert again.shape == value.shape
        assert again.tobytes() == value.tobytes()
    assert dict(found.content.config_records["layout"]) == dict(content_of().config_records["layout"])
    assert dict(found.content.metric_records["metrics"]) == {"loss": 0.1, "steps": 3}


def test_a_frame_brings_numbers_that_are_none():
    metrics = read_frame(io.BytesIO(frame_of(content_of(metrics={"a": nan, "b": inf})))).content.metric_records[
        "metrics"
    ]
    assert isnan(metrics["a"])
    assert metrics["b"] == inf


@given(st.binary(max_size=200))
@hypothesis_settings(deadline=None, max_examples=200)
def test_what_is_no_frame_is_refused_with_a_sentence(noise):
    if noise:
        with pytest.raises(FederationError, match="was sent"):
            read_frame(io.BytesIO(noise))
    else:
        assert read_frame(io.BytesIO(noise)) is None


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@hypothesis_settings(deadline=None, max_examples=300)
def test_a_damaged_or_cut_frame_raises_nothing_but_its_own_error(place, bit):
    whole = bytearray(frame_of(content_of()))
    at = int(place * len(whole))
    cut = bytes(whole[:at])
    whole[at] ^= 1 << bit
    for data in (bytes(whole), cut):
        with contextlib.suppress(FederationError):
            read_frame(io.BytesIO(data))


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    frame = frame_of(content_of({"w": np.zeros(1000)}))
    stream = io.BytesIO(frame)
    with pytest.raises(FederationError, match=r"message of 0 MB where 0 MB are allowed"):
        read_frame(stream, most_bytes=7999)
    assert stream.tell() < 100


def test_a_message_of_two_gigabytes_is_refused_before_a_byte_of_it_is_read():
    array = ["float32", "float32", [500_000_000], "numpy.ndarray", 2_000_000_000]
    header = json.dumps({"facts": {}, "records": [["state", "arrays", [array]]]}).encode()
    start = struct.pack(">8sIQ", b"fedssl/1", len(header), 2_000_000_000)
    stream = io.BytesIO(start + header)
    with pytest.raises(FederationError, match="was sent a message of 2000 MB where 500 MB are allowed"):
        read_frame(stream, most_bytes=500_000_000)
    assert stream.tell() == len(start)


class Agent:
    """A real socket with an agent behind it that adds one to an array, and can be made to die in the middle."""

    def __init__(self, path, allowed=None, most=10**9, deaths=0):
        self.path, self.deaths, self.asked = path, deaths, 0
        self.allowed = frozenset({os.getuid()} if allowed is None else allowed)
        self.most = most
        self.open()

    def open(self):
        self.line = listen(self.path)
        lines = Lines(self.line, self.allowed, self.answer, lambda: self.most)
        self.thread = threading.Thread(target=lines.serve, daemon=True)
        self.thread.start()

    @staticmethod
    def refused(error):
        return write_frame({}, RecordDict({"refused": ConfigRecord({"site": "A", "reason": str(error)})}))

    def answer(self, question):
        if isinstance(question, FedsslError):
            return self.refused(question)
        self.asked += 1
        if self.asked <= self.deaths:
            raise ConnectionResetError
        value = question.content.array_records["state"]["w"].numpy()
        return write_frame({}, RecordDict({"state": ArrayRecord({"w": Array(value + 1)})}))

    def close(self):
        self.line.shutdown(socket.SHUT_RDWR)
        self.line.close()
        self.thread.join(5)


@pytest.fixture
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("s") / "a.sock"


def ask(path, **more):
    return relay(str(path), {"kind": "train", "overrides": ""}, content_of(), **({"patience_s": 20.0} | more))


def test_the_relay_brings_a_question_to_the_agent_and_its_answer_back(path):
    agent = Agent(path)
    assert (ask(path).array_records["state"]["w"].numpy() == ARRAYS["w"] + 1).all()
    agent.close()


def test_the_relay_asks_again_when_the_agent_died_in_the_middle(path, monkeypatch):
    monkeypatch.setattr(relaying, "_PAUSE_S", 0.01)
    agent = Agent(path, deaths=3)
    assert (ask(path).array_records["state"]["w"].numpy() == ARRAYS["w"] + 1).all()
    assert agent.asked == 4
    agent.close()


def test_a_relay_without_an_agent_says_so_and_does_not_wait_for_ever(path, monkeypatch):
    monkeypatch.setattr(relaying, "_PAUSE_S", 0.01)
    monkeypatch.setattr(relaying, "_ABSENT_S", 0.05)
    with pytest.raises(FederationError, match="finds no agent; start it with `fedssl site KIT`"):
        ask(path)
    with pytest.raises(FederationError, match="did not answer before the deadline"):
        ask(path, patience_s=0.02)


def test_a_user_who_is_not_the_relays_gets_nothing(path, monkeypatch, heard):
    monkeypatch.setattr(relaying, "_PAUSE_S", 0.01)
    agent = Agent(path, allowed={os.getuid() + 1})
    with pytest.raises(FederationError, match="did not answer before the deadline"):
        ask(path, patience_s=0.3)
    assert agent.asked == 0
    assert any("who is not the relay's" in event.text for event in heard)
    agent.close()


def test_a_question_that_is_too_large_gets_a_sentence_and_the_relay_is_not_left_waiting(path):
    agent = Agent(path, most=10)
    assert "MB are allowed" in ask(path).config_records["refused"]["reason"]
    assert agent.asked == 0
    agent.close()


def test_two_questions_at_once_are_answered_one_after_the_other(path, monkeypatch):
    agent, together, most = Agent(path), [], []
    plain = agent.answer

    def watched(question):
        together.append(1)
        most.append(len(together))
        parts = plain(question)
        together.pop()
        return parts

    agent.close()
    agent.answer = watched
    agent.open()
    monkeypatch.setattr(relaying, "_PAUSE_S", 0.01)  # four have a place, the others ask again
    askers = [threading.Thread(target=ask, args=(path,)) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(20)
    assert most == [1] * 8
    agent.close()


def test_a_second_agent_of_a_kit_is_refused_and_the_socket_of_a_dead_one_is_replaced(path):
    agent = Agent(path)
    with pytest.raises(ConfigError, match="Another agent of this kit is running"):
        listen(path)
    agent.close()
    assert path.exists()
    Agent(path).close()


def test_a_user_who_does_not_exist_is_named():
    assert uid_of("root") == uid_of("0") == 0
    with pytest.raises(ConfigError, match="There is no user nobody-like-that on this machine"):
        uid_of("nobody-like-that")


def test_a_frame_is_sent_whole_and_its_bytes_are_counted():
    sent = []
    parts = write_frame({}, content_of({"w": np.zeros(500_000)}))
    assert send_frame(sent.append, parts) == sum(map(len, sent)) == len(b"".join(parts))
    assert max(map(len, sent)) <= 1 << 20


def test_an_old_round_is_refused_as_a_replay_and_the_same_question_is_not(tmp_path):
    replays = Replays(tmp_path / "rounds.json")
    replays.admit("ab" * 8, 1, "x")
    replays.admit("ab" * 8, 1, "x")
    replays.admit("ab" * 8, 3, "y")
    replays.admit("cd" * 8, 1, "z")
    again = Replays(tmp_path / "rounds.json")  # after a kill
    with pytest.raises(PolicyError, match="refuses round 2 as a replay: it has been asked for round 3"):
        again.admit("ab" * 8, 2, "x")
    with pytest.raises(PolicyError, match="refuses round 3: it was asked for this round with another state"):
        again.admit("ab" * 8, 3, "x")
    again.admit("ab" * 8, 3, "y")
    with pytest.raises(PolicyError, match="refuses round 2 as a replay"):
        again.admit_sums("ab" * 8, 2, "p", 2)
    for question in ("p", "q", "p", "q", "p"):
        again.admit_sums("ab" * 8, 4, question, 2)
    with pytest.raises(PolicyError, match="was asked 2 times for its column sums"):
        again.admit_sums("ab" * 8, 4, "r", 2)
    again.admit("ab" * 8, 4, "z")
    again.admit_sums("ab" * 8, 5, "r", 2)
    with pytest.raises(PolicyError, match="refuses round 4 as a replay"):
        again.admit("ab" * 8, 4, "z")
    for content in ("{}", '{"runs": [["ab", 1, "x"]]}', '{"runs": {"ab": {"number": 1}}}', "[]", "no JSON"):
        (tmp_path / "rounds.json").write_text(content)
        with pytest.raises(DataError, match="damaged list of answered rounds"):
            again.admit("ab" * 8, 4, "y")


def test_no_run_is_forgotten_so_that_it_could_be_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("fedssl.deployment.replays._MOST_RUNS", 3)
    replays = Replays(tmp_path / "rounds.json")
    for number in range(3):
        replays.admit(f"{number:08x}", 1, "x")
    with pytest.raises(PolicyError, match="has answered 3 runs and begins no other"):
        replays.admit("ffffffff", 1, "x")
    with pytest.raises(PolicyError, match="with another state before"):
        replays.admit("00000000", 1, "y")
    replays.admit("00000000", 2, "y")


def test_a_policy_that_cannot_be_read_is_told_to_the_relay(path):
    agent = Agent(path)
    agent.close()
    agent.most = None

    def unreadable():
        raise ConfigError("policy.yaml is no YAML (line 3). Mend it with an editor.")

    line = listen(path)
    told = Lines(line, frozenset({os.getuid()}), agent.refused, unreadable)
    threading.Thread(target=told.serve, daemon=True).start()
    assert "policy.yaml is no YAML" in ask(path).config_records["refused"]["reason"]
    line.shutdown(socket.SHUT_RDWR)
    line.close()
