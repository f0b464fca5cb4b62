"""What must be seen of a running consortium: what is so now, and what was said."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from fedssl.deployment.settings import ServerKit
from fedssl.deployment.status.files import expiry, moment, read_objects, span, words
from fedssl.deployment.status.rounds import Told
from fedssl.deployment.status.values import MISSING, Alarm, Part, Round, Site

DRIFT = 0.7  # the same as in server/record.py
_SOON_DAYS, _DAY_S = 30, 86_400.0
_LATE, _LEAST_LATE_S = 2.0, 60.0
_MOST_LOGGED = 50
_LATE_STATES = {"starting", "running", "retrying"}


def current_alarms(
    kit: ServerKit, state: tuple[str, str], parts: Sequence[Part], history: Sequence[Round], usual: float | None,
    told: Told, sites: Sequence[Site], now: datetime,
) -> list[Alarm]:  # fmt: skip
    """List what is wrong now, the server first.

    Args:
        kit: the server's.
        state: and the sentence that goes with it.
        parts: of the server.
        history: finished rounds.
        usual: length of a round in seconds.
        told: what the last round says.
        sites: as they stand.
        now: the time.
    """
    ended = state[0] in {"done", "gave up"}
    found = [state[1]] if state[0] in {"failed", "gave up", "retrying", "silent"} else []
    if state[0] != "silent" and not ended:
        found += [f"The {part.name} is {part.state}." for part in parts if part.state != "up"]
    found += [] if ended else _late(state[0], history, usual, now)
    found += [] if ended else [_ended(f"Site {one.name}: {one.words}") for one in sites if one.standing == MISSING]
    found += expiring(
        {"the server": expiry(kit.folder / "server.crt"), **{f"site {s.name}": s.expires for s in sites}}, now
    )
    last = history[-1].time if history else None
    collapsed = [
        f"Site {site} has collapsed in round {told.number}: {'; '.join(signs)}." for site, signs in told.signs.items()
    ]
    found_now = [Alarm(text, None, current=True) for text in found]
    return found_now + [Alarm(text, last, current=True) for text in collapsed + _drift(told)]


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def _drift(told: Told) -> list[str]:
    if told.agreement is None or told.agreement >= DRIFT:
        return []
    return [
        f"The sites' prototypes drift apart: in round {told.number} they agree to {told.agreement:.2f} (1 is full "
        f"agreement, below {DRIFT} they stand for different clusters)."
    ]


def _late(state: str, history: Sequence[Round], usual: float | None, now: datetime) -> list[str]:
    last = history[-1].time if history else None
    if usual is None or last is None or state not in _LATE_STATES:
        return []
    waited = (now - last).total_seconds()
    if waited <= max(_LATE * usual, _LEAST_LATE_S):
        return []
    return [f"No round finished for {span(waited)}; usual {span(usual)}."]


def expiring(dates: dict[str, datetime | None], now: datetime) -> list[str]:
    """Say which certificates have expired or will soon.

    Args:
        dates: when each expires, by whose it is; None where there is none.
        now: the time.
    """
    sentences = []
    for whose, date in dates.items():
        days = (date - now).total_seconds() / _DAY_S if date else _SOON_DAYS
        if date and days <= 0:
            sentences.append(f"The certificate of {whose} expired on {date:%Y-%m-%d}. Renew it.")
        elif date and days < _SOON_DAYS:
            left = span(days * _DAY_S)
            sentences.append(f"The certificate of {whose} expires in {left}, on {date:%Y-%m-%d}. Renew it in time.")
    return sentences


def logged_alarms(events: Path) -> tuple[list[Alarm], str]:
    """Read the alarms that the run said, newest first, the same ones in a row as one; and the last word of all."""
    found: list[Alarm] = []
    note = ""
    for row in read_objects(events):
        if not (text := words(row.get("text"))):
            continue
        time = moment(row.get("time"))
        note = text + (f" ({time:%Y-%m-%d %H:%M} UTC)" if time else "")
        if row.get("alarm") is not True:
            continue
        count = 1
        if found and found[-1].text == text:
            count += found.pop().count
        found.append(Alarm(text, time, current=False, count=count))
    return found[: -_MOST_LOGGED - 1 : -1], note
