"""What is going on, for a person: events published by the work, shown by whoever listens.

The work (decoding, training, rounds) publishes; the command line installs one listener. Without a listener all
but alarms are dropped, so that the library stays silent when it is imported by others.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One training step at one site. ``loss`` is the last known value, ``data_wait`` a share of the time (0 to 1)."""

    site: str
    round: int
    rounds: int
    step: int
    steps: int
    loss: float
    images_per_s: float
    data_wait: float


@dataclass(frozen=True)
class Done:
    """Work with a known end: ``count`` of ``total`` units of ``what``; ``growing``: the total is not final yet."""

    what: str
    count: int
    total: int
    growing: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence for the log; ``alarm`` sentences must be seen."""

    text: str
    alarm: bool = False


Event = Step | Done | Note
Listener = Callable[[Event], None]

_listeners: list[Listener] = []
_log = logging.getLogger("fedssl")


def listen(listener: Listener) -> Callable[[], None]:
    """Add a listener; the returned function removes it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def publish(event: Event) -> None:
    """Hand an event to every listener; without one, an alarm still goes to the log."""
    if not _listeners and isinstance(event, Note) and event.alarm:
        _log.warning(event.text)
    for listener in tuple(_listeners):
        listener(event)
