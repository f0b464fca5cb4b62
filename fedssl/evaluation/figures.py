"""Figures of the report as SVG text."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fedssl.evaluation.features import BASELINES

_COLOURS = ("#0b6e99", "#c2571a", "#5b7f2b", "#7d4f9e", "#8a6d3b", "#4d5560", "#b03060", "#2f8f83")
_DASHED = {"random encoder", *BASELINES}
_SITE_PANELS = (
    ("loss", "loss"),
    ("contrastive", "contrastive"),
    ("clustering", "swapped prediction"),
    ("code_entropy", "entropy of the codes (nats)"),
    ("effective_prototypes", "effective prototypes"),
    ("released_prototypes", "prototypes released to the others"),
    ("modality_nmi", "clusters' information on modality"),
    ("rankme", "RankMe (effective dimensions)"),
    ("change", "change of the weights (of their norm)"),
    ("cosine", "cosine to the shared weights"),
    ("images_per_s", "images / s"),
    ("epsilon", "epsilon spent (differential privacy)"),
)

_NOT_DRAWN = {"round", "site", "images", "steps", "seconds", "data_wait", "optimizer_restarted", "delta"}


def label_efficiency(scores: Sequence[Mapping[str, Any]], *, probe: str) -> str:
    """AUROC against the share of labelled patients, one panel a domain, with 95 % intervals."""
    chosen = [score for score in scores if score["probe"] == probe and score["metric"] == "auroc"]
    domains = list(dict.fromkeys(score["domain"] for score in chosen))
    encoders = list(dict.fromkeys(score["encoder"] for score in chosen))
    figure = Figure(figsize=(5.2 * len(domains), 4.6), layout="constrained")
    for axes, domain in zip(np.atleast_1d(figure.subplots(1, len(domains), sharey=True)), domains, strict=True):
        for number, encoder in enumerate(encoders):
            line = sorted(
                (s for s in chosen if (s["encoder"], s["domain"]) == (encoder, domain)), key=lambda s: s["share"]
            )
            share = [100 * score["share"] for score in line]
            style = "--" if encoder in _DASHED else "-"
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(share, [score["value"] for score in line], style, marker="o", ms=4, color=colour, label=encoder)
            axes.fill_between(
                share, [s["low"] for s in line], [s["high"] for s in line], color=colour, alpha=0.10, lw=0
            )
        _dress(axes, domain)
        _label_shares(axes, sorted({score["share"] for score in chosen}))
    axes = figure.axes[0]
    axes.set_ylabel("AUROC")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _svg(figure)


def _label_shares(axes: Axes, fractions: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks([100 * fraction for fraction in fractions], [f"{100 * fraction:.3g} %" for fraction in fractions])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training patients with labels")
    axes.axhline(0.5, color="#999999", lw=0.8, ls=":")


def site_telemetry(rows: Sequence[Mapping[str, Any]], *, num_prototypes: int) -> str:
    """Loss and telemetry of every site by round."""
    keys = {key for row in rows for key in row}
    terms = sorted(keys - _NOT_DRAWN - {key for key, _ in _SITE_PANELS})  # of the method's loss, whatever they are
    panels = [(key, title) for key, title in _SITE_PANELS if key in keys] + [(term, term) for term in terms]
    columns = 3
    figure = Figure(figsize=(11, 2.9 * math.ceil(len(panels) / columns)), layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
    sites = sorted({row["site"] for row in rows})
    for axes, (key, title) in zip(grid, panels, strict=False):
        for number, site in enumerate(sites):
            line = [(row["round"], row[key]) for row in rows if row["site"] == site and key in row]
            if line:  # a private site tells less
                axes.plot(*zip(*line, strict=True), color=_COLOURS[number % len(_COLOURS)], label=site, lw=1.5)
        if key == "clustering" and num_prototypes:
            axes.axhline(math.log(num_prototypes), color="#b3261e", lw=1.2, ls=":", label="ln K: collapsed")
        _dress(axes, title)
        axes.set_xlabel("round")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {
        text: handle
        for axes in grid[: len(panels)]
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _svg(figure)


def prototype_use(usage: Mapping[str, Sequence[float]]) -> str:
    """Heat map of the share of each site's samples by prototype, ordered by the site that uses a prototype most."""
    sites = sorted(usage)
    shares = np.array([usage[site] for site in sites])
    order = np.lexsort([-shares.max(0), shares.argmax(0)])
    figure = Figure(figsize=(11, 0.9 + 0.42 * len(sites)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * shares[:, order], aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(sites)), sites)
    axes.set_xlabel(f"{shares.shape[1]} prototypes, grouped by the site that uses them most")
    figure.colorbar(picture, ax=axes, label="% of samples", fraction=0.03)
    return _svg(figure)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text[text.index("<svg") :], count=1)
