"""Overrides as people write them: made ready for Hydra, and refused with a suggestion where a key does not exist."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedssl.errors import ConfigError

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
_BASE = "method@method.base"
_ADDED = ("augment.modalities.", "encoder.options.", "evaluation.where.", "study.tasks.", "study.variants.")
_OPEN = (*_ADDED, "augment.crops.")  # keys of the user's own
_FILLED = {"evaluation.where", "study.tasks", "study.variants"}  # empty, to be filled as a whole
_QUOTED = {
    "data.root", "data.store", "data.labels", "evaluation.labels", "encoder.weights", "run_dir",
    "study.natural_weights", "study.encoders",
}  # fmt: skip


def ready(override: str) -> str:
    """Quote the value of a path, which may hold blanks, commas and brackets; users should not have to.

    ``method.base=NAME`` becomes what Hydra calls the choice of a file for a part of another file, and a key of the
    user's own, such as ``encoder.options.img_size``, is added without a plus.
    """
    key, _, value = override.partition("=")
    if key == "method.base":
        return f"{_BASE}={value}"
    if key.startswith(_ADDED) or key in _FILLED:
        return f"++{override}"
    if key not in _QUOTED or value in {"", "null", "???"} or value[0] in "'\"$":
        return override
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """Quote any text as a value of Hydra's: names of sites may hold blanks, commas, quotes and braces."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:  # noqa: ANN401 - nested dictionaries
    """Give every key of nested dictionaries, joined by dots."""
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def _group_of(key: str) -> str:
    """Return the folder of configs/ that a key chooses from, or an empty string."""
    bare = key.lstrip("+~").removesuffix(_BASE.removeprefix("method"))
    return bare if bare and (CONFIG_FOLDER / bare).is_dir() else ""


def is_choice(override: str) -> bool:
    """Tell whether an override chooses a file of configs/ that exists."""
    key, _, choice = override.partition("=")
    group = _group_of(key)
    fits = (group == "experiment") == key.startswith("+")
    return bool(group) and fits and (CONFIG_FOLDER / group / f"{choice}.yaml").is_file()


def refuse_unknown(overrides: Sequence[str], known: list[str]) -> None:
    """Refuse overrides that would change nothing.

    Raises:
        ConfigError: all of them, with the nearest known keys.
    """
    problems = []
    for override in overrides:
        key = override.split("=", 1)[0]
        bare = key.lstrip("+~")
        if "=" not in override:
            problems.append(f"'{override}' is not key=value")
        elif _group_of(key) and (bare != "experiment" or key == "+experiment"):
            problems.extend(_unknown_choice(_group_of(key), override.split("=", 1)[1]))
        elif bare == "experiment":
            problems.append("write +experiment=NAME with a plus: an experiment is added to the defaults")
        elif bare.startswith(_OPEN) or bare in _FILLED:
            continue
        elif key not in known:
            near = difflib.get_close_matches(bare, known, n=2, cutoff=0.5)
            problems.append(f"'{key}' is unknown" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if problems:
        raise ConfigError(f"{'. '.join(problems)}. The keys and what they mean stand in configs/config.yaml.")


def _unknown_choice(group: str, choice: str) -> list[str]:
    choices = sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))
    return [] if choice in choices else [f"{group}={choice} does not exist; there are {', '.join(choices)}"]


def refuse_missing(keys: set[str]) -> None:
    """Refuse a configuration in which a value is still missing.

    Raises:
        ConfigError: names each, and for the root of the images how to give it.
    """
    if "data.root" in keys:
        raise ConfigError(
            "data.root is missing. Say where the images are: fedssl simulate data.root=FOLDER (or run fedssl demo)."
        )
    if keys:
        raise ConfigError(f"{', '.join(sorted(keys))} has no default. Give it on the command line, as key=value.")
