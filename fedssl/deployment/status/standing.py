"""What an operator sees of a running consortium, and a hospital of its own part in it, read from files alone.

Any of the files may be missing, torn at its end, or being replaced: then less is known, and that is said.
"""

from datetime import datetime, timedelta

from fedssl.deployment.settings import ServerKit, SiteKit
from fedssl.deployment.status.alarms import current_alarms, expiring, logged_alarms
from fedssl.deployment.status.files import (
    Row,
    expiry,
    mapping,
    modified,
    moment,
    number,
    read_object,
    read_objects,
    span,
    whole,
    words,
)  # fmt: skip
from fedssl.deployment.status.rounds import expected_end, read_rounds, read_sites, rounds_of, usual_length
from fedssl.deployment.status.values import Alarm, Part, Refusal, SiteStatus, Status, as_json

__all__ = ["SiteStatus", "Status", "as_json", "read_status", "site_status"]
_SILENT_S = 180.0  # the supervisors write every five seconds
_DAY = timedelta(days=1)
_GOES_ON = {"starting", "running", "retrying", "unknown"}
_UNKNOWN = "no reason is known."


def read_status(kit: ServerKit, now: datetime) -> Status:
    """Read how the consortium of a server's kit stands.

    Args:
        kit: the server's.
        now: the time, with its zone.
    """
    history, told = read_rounds(kit)
    rounds = rounds_of(kit)
    server = read_object(kit.state / "server.json")
    state = _state(server, read_object(kit.run / "outcome.json"), told.number, rounds, _silence(kit, now))
    parts = _parts(server)
    usual = usual_length(history, modified(kit.run / "environment.json"))
    goes_on = state[0] in _GOES_ON
    sites = read_sites(kit, told, now, watched=goes_on)
    said, note = logged_alarms(kit.run / "events.jsonl")
    return Status(
        words(kit.name), now, *state, note, told.number, rounds, told.agreement, usual,
        expected_end(history, rounds, usual, now) if goes_on else None, parts, history, sites,
        (*current_alarms(kit, state, parts, history, usual, told, sites, now), *said),
    )  # fmt: skip


def _silence(kit: ServerKit, now: datetime) -> float:
    written = modified(kit.state / "server.json")
    return (now - written).total_seconds() if written else 0.0


def _state(server: Row, outcome: Row, done: int, rounds: int | None, silence: float) -> tuple[str, str]:
    """Give state and sentence; that the run is done is certain, what the supervisor said may be old."""
    state, reason = words(server.get("state"), 40), words(server.get("reason"))
    failed = words(outcome.get("reason")) or _UNKNOWN if outcome.get("state") == "failed" else ""
    if "done" in (state, outcome.get("state")):
        return "done", f"Done after {_count(done)}."
    if state == "gave up":
        return "gave up", f"The server gave up after {_count(done)}: {reason or failed or _UNKNOWN}"
    if not state:
        return _no_server(failed, done)
    if silence > _SILENT_S:
        return "silent", f"The server has said nothing for {span(silence)}: it was stopped, or hangs."
    if failed or state == "retrying":
        return "retrying", f"The run ended and is taken up again: {failed or reason or _UNKNOWN}"
    return _running(state, reason, done, rounds)


def _no_server(failed: str, done: int) -> tuple[str, str]:
    if failed:
        return "failed", f"The run ended after {_count(done)}: {failed}"
    if done:
        return "unknown", f"{_count(done)} finished; whether a server runs is not known."
    return "not started", "Not started: neither a server nor a run has left a trace here."


def _running(state: str, reason: str, done: int, rounds: int | None) -> tuple[str, str]:
    known = state if state in {"starting", "running"} else "unknown"
    of = f" of {rounds}" if rounds is not None else ""
    under_way = f", round {done + 1} is under way" if rounds is None or done < rounds else ""
    progress = f"{_count(done)}{of} finished{under_way}" if done else f"no round{of} is finished yet"
    return known, f"{state.capitalize()}: {progress}." + (f" {reason}" if reason else "")


def _count(done: int) -> str:
    return "1 round" if done == 1 else f"{done} rounds"


def _parts(told: Row) -> tuple[Part, ...]:
    return tuple(
        Part(words(name, 40), words(found.get("state"), 40) or "not known", whole(found.get("restarts")) or 0,
             moment(found.get("since")))
        for name, part in mapping(told.get("parts")).items()
        if (found := mapping(part))
    )  # fmt: skip


def site_status(kit: SiteKit, now: datetime) -> SiteStatus:
    """Read how a hospital stands: its processes, what it trained, refused and sent.

    Args:
        kit: the site's.
        now: the time, with its zone.
    """
    agent, site = read_object(kit.state / "agent.json"), read_object(kit.state / "site.json")
    state, sentence = _own_state(kit, agent, site, now)
    parts = _parts(site)
    sent = _Sent(now - _DAY)
    for entry in read_objects(kit.state / "egress" / "manifest.jsonl"):
        sent.add(entry)
    alarms = [sentence] if state in {"silent", "cannot reach the server"} else []
    if state == "running":
        alarms += [f"The {part.name} is {part.state}." for part in parts if part.state != "up"]
    alarms += expiring({"this site": expiry(kit.folder / "site.crt")}, now)
    trained = sent.trained
    return SiteStatus(
        words(kit.site), now, state, sentence, words(agent.get("policy")), parts, words(trained.get("run")),
        whole(trained.get("round")), moment(trained.get("time")), sent.refusal, sent.messages, sent.day, sent.all,
        sent.epsilon, tuple(Alarm(text, None, current=True) for text in alarms),
    )  # fmt: skip


class _Sent:
    """Sums of an egress manifest, entry by entry.

    Args:
        since: bytes from here on are counted apart.
    """

    def __init__(self, since: datetime) -> None:
        self.since = since
        self.trained: Row = {}
        self.refusal: Refusal | None = None
        self.messages = self.day = self.all = 0
        self.epsilon: float | None = None

    def add(self, entry: Row) -> None:
        """Count one entry."""
        size = whole(entry.get("frame_bytes"))
        size = size if size is not None else whole(entry.get("content_bytes")) or 0
        time = moment(entry.get("time"))
        self.messages += 1
        self.all += size
        self.day += size if time is not None and time >= self.since else 0
        if entry.get("kind") == "train":
            self.trained = entry
        if reason := words(entry.get("reason")):
            self.refusal = Refusal(time, whole(entry.get("round")), reason)
        if (epsilon := number(entry.get("epsilon"))) is not None:
            self.epsilon = epsilon


def _own_state(kit: SiteKit, agent: Row, site: Row, now: datetime) -> tuple[str, str]:
    written = modified(kit.state / "site.json")
    silence = (now - written).total_seconds() if written and site else 0.0
    doing, reason = words(agent.get("state")), words(site.get("reason"))
    since = moment(agent.get("since"))
    if not (agent or site):
        return "not started", "Not started: this site's processes have left no trace here."
    if silence > _SILENT_S:
        return "silent", f"This site's processes have said nothing for {span(silence)}: they were stopped, or hang."
    if site.get("state") == "cannot reach the server":
        return "cannot reach the server", f"The server cannot be reached: {reason or 'no reason is known'}"
    if not doing:
        return "running", "Running; what the agent does is not known yet."
    for_long = f" for {span((now - since).total_seconds())}" if since else ""
    return "running", f"The agent is {doing}{for_long}."
