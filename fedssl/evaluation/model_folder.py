"""A site's model on disk: weights, what they mean, a page for people, and studies to label next."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.calibration_page import calibration_page
from fedssl.storage import atomic_file, atomic_folder, write_json

WEIGHTS, FACTS, PAGE, NEXT = "model.safetensors", "model.json", "calibration.html", "next-studies.csv"
KIND, FORMAT = "fedssl site model", 1
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "encoder": dict, "in_chans": int, "edge": int, "data": dict, "outputs": list, "exclusive": bool,
    "temperature": (int, float), "prior": list, "cutoffs": dict, "weights_sha256": str,
}  # fmt: skip


def refuse_folder(folder: Path, *, overwrite: bool) -> None:
    """Check, before hours of work, that a model may be written there.

    Raises:
        ConfigError: something else is there, or a model and ``overwrite`` is false.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FACTS).is_file() or _kind_of(folder) != KIND:
        raise ConfigError(f"{folder.name} holds something that is no site model, so it is left alone. Choose another.")
    if not overwrite:
        raise ConfigError(f"{folder.name} holds a site model. Replace it with overwrite, or choose another folder.")


def _kind_of(folder: Path) -> object:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts.get("kind") if isinstance(facts, dict) else None


def write_model(
    folder: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], write_next: Callable[[Path], None]
) -> dict[str, Any]:
    """Write the whole folder or nothing; an old model there is replaced.

    Args:
        folder: see ``refuse_folder``.
        state: tensors ``encoder.*`` and ``head.*``.
        facts: what the weights mean; JSON.
        write_next: writes the list of studies to the path it is given.

    Returns:
        The facts as they were written.

    Raises:
        StorageError: the disk is full.
    """
    folder = folder.absolute()
    with atomic_folder(folder, "the model") as made:
        made.chmod(0o700)
        save_tensors(made / WEIGHTS, state, {"kind": KIND, "format": FORMAT}, "the model")
        whole = {"kind": KIND, "format": FORMAT, **facts, "weights_sha256": _digest(made / WEIGHTS)}
        write_json(made / FACTS, whole, "the model")
        with atomic_file(made / PAGE, "the calibration report") as stream:
            stream.write(calibration_page(whole).encode())
        write_next(made / NEXT)
        if folder.exists():
            shutil.rmtree(folder)
    return whole


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``write_model`` wrote: facts and tensors.

    Raises:
        ConfigError: there is no model, or this version of fedssl cannot read it.
        DataError: it is damaged.
    """
    if not (folder / FACTS).is_file():
        raise ConfigError(f"There is no {FACTS} in {folder.name}. Give a folder that fedssl finetune wrote.")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{FACTS} is damaged. Run fedssl finetune again, or restore it.") from error
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise ConfigError(f"{FACTS} does not describe a site model. Give a folder that fedssl finetune wrote.")
    if facts.get("format") != FORMAT:
        raise ConfigError(
            f"The model has the format {facts.get('format')!r}, but this fedssl reads {FORMAT}. Use the version of "
            "fedssl that wrote it, or run fedssl finetune again."
        )
    wrong = [name for name, kind in _TYPES.items() if not isinstance(facts.get(name), kind)]
    if wrong or len(facts["prior"]) != len(facts["outputs"]):
        raise DataError(f"{FACTS} is damaged: {', '.join(wrong) or 'prior'} cannot be used. Restore it.")
    if not (folder / WEIGHTS).is_file() or _digest(folder / WEIGHTS) != facts["weights_sha256"]:
        raise DataError(
            f"{WEIGHTS} is missing, damaged or not the one that {FACTS} describes. Restore both together, or run "
            "fedssl finetune again."
        )
    return facts, load_tensors(folder / WEIGHTS)[0]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
