"""The operator's page: one HTML file that needs nothing beside it and asks to be read again every ten seconds."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from fedssl.deployment.status.files import span
from fedssl.deployment.status.standing import Status
from fedssl.deployment.status.values import IN, MISSING, WAITING, Curve, Site
from fedssl.storage import atomic_file

_COLOURS = (
    "#0b84c4",
    "#d2691e",
    "#4c9a2a",
    "#9b59d0",
    "#b8860b",
    "#d6477f",
    "#2aa198",
    "#8a94a0",
)  # on white and black
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 46.0, 10.0, 10.0, 34.0, 420.0, 240.0
_UNKNOWN = "not known"
_WORDS = {IN: "taking part", WAITING: "waiting", MISSING: "missing"}
_STEPS = (1.0, 2.0, 5.0, 10.0)
_NEUTRAL, _GOOD, _BAD = "neutral", "good", "bad"
_TONES = {"running": _GOOD, "done": _GOOD, "retrying": _BAD, "silent": _BAD, "failed": _BAD, "gave up": _BAD}


@dataclass(frozen=True)
class _Line:
    """A curve on its way to the page: its points as SVG writes them, and where it ends."""

    name: str
    colour: str
    dash: str
    width: float
    points: str
    end: tuple[float, float]
    words: str


@dataclass(frozen=True)
class _Chart:
    """Curves with their axes; ticks are pairs of place and label."""

    title: str
    lines: Sequence[_Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    box: Mapping[str, float] = field(
        default_factory=lambda: {
            "left": _LEFT, "top": _TOP, "right": _WIDTH - _RIGHT, "bottom": _HEIGHT - _BOTTOM, "width": _WIDTH,
            "height": _HEIGHT,
        }
    )  # fmt: skip


def write_status_page(path: Path, status: Status) -> None:
    """Write the page.

    Args:
        path: the HTML file; it is replaced as a whole.
        status: what to show.

    Raises:
        StorageError: it cannot be written.
    """
    page = status_page(status)
    with atomic_file(path, "the status page") as stream:
        stream.write(page.encode("utf-8", "replace"))


def status_page(status: Status) -> str:
    """Render the page."""
    styles = {site.name: (_COLOURS[n % 8], _DASHES[(n + n // 8) % 4]) for n, site in enumerate(status.sites)}
    return _template().render(
        status=status,
        tone=_TONES.get(status.state, _NEUTRAL),
        now=[alarm for alarm in status.alarms if alarm.current],
        before=[alarm for alarm in status.alarms if not alarm.current],
        charts=_charts(status, styles),
        words=_WORDS,
        share=_share(status),
        private=any(site.epsilons for site in status.sites),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl.deployment", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"span": _span, "clock": _clock, "figure": figure, "size": size, "count": _count}
    return environment.get_template("status.html.j2")


def _share(status: Status) -> float | None:
    return min(100.0, 100.0 * status.round / status.rounds) if status.rounds else None


def _charts(status: Status, styles: Mapping[str, tuple[str, str]]) -> list[_Chart]:
    """Draw losses, and epsilons where sites are private."""
    mean = tuple((one.number, one.loss) for one in status.history if one.loss is not None)
    found = []
    if mean or any(site.losses for site in status.sites):
        curves = [("mean of all sites", mean, "currentColor", "", 3.0)] if mean else []
        found.append(_chart("Loss by round", curves + _curves(status.sites, styles, "losses")))
    if any(site.epsilons for site in status.sites):
        title = "Epsilon spent on each patient (differential privacy), by round"
        found.append(_chart(title, _curves(status.sites, styles, "epsilons"), floor=0.0))
    return found


_Curve = tuple[str, Curve, str, str, float]  # name, points, colour, dash, width


def _curves(sites: Sequence[Site], styles: Mapping[str, tuple[str, str]], name: str) -> list[_Curve]:
    return [(site.name, getattr(site, name), *styles[site.name], 1.6) for site in sites if getattr(site, name)]


def _chart(title: str, curves: Sequence[_Curve], floor: float | None = None) -> _Chart:
    rounds = [count for _, curve, *_ in curves for count, _ in curve]
    values = [value for _, curve, *_ in curves for _, value in curve]
    alone = 0.5 if min(rounds) == max(rounds) else 0.0
    x = _Axis(min(rounds) - alone, max(rounds) + alone, _LEFT, _WIDTH - _RIGHT)
    low, high = min(values) if floor is None else min(floor, *values), max(values)
    if high - low <= 1e-9 * abs(high):
        low, high = low - max(0.5, 0.01 * abs(low)), high + max(0.5, 0.01 * abs(high))
    step = _step(high - low, 5)
    y = _Axis(step * math.floor(low / step), step * math.ceil(high / step), _HEIGHT - _BOTTOM, _TOP)
    whole = max(1.0, _step(x.high - x.low, 6))
    lines = [
        _Line(
            name, colour, dash, width, " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in curve),
            (round(x(curve[-1][0]), 1), round(y(curve[-1][1]), 1)),
            f"{name}: {curve[-1][1]:.4g} in round {curve[-1][0]}",
        )
        for name, curve, colour, dash, width in curves
    ]  # fmt: skip
    return _Chart(title, lines, x.ticks(whole), y.ticks(step))


@dataclass(frozen=True)
class _Axis:
    """Maps values to places."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Place a value."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self, step: float) -> list[tuple[float, str]]:
        """Places and labels of the multiples of ``step``."""
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(round(self(n * step), 1), f"{n * step:.6g}") for n in range(first, last + 1)]


def _step(length: float, count: int) -> float:
    """Choose the least of 1, 2, 5 times a power of ten that cuts a length into no more than ``count`` pieces."""
    rough = length / count
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in _STEPS if factor * power >= rough * (1 - 1e-9))


def _span(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else span(seconds)


def _clock(time: datetime | None) -> str:
    return _UNKNOWN if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def figure(value: float | None, digits: int = 3) -> str:
    """Say a number; "-" where it is not known."""
    return "-" if value is None else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def size(count: int | None) -> str:
    """Say a number of bytes; "-" where it is not known."""
    if count is None:
        return "-"
    for unit, bytes_ in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count} B"
