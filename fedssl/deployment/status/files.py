"""Reads files that others are writing: what is missing, torn or of another kind is left out, and nothing is raised."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError

_SHOWN, _LARGEST = 400, 1e15
Row = Mapping[str, Any]


def read_object(path: Path) -> Row:
    """Read a JSON object; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def read_objects(path: Path) -> Iterator[Row]:
    """Give the JSON objects of a file of lines, those that are whole."""
    with suppress(OSError), path.open("rb") as stream:
        for line in stream:
            with suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict):
                    yield content


def modified(path: Path) -> datetime | None:
    """When a file was written last; None where there is none."""
    with suppress(OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return None


def expiry(path: Path) -> datetime | None:
    """When a certificate expires; None where none can be read."""
    from fedssl.deployment.identity.certificates import read_certificate

    with suppress(ConfigError):
        return read_certificate(path, "").not_valid_after_utc
    return None


def words(value: object, limit: int = _SHOWN) -> str:
    """Give a text that came from anyone: one line of printable letters, cut off; empty for what is no text."""
    if not isinstance(value, str):
        return ""
    plain = "".join(letter if letter.isprintable() else " " for letter in value[: limit + 1]).strip()
    return plain if len(plain) <= limit else plain[:limit] + "..."


def number(value: object) -> float | None:
    """Give a number that can be drawn; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # so NaN is none


def whole(value: object) -> int | None:
    """Give a whole number that is not negative; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST else None


def moment(value: object) -> datetime | None:
    """Give a time written in ISO 8601, in UTC; None for anything else."""
    if isinstance(value, str):
        with suppress(ValueError, OverflowError):
            found = datetime.fromisoformat(value)
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return None


def mapping(value: object) -> Row:
    """Give a JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def texts(value: object) -> list[str]:
    """Give the texts of a list, each as ``words``."""
    return [text for one in value if (text := words(one))] if isinstance(value, list) else []


def span(seconds: float) -> str:
    """Say a length of time: 45 s, 20 min, 3 h 5 min, 4 days."""
    minutes = round(max(0.0, seconds) / 60)
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{minutes // (24 * 60)} days"
