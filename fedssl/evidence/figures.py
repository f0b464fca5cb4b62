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

from fedssl.evidence.cards import Rows, gap, percent
from fedssl.evidence.encoders import ALONE, FEDERATED, NATURAL, POOLED, SCRATCH, WITHOUT

_INK, _SOFT, _LINE, _RED = "#1d2329", "#4d5560", "#d9dde1", "#b3261e"
_COLOURS = (
    "#0072b2", "#cf5600", "#00805c", "#b5478f", "#8c6d00", "#3b2a9e", "#7d1f3f", "#1593a8", "#66707a",
)  # fmt: skip
_NAMED = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _RED: "--red"} | {
    colour: f"--c{number}" for number, colour in enumerate(_COLOURS)
}
_RANKS = (FEDERATED, SCRATCH, POOLED, NATURAL, ALONE)  # in legends; the first four have a hue each
_SITE_HUES, _PLAIN_HUE = (4, 5, 6, 7), 8
_MARKERS = "s^Dvo"  # with the hues: 20 sites
_VARIANTS = ((5.0, 2.0), (5.0, 1.5, 1.0, 1.5), (2.5, 1.5), (8.0, 2.0, 2.0, 2.0))
_PLAIN = ((1.0, 1.5), (1.0, 3.0), (1.0, 1.0, 1.0, 4.0))
_KEYS = {"o": "M14 5a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "s": "M14 2h6v6h-6z", "^": "M17 1.5l3.5 6.5h-7z",
         "D": "M17 1l4 4l-4 4l-4-4z", "v": "M17 8.5l3.5-6.5h-7z"}  # fmt: skip
_MOST_BANDS = 6
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
    """How an encoder is drawn in every figure: variants have the colour and marker of their like, and other dashes.

    Attributes:
        hue: of its colour.
        dashes: lengths of strokes and gaps in widths of the line; empty: solid.
        marker: as matplotlib names it.
        width: of the line.
    """

    hue: int
    dashes: tuple[float, ...]
    marker: str
    width: float

    @property
    def line(self) -> dict[str, Any]:
        """For matplotlib."""
        dashes = (0, self.dashes) if self.dashes else "-"
        return {"color": _COLOURS[self.hue], "ls": dashes, "marker": self.marker, "lw": self.width}

    @property
    def css(self) -> str:
        """Its colour on the page."""
        return f"var({_NAMED[_COLOURS[self.hue]]})"

    @property
    def key(self) -> tuple[str, str]:
        """Its dashes and the path of its marker in a legend."""
        return " ".join(f"{self.width * length:g}" for length in self.dashes) or "none", _KEYS[self.marker]


def styles_of(arms: Rows, scores: Rows) -> dict[str, Style]:
    """Give every encoder and baseline its style; the order is that of legends."""
    kept = [arm for arm in arms if arm["kind"] != WITHOUT and not arm["missing"]]
    variants = list(dict.fromkeys(["", *(arm["variant"] for arm in kept)]))
    sites = list(dict.fromkeys(arm["site"] for arm in kept if arm["kind"] == ALONE))
    kept.sort(key=lambda arm: (arm["kind"] == ALONE, variants.index(arm["variant"]), _RANKS.index(arm["kind"])))
    styles = {arm["encoder"]: _style(arm, variants, sites) for arm in kept}
    plain = dict.fromkeys(row["encoder"] for row in scores if row["encoder"] not in styles)
    return styles | {
        name: Style(_PLAIN_HUE, _PLAIN[number % len(_PLAIN)], _MARKERS[-1 - number % 3], 1.4)
        for number, name in enumerate(plain)
    }


def _style(arm: Mapping[str, Any], variants: Sequence[str], sites: Sequence[str]) -> Style:
    number = variants.index(arm["variant"])
    dashes = _VARIANTS[(number - 1) % len(_VARIANTS)] if number else ()
    if arm["kind"] == ALONE:
        site = sites.index(arm["site"])
        return Style(_SITE_HUES[site % len(_SITE_HUES)], dashes, _MARKERS[site % len(_MARKERS)], 1.0)
    return Style(_RANKS.index(arm["kind"]), dashes, "o", 2.2 if arm["kind"] == FEDERATED else 1.6)


def banded(names: Iterable[str]) -> bool:
    """Tell whether lines are few enough to have bands."""
    return len(set(names)) <= _MOST_BANDS


def efficiency(
    rows: Rows, styles: Mapping[str, Style], *, title: str, limits: tuple[float, float], goal: float | None
) -> str:
    """AUROC against the share of labelled patients in one domain, with 95 % bands.

    Args:
        rows: AUROC of the encoders to draw, with one probe.
        styles: of all encoders.
        title: of the panel.
        limits: of the AUROC axis.
        goal: AUROC of no pretraining at its best with all labels; None: not known.
    """
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(4.3, 3.2), layout="constrained")
        axes = figure.subplots()
        _lines(axes, rows, styles, "share")
        counts = dict(sorted((row["share"], row["labelled_patients"]) for row in rows))
        shares = _apart(list(counts))
        axes.set(xscale="log", xlim=(0.8 * min(counts), 1.25 * max(counts)))
        axes.set_xticks(shares, [f"{percent(share)}\n({counts[share]})" for share in shares])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=title, xlabel="labelled training patients, % (number)", ylabel="AUROC", ylim=limits)
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
            axes.plot(row["images"], _floats(row["values"]), ms=3, **styles[row["encoder"]].line)
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
            colour, marker = _RED if row.get("verdict") == "worse" else _INK, "D" if row in marked else "o"
            low, middle, high = _floats([row["low"], row["difference"], row["high"]])
            note = f"{gap(row)} {row.get('verdict') or ''}" + ", gains least" * (row in marked)
            axes.plot([low, high], [place, place], color=colour, lw=1.6)
            axes.plot([middle], [place], marker, color=colour, ms=6)
            axes.text(1.02, place, note, transform=axes.get_yaxis_transform(), va="center", color=colour)
        axes.set_yticks(range(len(rows)), [_labelled(row) for row in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=axis)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, f"{axis}: the difference with its 95 % interval, one line a site")


def _apart(shares: Sequence[float]) -> list[float]:
    """Choose the ticks whose words do not run into each other, from all labels downwards; ``shares`` rise."""
    room, kept = 0.1 * math.log(1.25 * shares[-1] / (0.8 * shares[0])), [shares[-1]]
    for share in reversed(shares):
        kept += [share] if math.log(kept[-1] / share) > room else []
    return kept


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
    """Draw one line for each encoder; many lines have no bands. The first is drawn last."""
    present = {row["encoder"] for row in rows}
    for name in reversed([name for name in styles if name in present]):
        line = sorted((row for row in rows if row["encoder"] == name), key=lambda row: float(row[x]))
        places, drawing = [row[x] for row in line], styles[name].line
        value, low, high = (_floats([row[key] for row in line]) for key in ("value", "low", "high"))
        if banded(present):
            axes.fill_between(places, low, high, color=drawing["color"], alpha=band, lw=0)
        axes.plot(places, value, ms=3.5, **drawing)


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
