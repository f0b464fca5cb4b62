"""The overrides that make a run's resolved configuration again, so that the same settings train on other images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fedssl import config as settings
from fedssl.config import Config
from fedssl.errors import ConfigError
from fedssl.overrides import CONFIG_FOLDER, quoted

_NOT_OF_TRAINING = ("defaults", "name", "run_dir", "resume", "overwrite", "evaluation", "study")
Node = Mapping[str, Any]


def repeated(config: Config, fingerprint: str) -> list[str]:
    """Give overrides that ``fedssl.config.load`` turns into the same settings, without those of place and evaluation.

    Args:
        config: resolved, of a run.
        fingerprint: of its checkpoint, to compare with.

    Raises:
        ConfigError: the settings cannot be composed again.
    """
    leaves = list(_leaves(config, _default(), ""))
    needed = [*_choices(config), *(leaf.text for leaf in leaves if leaf.default == "???")]
    known = settings.load(needed)
    overrides = [
        *needed,
        *(leaf.text for leaf in leaves if leaf.default != "???" and _at(known, leaf.key) != leaf.value),
    ]
    if settings.fingerprint(settings.load(overrides)) != fingerprint:
        raise ConfigError(
            "The settings of this run cannot be repeated: it was made by another version of fedssl or of its configs. "
            "Audit it without --shadows, or train it again."
        )
    return overrides


def _default() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIG_FOLDER / "config.yaml").read_text(encoding="utf-8"))
    return loaded


def _choices(config: Config) -> Iterator[str]:
    """Choose the file of each group that makes the same object with the same settings."""
    for section, node in config.items():
        if (CONFIG_FOLDER / section).is_dir() and isinstance(node, dict):
            yield f"{section}={_file_of(section, node)[0]}"
            if "base" in node:
                yield f"{section}.base={_file_of(section, node['base'])[0]}"


def _file_of(group: str, node: Node) -> tuple[str, dict[str, Any]]:
    """Find the file of a group whose keys fit a node best; its values do not matter."""
    fitting = []
    for path in sorted((CONFIG_FOLDER / group).glob("*.yaml")):
        raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        raw = raw.get(group, raw)  # of a file for the whole configuration
        own = {name: value for name, value in raw.items() if name != "defaults"}
        if own.get("_target_") == node.get("_target_") and own.keys() <= node.keys():
            fitting.append((len(own.keys() & node.keys()), path.stem, own))
    if not fitting:
        raise ConfigError(f"No file of configs/{group} makes what this run used. Audit it without --shadows.")
    best = max(count for count, _, _ in fitting)
    return next((name, own) for count, name, own in fitting if count == best)


@dataclass(frozen=True)
class _Leaf:
    """A setting, and what the files of configs/ say of it."""

    key: str
    value: Any
    default: Any

    @property
    def text(self) -> str:
        """As an override."""
        return f"{'++' if self.key.startswith('augment.crops.') else ''}{self.key}={_written(self.value)}"


def _at(config: Node, key: str) -> Any:  # noqa: ANN401 - whatever YAML holds
    """Find a setting; None where there is none."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _leaves(node: Node, known: Node, prefix: str) -> Iterator[_Leaf]:
    """Give every setting; dictionaries are entered as far as the files of configs/ know them."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if name == "_target_" or key in _NOT_OF_TRAINING:
            continue
        inner = known.get(name)
        if isinstance(value, dict) and (key == "method.base" or (CONFIG_FOLDER / key).is_dir()):
            inner = _file_of(key.split(".")[0], value)[1]
        if isinstance(value, dict) and value and isinstance(inner, dict):
            yield from _leaves(value, inner, f"{key}.")
        else:
            yield _Leaf(key, value, inner)


def _written(value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    """Write a value in Hydra's grammar."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_written(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str):
        return quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
