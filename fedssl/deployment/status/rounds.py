"""What the run folder and the gate tell of rounds and sites."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import yaml

from fedssl.deployment.settings import ServerKit
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
    texts,
    whole,
    words,
)  # fmt: skip
from fedssl.deployment.status.values import IN, MISSING, WAITING, Round, Site

SILENT_SITE_S = 600.0
_NAME = 100


@dataclass(frozen=True)
class Told:
    """What the last finished round says.

    Attributes:
        number: of the round; 0 before the first.
        sites: that answered well.
        failed: reason by site.
        absent: reason by site.
        signs: of collapse, by site.
        agreement: of the prototypes.
    """

    number: int = 0
    sites: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    signs: Mapping[str, list[str]] = field(default_factory=dict)
    agreement: float | None = None


def read_rounds(kit: ServerKit) -> tuple[tuple[Round, ...], Told]:
    """Read the finished rounds, and what the last one says."""
    rows = {found: row for row in read_objects(kit.run / "round_metrics.jsonl") if (found := whole(row.get("round")))}
    if not rows:
        return (), Told()
    last = max(rows)
    history: list[Round] = []
    for count in sorted(rows):
        time = moment(rows[count].get("time"))
        if time is None and count == last:  # older versions write no time
            time = modified(kit.run / "checkpoints" / "last.safetensors") or modified(kit.run / "round_metrics.jsonl")
        history.append(Round(count, number(rows[count].get("train/loss")), time, _since(history, count, time, kit)))
    return tuple(history), _told(last, rows[last])


def _since(before: Sequence[Round], count: int, time: datetime | None, kit: ServerKit) -> float | None:
    """Seconds since the round before was finished, or since the run began."""
    begin = before[-1].time if before and before[-1].number == count - 1 else None
    if count == 1:
        begin = modified(kit.run / "environment.json")
    return (time - begin).total_seconds() if time and begin and time > begin else None


def _told(count: int, row: Row) -> Told:
    def reasons(key: str) -> dict[str, str]:
        return {words(site, _NAME): words(reason) for site, reason in mapping(row.get(key)).items()}

    signs = {words(site, _NAME): texts(found) for site, found in mapping(row.get("ssl/collapse")).items()}
    return Told(
        count, frozenset(words(site, _NAME) for site in texts(row.get("federation/sites"))),
        reasons("federation/failed"), reasons("federation/absent"), signs, number(row.get("ssl/prototype_agreement")),
    )  # fmt: skip


def usual_length(history: Sequence[Round], begin: datetime | None) -> float | None:
    """Median of the rounds' lengths; where no length is known the mean since the run began, which holds pauses too."""
    known = [one.seconds for one in history if one.seconds is not None]
    if known:
        return statistics.median(known)
    last = history[-1] if history else None
    if last is None or last.time is None or begin is None or last.time <= begin:
        return None
    return (last.time - begin).total_seconds() / last.number


def expected_end(history: Sequence[Round], rounds: int | None, usual: float | None, now: datetime) -> datetime | None:
    """When the last round will be finished if all take the usual time; the one under way is not over before now."""
    if not history or rounds is None or usual is None or history[-1].time is None or rounds <= history[-1].number:
        return None
    with suppress(OverflowError):
        following = max(history[-1].time + timedelta(seconds=usual), now)
        return following + timedelta(seconds=usual * (rounds - history[-1].number - 1))
    return None


def rounds_of(kit: ServerKit) -> int | None:
    """How many rounds the run has: by its resolved configuration, or by the plan before there is one."""
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        config = yaml.safe_load((kit.run / "config.resolved.yaml").read_text(encoding="utf-8"))
        if (found := whole(mapping(mapping(config).get("federation")).get("rounds"))) is not None:
            return found
    planned = [text.partition("=")[2] for text in kit.plan if text.lstrip("+").startswith("federation.rounds=")]
    return int(planned[-1]) if planned and planned[-1].isdecimal() and len(planned[-1]) < _NAME else None


def read_sites(kit: ServerKit, told: Told, now: datetime, *, watched: bool) -> tuple[Site, ...]:
    """Read what is known of each site: of its certificate, at the gate, in the rounds.

    Args:
        kit: the server's.
        told: what the last round says.
        now: the time.
        watched: the gate is there to hear a site, so that its silence means something.
    """
    rows: dict[str, dict[int, Row]] = {}
    for row in read_objects(kit.run / "metrics.jsonl"):
        count = whole(row.get("round"))
        if (name := words(row.get("site"), _NAME)) and count is not None:
            rows.setdefault(name, {})[count] = row
    seen = {words(name, _NAME): mapping(found) for name, found in read_object(kit.state / "seen.json").items()}
    expires = {path.stem: expiry(path) for path in _certificates(kit)}
    names = rows.keys() | seen.keys() | expires.keys() | told.sites | told.failed.keys() | told.absent.keys()
    return tuple(
        _site(name, rows.get(name, {}), seen.get(name, {}), told, now, expires.get(name), watched=watched)
        for name in sorted(names - {""})
    )


def _certificates(kit: ServerKit) -> Iterable[Path]:
    with suppress(OSError):
        return sorted(kit.certificates.glob("*.crt"))
    return []


def _site(
    name: str, rows: Mapping[int, Row], seen: Row, told: Told, now: datetime, expires: datetime | None, *, watched: bool
) -> Site:  # fmt: skip
    at = moment(seen.get("time"))
    age = max(0.0, (now - at).total_seconds()) if at else None
    silent = age if watched and age is not None and age > SILENT_SITE_S else None
    last = rows[max(rows)] if rows else {}
    losses, epsilons = _curve(rows, "loss"), _curve(rows, "epsilon")
    standing, said = _standing(name, words(seen.get("state")), told, silent, known=bool(rows))
    images = number(last.get("images"))
    return Site(
        name, standing, said, max(rows, default=None), age, number(last.get("loss")),
        epsilons[-1][1] if epsilons else None, None if images is None else math.floor(images),
        number(last.get("images_per_s")), whole(seen.get("bytes_up")), whole(seen.get("bytes_down")), expires,
        losses, epsilons,
    )  # fmt: skip


def _curve(rows: Mapping[int, Row], name: str) -> tuple[tuple[int, float], ...]:
    return tuple((count, value) for count in sorted(rows) if (value := number(rows[count].get(name))) is not None)


def _standing(name: str, gate: str, told: Told, silent: float | None, *, known: bool) -> tuple[str, str]:
    if gate not in {"", "admitted"}:
        return MISSING, f"not admitted at the gate: {gate}"
    quiet = f"silent for {span(silent)}" if silent is not None else ""
    if name in told.failed:
        said = f"missing from round {told.number}: {told.failed[name] or 'no reason is known'}"
        return MISSING, f"{quiet}; {said}" if quiet else said
    if name in told.absent:
        said = f"does not take part: it {told.absent[name] or 'gave no reason'}"
        return MISSING, f"{quiet}; {said}" if quiet else said
    if name in told.sites:
        return (MISSING, f"{quiet}; was in round {told.number}") if quiet else (IN, f"in round {told.number}")
    if quiet:
        return MISSING, quiet
    return WAITING, f"not asked in round {told.number}" if known and told.number else "in no round yet"
