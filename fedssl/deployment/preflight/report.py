"""What a look before joining found: a page for the hospital, and JSON that names nobody for the operator."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from fedssl.storage import atomic_file

OK, WARN, FAIL, UNKNOWN = "ok", "warn", "fail", "unknown"
Figure = float | int | str | bool
NOT_TOLD = "not told: private"
_PATH = re.compile(r"(?<![\w./:~-])(?:~|\.{1,2})?/[^\s'\",;()\[\]{}]+")
_BELOW = r"(?:/[^\s'\",;]*)?"  # a path in a folder is hidden whole
_DIGITS = 4


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        state: ``ok``, ``warn`` (it works, but not well), ``fail`` (the site must not join so) or ``unknown``.
        found: a sentence.
        advice: what to do; empty where nothing is to be done or ``found`` says it.
        figures: numbers and words by name.
    """

    name: str
    state: str
    found: str
    advice: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings.

    Attributes:
        site: name of the site.
        server: ``HOST:PORT``.
        time: when it was made.
        version: of fedssl here.
        system: operating system, processor, Python.
        private: no count of patients or images is told.
        findings: in the order of the checks.
        hidden: texts of this machine (paths, users, its name) and the word that stands for each in what is shared.
    """

    site: str
    server: str
    time: datetime
    version: str
    system: str
    private: bool
    findings: Sequence[Finding]
    hidden: Sequence[tuple[str, str]] = field(default=(), repr=False)

    def names(self, state: str) -> list[str]:
        """Name the checks that ended in a state."""
        return [one.name for one in self.findings if one.state == state]

    @property
    def ready(self) -> bool:
        """Whether no check failed."""
        return not self.names(FAIL)

    @property
    def sentence(self) -> str:
        """The report in one sentence."""
        failed, warned, unknown = (self.names(state) for state in (FAIL, WARN, UNKNOWN))
        if failed:
            return f"{len(failed)} {'check' if len(failed) == 1 else 'checks'} failed: {', '.join(failed)}."
        parts = [f"{what}: {', '.join(names)}" for what, names in (("warnings", warned), ("unknown", unknown)) if names]
        return f"Ready to join{f' ({chr(59).join(parts)})' if parts else ''}.".replace(";", "; ")


def report_json(report: Report) -> dict[str, Any]:
    """Give what can be shared: states, counts, versions, hardware; no path, user, machine, patient or file."""
    return {
        "site": report.site,
        "server": report.server,
        "time": report.time.isoformat(timespec="seconds"),
        "version": report.version,
        "system": report.system,
        "private": report.private,
        "ready": report.ready,
        "findings": [
            {
                "name": one.name,
                "state": one.state,
                "found": _shareable(one.found, report.hidden),
                "advice": _shareable(one.advice, report.hidden),
                "figures": {key: _figure(value, report.hidden) for key, value in one.figures.items()},
            }
            for one in report.findings
        ],
    }


def _figure(value: Figure, hidden: Sequence[tuple[str, str]]) -> Figure:
    if isinstance(value, str):
        return _shareable(value, hidden)
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
    return value


def _shareable(text: str, hidden: Sequence[tuple[str, str]]) -> str:
    """Put words in place of what belongs to this machine; sentences should hold none of it, and this is the net."""
    for own, word in sorted(hidden, key=lambda pair: -len(pair[0])):
        if own:
            below = _BELOW if "/" in own else ""
            text = re.sub(rf"(?<![\w.-]){re.escape(own)}{below}(?![\w-])", word, text)
    return _PATH.sub("(path)", text)


def write_page(report: Report, path: Path) -> None:
    """Write the page that stays at the hospital.

    Args:
        report: what was found.
        path: of the page.

    Raises:
        StorageError: it cannot be written.
    """
    counts = {state: len(report.names(state)) for state in (FAIL, WARN, UNKNOWN, OK)}
    page = _template().render(report=report, counts=counts, words=_WORDS)
    with atomic_file(path, "the page") as stream:
        stream.write(page.encode("utf-8", "replace"))


_WORDS = {OK: "in order", WARN: "look at this", FAIL: "mend this", UNKNOWN: "not known"}


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedssl.deployment", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"shown": shown, "words": lambda name: name.replace("_", " ")}
    return environment.get_template("preflight.html.j2")


def shown(value: Figure) -> str:
    """Write a figure for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return value if isinstance(value, str) else f"{value:.{_DIGITS}g}" if abs(value) < 10**_DIGITS else f"{value:.0f}"
