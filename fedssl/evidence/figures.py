"""Figures of the study's page as SVG text; their colours are the page's own, for light, dark and paper."""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from fedssl.evidence.encoders import ALONE, FEDERATED, NATURAL, POOLED, SCRATCH, WITHOUT

Rows = Sequence[Mapping[str, Any]]

_INK, _SOFT, _LINE, _RED = "#1d2329", "#4d5560", "#d9dde1", "#b3261e"
_COLOURS = (
    "#0b6e99", "#c2571a", "#5b7f2b", "#7d4f9e", "#b03060", "#2a7f76", "#8a6d3b", "#5f6b76", "#3f51b5", "#c43b8c",
    "#8a7500", "#7a1f5c",
)  # fmt: skip
_NAMED = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _RED: "--red"} | {
    colour: f"--c{number}" for number, colour in enumerate(_COLOURS)
}
_RANKS = (FEDERATED, SCRATCH, POOLED, NATURAL, ALONE)  # in legends
_MOST_LINES, _MOST_BANDS = 9, 5
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fedssl", "text.parse_math": False, "axes.unicode_minus": False,
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "text.color": _INK, "axes.titlecolor": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip
_LEVELS = {
    "rotation": "degrees",
    "scale": "factor",
    "gamma": "exponent",
    "contrast": "factor",
    "brightness": "shift of grey values",
}


@dataclass(frozen=True)
class Style:
    """How an encoder is drawn in every figure.

    Attributes:
        number: of its colour.
        dashed: it is a baseline without an encoder.
        thin: it gives way where there are many lines: a site alone, or a baseline.
    """

    number: int
    dashed: bool
    thin: bool

    @property
    def colour(self) -> str:
        """For matplotlib."""
        return _COLOURS[self.number % len(_COLOURS)]

    @property
    def css(self) -> str:
        """For the page."""
        return f"var({_NAMED[self.colour]})"


def styles_of(arms: Rows, scores: Rows) -> dict[str, Style]:
    """Give every encoder and baseline its style; the order is that of legends."""
    kinds = {arm["encoder"]: arm["kind"] for arm in arms if arm["kind"] != WITHOUT and not arm["missing"]}
    variants = {arm["encoder"] for arm in arms if arm["variant"]}
    names = sorted(kinds, key=lambda name: (name in variants, _RANKS.index(kinds[name])))
    names += dict.fromkeys(row["encoder"] for row in scores if row["encoder"] not in kinds)
    return {
        name: Style(number, dashed=name not in kinds, thin=kinds.get(name, ALONE) == ALONE)
        for number, name in enumerate(names)
    }


def drawn(names: Iterable[str], arms: Rows) -> list[str]:
    """Choose the lines of a figure, by groups: all of a group or none, so that no site is left out by chance."""
    present, arms_by_name = list(dict.fromkeys(names)), {arm["encoder"]: arm for arm in arms}

    def group(name: str) -> int:
        arm = arms_by_name.get(name)
        if arm is None:
            return {"raw pixels (PCA)": 1, "metadata only": 4}.get(name, 5)
        if arm["kind"] == ALONE:
            return 2 if not arm["variant"] else 6
        return 0 if not arm["variant"] else (3 if arm["kind"] == FEDERATED else 6)

    chosen: list[str] = []
    for number in range(7):
        more = [name for name in present if group(name) == number]
        if not chosen or len(chosen) + len(more) <= _MOST_LINES:
            chosen += more
    return chosen


def efficiency(
    rows: Rows, styles: Mapping[str, Style], *, title: str, limits: tuple[float, float], goal: float | None
) -> str:
    """AUROC against the share of labelled patients in one domain, with 95 % bands.

    Args:
        rows: AUROC of the encoders to draw, with one probe.
        styles: of all encoders.
        title: of the panel.
        limits: of the AUROC axis.
        goal: AUROC of no pretraining, fine-tuned with all labels; None: not known.
    """
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(4.3, 3.2), layout="constrained")
        axes = figure.subplots()
        _lines(axes, rows, styles, "fraction")
        shares = sorted({row["fraction"] for row in rows})
        axes.set(xscale="log", xlim=(0.8 * shares[0], 1.25 * shares[-1]))
        axes.set_xticks(shares, [f"{100 * share:g}" for share in shares])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=title, xlabel="labelled training patients (%)", ylabel="AUROC", ylim=limits)
        axes.axhline(0.5, color=_SOFT, lw=0.8, ls=":")
        if goal is not None:
            axes.axhline(goal, color=_INK, lw=1.2, ls=(0, (6, 3)))
        return _svg(figure, f"{title}: AUROC against the share of labelled training patients")


def robustness(rows: Rows, styles: Mapping[str, Style], *, kind: str, limits: tuple[float, float], place: str) -> str:
    """AUROC against the level of one kind of change, one line an encoder."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(2.5, 2.3), layout="constrained")
        axes = figure.subplots()
        _lines(axes, rows, styles, "level", band=0.07)
        levels = sorted({row["level"] for row in rows})
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.set(title=kind, xlabel=_LEVELS.get(kind, "level"), ylabel="AUROC", ylim=limits)
        return _svg(figure, f"{place}: AUROC against the level of {kind}")


def convergence(rows: Rows, styles: Mapping[str, Style]) -> str:
    """Validation AUROC against images seen while fine-tuning with all labels."""
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for row in rows:
            style = styles[row["encoder"]]
            axes.plot(row["images"], _floats(row["values"]), color=style.colour, marker="o", ms=2.5, lw=1.6)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel="images seen while fine-tuning", ylabel="AUROC of validation patients")
        return _svg(figure, "AUROC of validation patients against images seen while fine-tuning")


def forest(rows: Rows, marked: Rows, *, axis: str) -> str:
    """Difference in AUROC with its interval, one line a site.

    Args:
        rows: ``site``, ``variant``, ``test_patients``, ``difference``, ``low``, ``high``, ``verdict``.
        marked: those of them that gain least.
        axis: what the difference is.
    """
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(8.2, 0.75 + 0.33 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=_SOFT, lw=1)
        for place, row in enumerate(rows):
            colour, marker = (_RED, "D") if row in marked else (_INK, "o")
            low, middle, high = _floats([row["low"], row["difference"], row["high"]])
            note = f"{gap(row)} {row['verdict']}" + ", gains least" * (row in marked)
            axes.plot([low, high], [place, place], color=colour, lw=1.6)
            axes.plot([middle], [place], marker, color=colour, ms=6)
            axes.text(1.02, place, note, transform=axes.get_yaxis_transform(), va="center", color=colour)
        axes.set_yticks(range(len(rows)), [_labelled(row) for row in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=axis)
        axes.grid(visible=False, axis="y")
        return _svg(figure, f"{axis}: the difference with its 95 % interval, one line a site")


def gap(row: Mapping[str, Any]) -> str:
    """Word a difference with its interval."""
    return f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}]"


def signed(value: float | None) -> str:
    """Word a difference."""
    return "?" if value is None else f"{value:+.3f}"


def _labelled(row: Mapping[str, Any]) -> str:
    variant = f" ({row['variant']})" if row["variant"] else ""
    return f"{row['site']}{variant}, {row['test_patients']} test patients"


def limits_of(rows: Rows) -> tuple[float, float]:
    """Find a common range of several panels, within 0..1 and a little wider than what they show."""
    shown = [row[key] for row in rows for key in ("value", "low", "high") if row[key] is not None] or [0.5]
    low, high = min(0.5, *shown), max(0.6, *shown)
    edge = 0.03 * (high - low)
    return max(low - edge, -0.02), min(high + edge, 1.02)


def _lines(axes: Axes, rows: Rows, styles: Mapping[str, Style], x: str, *, band: float = 0.10) -> None:
    """Draw one line with its band for each encoder; of many lines thin ones have none. The first is drawn last."""
    present = {row["encoder"] for row in rows}
    for name in reversed([name for name in styles if name in present]):
        line = sorted((row for row in rows if row["encoder"] == name), key=lambda row: float(row[x]))
        places, style = [row[x] for row in line], styles[name]
        value, low, high = (_floats([row[key] for row in line]) for key in ("value", "low", "high"))
        dashes = "--" if style.dashed else "-"
        if not style.thin or len(present) <= _MOST_BANDS:
            axes.fill_between(places, low, high, color=style.colour, alpha=band, lw=0)
        width = 2.4 if style.number == 0 else (1.0 if style.thin else 1.6)
        axes.plot(places, value, dashes, marker="o", ms=3, color=style.colour, lw=width)


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _svg(figure: Figure, words: str) -> str:
    """Write the figure to stand in a page: its colours and font, no width, no name that another figure may bear."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}">'
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, name in _NAMED.items():
        text = text.replace(colour, f"var({name})")
    return _own_names(text)


def _own_names(text: str) -> str:
    """Drop the ids that nothing points to, and make the others differ from those of other figures."""
    used, own = set(re.findall(r'#([\w-]+)[)"]', text)), hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{own}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", text)
