"""Reading ``policy.yaml``: each value with its line. A file that cannot be read whole admits nothing."""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from fedssl.errors import ConfigError
from fedssl.site.hours import read_hours
from fedssl.site.policy import PROFILES

_NUMBER = (int, float)
KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int, "expires": date, "methods": list, "encoders": list, "configurations": list, "settings": dict,
    "tensors": list, "min_sites": int, "privacy": dict, "hours": list, "pause_file": str, "resources": dict,
}  # fmt: skip
INNER: dict[str, dict[str, type | tuple[type, ...]]] = {
    "privacy": {"required": bool, "profile": str, "epsilon_cap": _NUMBER, "prototype_patients": int},
    "resources": {
        "gpu": bool, "gpu_memory_share": _NUMBER, "memory_gb": _NUMBER, "threads": int,
        "upload_mb_per_message": _NUMBER, "upload_mb_per_day": _NUMBER, "download_mb_per_message": _NUMBER,
    },
}  # fmt: skip
REQUIRED = ("version", "expires")
VERSION = 1
_SETTING = re.compile(r"\w+(\.[\w-]+)*")
_KINDS = {
    int: "a whole number", float: "a number", date: "a day such as 2027-11-28, without quotes or time", str: "a word",
    list: "a list such as [a, b]", dict: "a block of key: value", bool: "true or false",
}  # fmt: skip
_NO_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what PyYAML raises for text that is none
_NO_VALUE = (*_NO_YAML, LookupError, AttributeError)  # and for a value that its tag or form does not allow


@dataclass(frozen=True)
class Entry:
    """A value of the policy and the line where it stands, from 1."""

    value: Any
    line: int


def read_entries(text: str) -> dict[str, Entry]:
    """Read all values by key; keys of ``settings``, ``privacy``, ``resources`` stand below theirs ("privacy.profile").

    Args:
        text: of the file.

    Raises:
        ConfigError: all that is wrong, each with its line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except _NO_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"policy.yaml is no YAML{where}. Mend it with an editor.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("policy.yaml holds no rules (key: value); nothing is admitted.")
    found, wrong = dict[str, Entry](), list[str]()
    _collect(root, "", found, wrong)
    there = {key_node.value for key_node, _ in root.value if isinstance(key_node, yaml.ScalarNode)}
    wrong += [f"{key} is missing" for key in REQUIRED if key not in there]
    wrong += _impossible(found)
    if wrong:
        raise ConfigError(f"policy.yaml admits nothing until this is mended: {'; '.join(wrong)}.")
    return found


def _collect(node: yaml.MappingNode, above: str, found: dict[str, Entry], wrong: list[str]) -> None:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            wrong.append(f"line {line}: a key is no word")
            continue
        name = f"{above}.{key_node.value}" if above else key_node.value
        block = isinstance(value_node, yaml.MappingNode)
        try:
            value = {} if block else yaml.SafeLoader("").construct_document(value_node)
        except _NO_VALUE:
            wrong.append(f"line {line}: {name} has a value that cannot be read")
            continue
        problem = "stands there twice" if name in found else _misfit(above, key_node.value, value)
        if problem:
            wrong.append(f"line {line}: {name} {problem}")
            continue
        found[name] = Entry(value, line)
        if block:
            _collect(value_node, name, found, wrong)


def _misfit(above: str, key: str, value: Any) -> str:  # noqa: ANN401 - whatever the YAML holds
    """Say why a key or the kind of its value cannot be; empty where it can."""
    if above == "settings":
        if not _SETTING.fullmatch(key):
            return "is no name of a setting (section.key)"
        plain = all(one is None or isinstance(one, str | int | float) for one in _listed(value))
        return "" if plain else "must be a number, a word or a list of these (training.local_epochs: 4)"
    known = INNER[above] if above else KEYS
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        return "is unknown " + (f"(do you mean {close[0]}?)" if close else f"(there are {', '.join(known)})")
    if _fits(value, known[key]):
        return ""
    kind = known[key]
    wanted = _KINDS[kind[-1] if isinstance(kind, tuple) else kind]
    return f"has a value of the wrong kind ({type(value).__name__}); {wanted} is wanted"


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - whatever the YAML holds
    return value if isinstance(value, list) else [value]


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:  # noqa: ANN401 - whatever the YAML holds
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) and not isinstance(value, datetime)  # which is a date, and compares with none


def _impossible(found: dict[str, Entry]) -> list[str]:
    """Give what has the right kind and cannot be all the same."""
    wrong = []
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "version": (lambda value: value == VERSION, f"must be {VERSION}"),
        "pause_file": (lambda value: value.strip() and value.isprintable(), "must be the name of a file"),
        "min_sites": (lambda value: value >= 1, "must be at least 1"),
        "privacy.profile": (lambda value: value in PROFILES, f"must be one of {', '.join(PROFILES)}"),
        "privacy.epsilon_cap": (lambda value: 0 < value < float("inf"), "must be above 0"),
        "privacy.prototype_patients": (lambda value: value >= 1, "must be at least 1"),
        "resources.gpu_memory_share": (lambda value: 0 < value <= 1, "must lie above 0 and not above 1"),
    }  # fmt: skip
    for name, (fits, what) in rules.items():
        if name in found and not fits(found[name].value):
            wrong.append(f"line {found[name].line}: {name} {what}")
    positive = [name for name in found if name.startswith("resources.") and name != "resources.gpu"]
    wrong += [
        f"line {found[one].line}: {one} must be above 0 and finite"
        for one in positive
        if not 0 < found[one].value < float("inf")
    ]
    for name in ("methods", "encoders", "configurations", "tensors", "hours"):
        if name in found and not all(isinstance(item, str) for item in found[name].value):
            wrong.append(f"line {found[name].line}: {name} must be a list of words in quotes")
    wrong += _no_windows(found.get("hours"))
    required, profile = found.get("privacy.required"), found.get("privacy.profile")
    if required and profile and profile.value in PROFILES and required.value != PROFILES[profile.value].private:
        wrong.append(f"line {required.line}: privacy.required contradicts privacy.profile {profile.value}")
    return wrong


def _no_windows(hours: Entry | None) -> Iterator[str]:
    for text in hours.value if hours is not None else ():
        try:
            read_hours([str(text)], hours.line if hours is not None else 0)
        except ConfigError as error:
            yield str(error).removeprefix("policy.yaml, ").removesuffix(".")


def read_text(path: Path) -> tuple[str, str]:
    """Read the policy; gives its text and SHA-256.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"policy.yaml cannot be read ({error.strerror}); nothing is admitted. Put it back."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("policy.yaml is no UTF-8 text; nothing is admitted. Save it as UTF-8.") from error
