"""What there is to see of a consortium and of one hospital, as plain values. None: not known."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

IN, WAITING, MISSING = "in", "waiting", "missing"
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Part:
    """A process: ``up`` or ``down``, how often it was started again, and since when it is as it is."""

    name: str
    state: str
    restarts: int
    since: datetime | None


@dataclass(frozen=True)
class Alarm:
    """What must be seen. ``current``: it is so now; else it was said at ``time``, ``count`` times in a row."""

    text: str
    time: datetime | None
    current: bool
    count: int = 1


@dataclass(frozen=True)
class Round:
    """A finished round: its mean loss, when it was finished, and how long after the one before."""

    number: int
    loss: float | None
    time: datetime | None
    seconds: float | None


@dataclass(frozen=True)
class Site:
    """A site as the server sees it.

    Attributes:
        name: of the site; of a node that has not said its name, "node ...".
        standing: ``in`` the last round, ``waiting``, or ``missing``.
        words: the same in words, with the reason.
        last_round: that it answered.
        last_seen_s: seconds since the gate heard it.
        loss: of its last round.
        epsilon: spent on each patient, as it last said.
        images: that it trained on in its last round.
        images_per_s: its speed then.
        bytes_up: that the gate received from it.
        bytes_down: that the gate sent to it.
        expires: when its certificate does.
        losses: by round.
        epsilons: by round.
    """

    name: str
    standing: str
    words: str
    last_round: int | None = None
    last_seen_s: float | None = None
    loss: float | None = None
    epsilon: float | None = None
    images: int | None = None
    images_per_s: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    expires: datetime | None = None
    losses: Curve = ()
    epsilons: Curve = ()


@dataclass(frozen=True)
class Status:
    """A consortium as its server sees it.

    Attributes:
        name: of the consortium.
        written: when this was read.
        state: ``not started``, ``unknown``, ``starting``, ``running``, ``retrying``, ``silent``, ``failed``,
            ``gave up`` or ``done``.
        sentence: the same in words.
        note: what the server said last.
        round: last one that is finished; 0 before the first.
        rounds: of the whole run.
        agreement: of the sites' prototypes in that round, 1 if they are the same.
        usual_s: usual length of a round.
        expected_end: if the rounds to come take as long.
        parts: processes of the server.
        history: the finished rounds.
        sites: by name.
        alarms: what is so now, then what was said, newest first.
    """

    name: str
    written: datetime
    state: str
    sentence: str
    note: str
    round: int
    rounds: int | None
    agreement: float | None
    usual_s: float | None
    expected_end: datetime | None
    parts: tuple[Part, ...]
    history: tuple[Round, ...]
    sites: tuple[Site, ...]
    alarms: tuple[Alarm, ...]

    @property
    def ended(self) -> bool:
        """No further round comes unless somebody starts the server again."""
        return self.state in {"done", "gave up"}


@dataclass(frozen=True)
class Refusal:
    """A question that the site did not answer, and why."""

    time: datetime | None
    round: int | None
    reason: str


@dataclass(frozen=True)
class SiteStatus:
    """A hospital as it sees itself; the manifest's figures are read, not verified (``fedssl egress`` verifies).

    Attributes:
        name: of the site.
        written: when this was read.
        state: ``not started``, ``running``, ``cannot reach the server`` or ``silent``.
        sentence: the same in words.
        policy: digest of the policy in force.
        parts: processes.
        last_run: of the last round that was trained.
        last_round: that was trained.
        last_trained: when its answer left.
        last_refusal: newest one.
        messages: that left, refusals too.
        bytes_day: that left in the last 24 hours, as the policy counts them.
        bytes_all: that ever left.
        epsilon: spent on each patient, as last told to the server.
        alarms: what is so now.
    """

    name: str
    written: datetime
    state: str
    sentence: str
    policy: str
    parts: tuple[Part, ...]
    last_run: str
    last_round: int | None
    last_trained: datetime | None
    last_refusal: Refusal | None
    messages: int
    bytes_day: int
    bytes_all: int
    epsilon: float | None
    alarms: tuple[Alarm, ...]


def as_json(status: Status | SiteStatus) -> dict[str, Any]:
    """Give a status as JSON can hold it; times in ISO 8601, UTC."""
    plain: dict[str, Any] = _plain(asdict(status))
    return plain


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a status holds
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
