"""Results on a terminal: tables for people, JSON for programs."""

import json
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 200  # where no terminal says how wide it is, tables are not cut
out = Console() if Console().is_terminal else Console(width=_PIPE_WIDTH)


class Format(StrEnum):
    """How a verb prints its result."""

    TEXT = "text"
    JSON = "json"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows that share their keys."""
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table, markup=False)


def print_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_line(text: str) -> None:
    """Print one sentence as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


_COLUMNS = ("site", "patients", "studies", "series", "images", "files", "unreadable", "modalities")
_COUNTS = {
    "unreadable": "could not be used",
    "text_risk_let_through": "may show text in the pixels, let in by data.burned_in (mask hides all but the scan)",
    "flags": "image looks wrong",
    "other_files": "other file, left alone",
}
_MOST_LINES = 12


def print_index(summary: dict[str, Any]) -> None:
    """Print what was found at a site, see ``fedssl.data.indexing.summary``."""
    print_table([{name: site[name] for name in _COLUMNS} for site in summary["sites"]])
    for key, text in _COUNTS.items():
        lines = list(summary[key].items())
        for name, count in lines[:_MOST_LINES]:
            print_line(f"{count} x {text}: {name}")
        if len(lines) > _MOST_LINES:
            print_line(f"{sum(count for _, count in lines[_MOST_LINES:])} x {text}: for {len(lines)} reasons in all")
    copies = summary["duplicate_images"]
    if any(copies.values()):
        print_line(
            f"Duplicates: {copies['exact']} exact, {copies['near']} near, {copies['turned']} turned by 90 degrees; "
            f"{copies['across_patients']} of these pairs belong to two patients, who are kept in the same split."
        )


def print_headline(results: dict[str, Any]) -> None:
    """Print the sentences that sum up an evaluation."""
    from fedssl.evaluation.report import headline

    for sentence in headline(results):
        print_line(sentence)
    if results["synthetic"]:
        print_line("Synthetic images: these figures say nothing about real patients.")
