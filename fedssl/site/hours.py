"""Time windows of a week, such as "20:00-06:00" or "sat 00:00-24:00"."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from fedssl.errors import ConfigError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:(mon|tue|wed|thu|fri|sat|sun) )?(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY = 24 * 60
_LOOK_MINUTES = 8 * _DAY


def read_hours(texts: Sequence[str], line: int) -> frozenset[int]:
    """Give the minutes of the week, from Monday 00:00, in which a round may train.

    Args:
        texts: windows; one that ends before it begins goes on after midnight.
        line: where they stand, for the error.

    Raises:
        ConfigError: one is no window.
    """
    minutes = set[int]()
    for text in texts:
        match = _WINDOW.fullmatch(text.strip().lower())
        begin, end = _bounds(match) if match else (0, 0)
        if match is None or begin == end:
            raise ConfigError(
                f'policy.yaml, line {line}: {text!r} is no time window. Write "20:00-06:00" or "sat 00:00-24:00".'
            )
        length = (end - begin) % _DAY or _DAY
        days = [_DAYS.index(match[1])] if match[1] else range(7)
        minutes |= {(day * _DAY + begin + i) % (7 * _DAY) for day in days for i in range(length)}
    return frozenset(minutes)


def _bounds(match: re.Match[str]) -> tuple[int, int]:
    begin, end = int(match[2]) * 60 + int(match[3]), int(match[4]) * 60 + int(match[5])
    right = begin < _DAY and end <= _DAY and int(match[3]) < 60 and int(match[5]) < 60
    return (begin, end) if right else (0, 0)


def is_open(minutes: frozenset[int], now: datetime) -> bool:
    """Tell whether a window is open at a local time."""
    return now.weekday() * _DAY + now.hour * 60 + now.minute in minutes


def next_opening(minutes: frozenset[int], now: datetime) -> datetime | None:
    """Give the next local minute in which a window is open; None where there is none in a week.

    Minutes that a change of the clock skips or repeats are those of the local clock.
    """
    local = now.replace(second=0, microsecond=0)
    zone = local.tzinfo
    for step in range(1, _LOOK_MINUTES):
        later = (local.astimezone() if zone is None else local) + timedelta(minutes=step)
        if is_open(minutes, later):
            return later
    return None
