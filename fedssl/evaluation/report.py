"""The report of a run: one HTML page that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from fedssl.evaluation import figures
from fedssl.storage import atomic_file

_HEADLINE_SHARE = 0.10


def write_report(
    path: Path,
    *,
    name: str,
    config: Mapping[str, Any],
    site_rows: Sequence[Mapping[str, Any]],
    round_rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any] | None,
    sheet: Path,
    environment: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        name: of the run.
        config: resolved configuration.
        site_rows: figures by round and site.
        round_rows: figures by round.
        results: of the evaluation, or None.
        sheet: PNG with the images nearest to prototypes; may be missing.
        environment: versions.
    """
    num_prototypes = int(config["method"].get("base", config["method"]).get("num_prototypes", 0))
    usage = round_rows[-1]["ssl/usage"] if round_rows else {}
    loader = jinja2.PackageLoader("fedssl.evaluation", ".")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html.j2"
    )
    page = template.render(
        name=name,
        synthetic=bool(results and results["synthetic"]),
        sentences=headline(results) if results else [],
        results=results,
        curves={probe: figures.label_efficiency(results["scores"], probe=probe) for probe in ("linear", "knn")}
        if results
        else {},
        telemetry=figures.site_telemetry(site_rows, num_prototypes=num_prototypes) if site_rows else "",
        usage=figures.prototype_use(usage) if usage else "",
        sheet=base64.b64encode(sheet.read_bytes()).decode() if sheet.exists() else "",
        rounds=round_rows,
        alarms=_alarms(round_rows),
        privacy=_privacy(site_rows),
        shares=sorted({score["share"] for score in results["scores"]}) if results else [],
        table=_table(results) if results else [],
        config=yaml.safe_dump(_without_paths(config), sort_keys=False),
        environment=yaml.safe_dump(dict(environment), sort_keys=False),
    )
    with atomic_file(path, "the report") as stream:
        stream.write(page.encode())


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the configuration with only the last part of every path: a page is passed on, folder names need not be."""

    def shorten(value: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
        if isinstance(value, Mapping):
            return {key: shorten(item) for key, item in value.items()}
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    return {key: shorten(value) for key, value in config.items()}


def headline(results: Mapping[str, Any]) -> list[str]:
    """Say in words what a few labels give, with intervals: wins, ties and losses alike."""
    shares = sorted({score["fraction"] for score in results["scores"]})
    share = min(shares, key=lambda value: abs(value - _HEADLINE_SHARE))
    sentences = []
    for domain in results["test_images"]:
        own = _find(results["scores"], "federated", share, domain)
        sentences.append(
            f"With labels of {own['labelled_patients']} training patients ({100 * own['share']:.3g} %), a linear probe "
            f"on the federated encoder reaches AUROC {_estimate(own, 'value')} {_place(domain)}."
        )
        sentences += [
            f"Against {gap['other']}: {gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]: {_verdict(gap)}"
            for gap in results["differences"]
            if (gap["probe"], gap["fraction"], gap["domain"]) == ("linear", share, domain)
        ]
    return sentences


def _place(domain: str) -> str:
    return (
        "on the site that never took part"
        if domain == "unseen site"
        else "on held-out patients of the sites that took part"
    )


def _verdict(gap: Mapping[str, Any]) -> str:
    if gap["low"] > 0:
        return "better"
    return "worse" if gap["high"] < 0 else "a tie within the noise"


def _find(scores: Sequence[Mapping[str, Any]], encoder: str, share: float, domain: str) -> Mapping[str, Any]:
    key = (encoder, "linear", share, domain)
    return next(s for s in scores if (s["encoder"], s["probe"], s["fraction"], s["domain"]) == key)


def _estimate(score: Mapping[str, Any], name: str) -> str:
    return f"{score[name]:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each domain, encoder and probe; one cell for each share of the labels."""
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for score in results["scores"]:
        key = (score["domain"], score["encoder"], score["probe"])
        lines.setdefault(key, {})[score["fraction"]] = _estimate(score, "value")
    return [
        {"domain": domain, "encoder": encoder, "probe": probe, "cells": [cells[share] for share in sorted(cells)]}
        for (domain, encoder, probe), cells in sorted(lines.items(), key=lambda line: line[0][0])
    ]


def _privacy(site_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what each private site has spent on its patients, over all its runs, and who trained without a guarantee."""
    newest = {row["site"]: row for row in site_rows}
    private = {site: row for site, row in newest.items() if "epsilon" in row}
    if not private:
        return []
    sentences = [
        f"Site {site}: epsilon {row['epsilon']:.2f} (delta {row['delta']:g}) is spent on each patient in all its runs."
        for site, row in sorted(private.items())
    ]
    others = sorted(newest.keys() - private.keys())
    return sentences + ([f"Without differential privacy: {', '.join(others)}."] if others else [])


def _alarms(round_rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Collapse in the last round, and every answer that was refused or missing."""
    alarms = []
    if round_rows:
        for site, signs in round_rows[-1]["ssl/collapse"].items():
            alarms.append(f"Site {site} has collapsed: {'; '.join(signs)}.")
        absent = round_rows[-1]["federation/absent"]
        alarms += [f"Site {site} does not take part: it {reason}." for site, reason in absent.items()]
    for row in round_rows:
        alarms += [f"Round {row['round']}: site {site} {reason}." for site, reason in row["federation/failed"].items()]
    return alarms
