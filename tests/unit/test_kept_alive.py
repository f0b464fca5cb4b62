"""What keeps a consortium going: parts that are started again, runs that go on, nodes that equal the certificates."""

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedssl import progress
from fedssl.deployment import registrar as registering
from fedssl.deployment.parts import Part, Parts
from fedssl.deployment.registrar import Registrar
from fedssl.deployment.runner import Runner
from fedssl.deployment.settings import Consortium, ServerKit, SiteKit
from fedssl.deployment.superlink import SuperLink
from fedssl.errors import ConfigError, DataError, FederationError
from server.chronicle import chronicled
from server.exchange import Plan, ask
from simulations.grid import InProcessGrid


def until(true, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def part(tmp_path, words, **more):
    return Part("thing", [sys.executable, "-c", words], tmp_path / "thing.log", **more)


def test_a_part_that_was_killed_is_started_again_and_said(tmp_path, heard):
    parts = Parts([part(tmp_path, "import time; time.sleep(60)")])
    parts.check()
    first = parts.states()["thing"]["pid"]
    os.kill(first, signal.SIGKILL)
    until(lambda: parts.states()["thing"]["state"] == "down")
    until(lambda: parts.check() or parts.states()["thing"]["state"] == "up")
    told = parts.states()["thing"]
    assert told["restarts"] == 1
    assert told["pid"] != first
    assert any("was stopped by SIGKILL and is started again" in event.text for event in heard)
    parts.stop()
    assert parts.states()["thing"]["state"] == "down"


def test_a_part_that_dies_at_once_is_started_ever_more_slowly_and_an_alarm_names_its_log(tmp_path, heard, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("fedssl.deployment.parts.time.monotonic", lambda: clock[0])
    parts, pauses = Parts([part(tmp_path, "raise SystemExit(3)")]), []
    for _ in range(6):
        parts.check()
        parts.lives["thing"].process.wait()
        parts.check()
        pauses.append(parts.lives["thing"].due - clock[0])
        clock[0] = parts.lives["thing"].due
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert [event.alarm for event in heard] == [False, False, False, True, True, True]
    assert "ended with exit code 3" in heard[0].text
    assert "thing.log" in heard[-1].text


def test_a_part_that_does_not_listen_is_killed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("fedssl.deployment.parts._STOP_S", 0.3)
    words = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    parts = Parts([part(tmp_path, words)])
    parts.check()
    until(lambda: "deaf" in (tmp_path / "thing.log").read_text())
    parts.stop()
    assert parts.lives["thing"].process.returncode == -signal.SIGKILL


def test_the_relay_gets_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSSL_DICOMWEB_PASSWORD", "secret")
    words = "import os; print(sorted(os.environ))"
    parts = Parts([part(tmp_path, words, environment={"LANG": "C.UTF-8"}, inherits=False)])
    parts.check()
    parts.lives["thing"].process.wait()
    assert "PASSWORD" not in (tmp_path / "thing.log").read_text()
    assert "LANG" in (tmp_path / "thing.log").read_text()
    assert (tmp_path / "thing.log").stat().st_mode & 0o077 == 0


# ---------------------------------------------------------------- the run


class Link(SuperLink):
    """A SuperLink that remembers what it was asked."""

    def __init__(self):
        self.started, self.state, self.why, self.registered, self.gone = [], "running", "", {}, []

    def start_run(self, overrides):
        self.started.append(overrides)
        return len(self.started)

    def run_state(self, run):
        return (self.state, self.why) if run else ("unknown", "")

    def nodes(self):
        return [{"node-id": str(node), "status": "online"} for node in self.registered.values()]

    def register(self, site, key):
        if key in self.registered:
            raise FederationError("Flower's command supernode register failed: Public key already in use.")
        self.registered[key] = 100 + len(self.registered)
        return self.registered[key]

    def unregister(self, node):
        self.gone.append(node)
        self.registered = {key: value for key, value in self.registered.items() if value != node}


@pytest.fixture
def kit(tmp_path):
    (tmp_path / "server.yaml").write_text(
        "name: trial\nport: 18000\nplan: [encoder=tiny, federation.rounds=3]\nretry_s: 5\n"
    )
    found = ServerKit.read(tmp_path)
    found.state.mkdir()
    return found


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fedssl.deployment.runner.time.monotonic", lambda: now[0])
    return now


def finish_round(kit, number):
    kit.run.mkdir(exist_ok=True)
    (kit.run / "environment.json").write_text("{}")
    with (kit.run / "round_metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"round": number}) + "\n")


def end(kit, state, reason="", code=0):
    kit.run.mkdir(exist_ok=True)
    (kit.run / "outcome.json").write_text(json.dumps({"state": state, "reason": reason, "exit_code": code}))


def test_a_run_whose_serverapp_was_killed_goes_on_at_once_from_its_folder(kit, clock):
    link = Link()
    runner = Runner(kit, link)
    assert runner.step()[0] == "running"
    assert "resume" not in link.started[0]
    finish_round(kit, 1)
    clock[0] += 10
    link.state, link.why = "finished:failed", "No heartbeat"
    assert runner.step()[0] == "retrying"
    link.state = "running"
    assert runner.step()[0] == "running"
    assert "resume=true" in link.started[1]
    assert f"run_dir={kit.run}" in link.started[1]
    end(kit, "done")
    assert runner.step()[0] == "done"


def test_a_server_that_is_started_again_takes_up_the_run_that_still_goes(kit, clock):
    link = Link()
    Runner(kit, link).step()
    again = Runner(kit, link)
    assert again.step()[0] == "running"
    assert len(link.started) == 1


def test_a_run_without_sites_is_tried_again_after_a_pause_and_given_up_after_hours(kit, clock, heard):
    link = Link()
    runner = Runner(kit, link)
    runner.step()
    end(kit, "failed", "0 of at least 2 sites connected.", 4)
    link.state = "finished:failed"
    clock[0] += 10
    assert runner.step() == ("retrying", "0 of at least 2 sites connected.")
    clock[0] += 4
    assert runner.step()[0] == "retrying"
    assert len(link.started) == 1
    clock[0] += 2
    assert runner.step()[0] == "running"
    assert len(link.started) == 2
    clock[0] += 73 * 3600
    state, reason = runner.step()
    assert state == "gave up"
    assert "No round was finished for 73 h (give_up_h in server.yaml)" in reason
    assert any("It goes on in 5 s" in event.text for event in heard)


def test_what_no_retry_mends_is_given_up_at_once_with_the_reason(kit, clock):
    link = Link()
    runner = Runner(kit, link)
    runner.step()
    end(kit, "failed", "The disk is full.", 5)
    link.state = "finished:failed"
    clock[0] += 10
    assert runner.step() == ("gave up", "The disk is full.")


def test_what_the_serverapp_said_is_repeated_once(kit, clock, heard):
    runner = Runner(kit, Link())
    runner.step()
    kit.run.mkdir()
    (kit.run / "events.jsonl").write_text(json.dumps({"text": "Site A takes part", "alarm": False}) + "\n")
    runner.step()
    runner.step()
    assert [event.text for event in heard].count("Site A takes part") == 1


@pytest.mark.parametrize("key", ["data.root=/x", "run_dir=/x", "resume=true", "+overwrite=true"])
def test_a_plan_that_sets_what_the_server_sets_is_refused(kit, key):
    path = kit.folder / "server.yaml"
    path.write_text(path.read_text().replace("[encoder=tiny", f"[{key}, encoder=tiny"))
    with pytest.raises(ConfigError, match="plan must not hold"):
        Runner(ServerKit.read(kit.folder), Link())


# ---------------------------------------------------------------- who is registered


def test_the_superlinks_nodes_are_made_equal_to_the_certificates(kit, monkeypatch):
    link = Link()
    there, refused = {}, {}
    monkeypatch.setattr(
        registering, "admitted",
        lambda *_: ([SimpleNamespace(name=n, public_key_ssh=k) for n, k in there.items()], dict(refused)),
    )  # fmt: skip
    there.update(A="key-a", B="key-b")
    keeper = Registrar(kit, link)
    keeper.renew()
    keeper.renew()
    assert link.registered == {"key-a": 100, "key-b": 101}
    del there["B"]
    refused["B"] = "It was revoked."
    there["C"] = "key-c"
    keeper.renew()
    assert set(link.registered) == {"key-a", "key-c"}
    there["A"] = "key-a2"
    again = Registrar(kit, link)  # the server was started anew
    again.renew()
    assert set(link.registered) == {"key-a2", "key-c"}
    (kit.state / "nodes.json").unlink()
    del there["C"]
    link.unregister(link.registered["key-c"])
    Registrar(kit, link).renew()  # registered by a server that was killed before it could note it
    assert set(link.registered) == {"key-a2"}
    there.clear()
    refused["A"] = "The list of the revoked is damaged."
    Registrar(kit, link).renew()
    assert set(link.registered) == {"key-a2"}


# ---------------------------------------------------------------- what the ServerApp does


def test_a_run_leaves_what_was_said_and_how_it_ended(tmp_path):
    run = tmp_path / "run"
    with chronicled(run):
        progress.publish(progress.Note("too early to be kept"))
        run.mkdir()
        progress.publish(progress.Note("hello", alarm=True))
    (row,) = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert (row["text"], row["alarm"]) == ("hello", True)
    assert datetime.fromisoformat(row["time"]).tzinfo == UTC
    assert json.loads((run / "outcome.json").read_text())["state"] == "done"
    with pytest.raises(DataError), chronicled(run):
        raise DataError("no images")
    told = json.loads((run / "outcome.json").read_text())
    assert (told["state"], told["reason"], told["exit_code"]) == ("failed", "no images", 3)
    with pytest.raises(ZeroDivisionError), chronicled(run):
        raise ZeroDivisionError("/data/patients/MEYER")
    assert "MEYER" not in (run / "outcome.json").read_text()


class Flaky(InProcessGrid):
    """Nodes that are lost with their message so many times, and then are gone for some looks."""

    def __init__(self, *arguments, losses, absences=0, code=5):
        super().__init__(*arguments)
        self.losses, self.absences, self.code, self.asked = losses, absences, code, 0

    def get_node_ids(self):
        self.absences -= 1
        return [] if self.absences >= 0 else super().get_node_ids()

    def pull_messages(self, message_ids):
        self.asked += 1
        answers = super().pull_messages(message_ids)
        if self.asked > self.losses:
            return answers
        return [Message(Error(self.code, "lost"), reply_to=answer) for answer in answers]


@pytest.mark.parametrize(
    ("losses", "absences", "code", "rejoin_s", "good"),
    [(1, 0, 5, 60, True), (3, 2, 8, 60, True), (1, 0, 2, 60, False), (1, 10**9, 5, 0.05, False), (1, 0, 3, 0, False)],
    ids=["once", "three times, gone in between", "its own error", "never back", "nobody waits"],
)
def test_a_node_that_was_lost_is_asked_again_when_it_is_back(losses, absences, code, rejoin_s, good, monkeypatch):
    monkeypatch.setattr("server.exchange._LISTEN_S", 0.01)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = Flaky(
        lambda message, context: Message(RecordDict({}), reply_to=message), {2: {}}, {}, losses=losses,
        absences=absences, code=code,
    )  # fmt: skip
    plan = Plan("ab" * 8, 1, "f", 1, 60.0, 1.0, rejoin_s=rejoin_s)
    ((node, answer),) = ask(grid, {2: RecordDict({})}, "train", plan, time.monotonic() + 30)
    assert node == 2
    assert answer.has_content() == good
    assert grid.asked == (losses + 1 if good else 1)


def test_settings_files_say_all_that_is_wrong_at_once(tmp_path):
    (tmp_path / "site.yaml").write_text("site: A\nsevrer: x\ndata: 3\n")
    with pytest.raises(ConfigError) as caught:
        SiteKit.read(tmp_path)
    for text in (
        "sevrer is unknown (do you mean server?)",
        "server is missing",
        "plan is missing",
        "data is 3 where str",
    ):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerKit.read(tmp_path)
    (tmp_path / "c.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds no settings"):
        Consortium.read(tmp_path / "c.yaml")
