"""A site's model on disk: weights, what they mean, a page for people, and studies to label next; and its use."""

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from fedssl import progress
from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.data.cache import ImageStore
from fedssl.errors import ConfigError, DataError, StorageError
from fedssl.evaluation.calibration import as_written, probabilities
from fedssl.evaluation.calibration_page import calibration_page
from fedssl.evaluation.finetune import Classifier, logits
from fedssl.storage import atomic_file, atomic_folder, write_json

WEIGHTS, FACTS, PAGE, NEXT = "model.safetensors", "model.json", "calibration.html", "next-studies.csv"
_NAMES = (FACTS, WEIGHTS, PAGE, NEXT)
KIND, FORMAT = "fedssl site model", 1
_CHUNK = 1024  # images that are scored at a time
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "encoder": dict, "in_chans": int, "edge": int, "data": dict, "outputs": list, "exclusive": bool,
    "temperature": (int, float), "prior": list, "cutoffs": dict, "weights_sha256": str,
}  # fmt: skip


def refuse_folder(folder: Path, *, overwrite: bool) -> None:
    """Check, before hours of work, that a model may be written there.

    Raises:
        ConfigError: something else is there, or a model and ``overwrite`` is false, or other files beside the model.
    """
    folder = folder.resolve()
    _restore(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FACTS).is_file() or _kind_of(folder) != KIND:
        raise ConfigError(f"{folder.name} holds something that is no site model, so it is left alone. Choose another.")
    if not overwrite:
        raise ConfigError(f"{folder.name} holds a site model. Replace it with --overwrite, or choose another folder.")
    others = sum(entry.name not in _NAMES for entry in folder.iterdir())
    if others:
        raise ConfigError(
            f"Beside a site model {folder.name} holds {'1 other file' if others == 1 else f'{others} other files'}, "
            f"which --overwrite would remove. Move what is not {', '.join(_NAMES)}, or choose another folder."
        )


def _kind_of(folder: Path) -> object:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts.get("kind") if isinstance(facts, dict) else None


def write_model(
    folder: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], write_next: Callable[[Path], None]
) -> dict[str, Any]:
    """Write the whole folder or nothing; an old model there is replaced only when the new one lies whole beside it.

    Args:
        folder: see ``refuse_folder``.
        state: tensors ``encoder.*`` and ``head.*``.
        facts: what the weights mean; JSON.
        write_next: writes the list of studies to the path it is given.

    Returns:
        The facts as they were written.

    Raises:
        StorageError: the disk is full, or the folder cannot be replaced.
    """
    folder = folder.resolve()
    _sweep(folder)
    with atomic_folder(_beside(folder, "new"), "the model") as made:
        made.chmod(0o700)
        save_tensors(made / WEIGHTS, state, {"kind": KIND, "format": FORMAT}, "the model")
        whole = {"kind": KIND, "format": FORMAT, **facts, "weights_sha256": _digest(made / WEIGHTS)}
        write_json(made / FACTS, whole, "the model")
        with atomic_file(made / PAGE, "the calibration report") as stream:
            stream.write(calibration_page(whole).encode())
        write_next(made / NEXT)
    _put_in_place(folder)
    return whole


def _beside(folder: Path, state: str) -> Path:
    """Name what a model is called while it is replaced: ``new`` until it is in place, ``old`` until it is removed."""
    return folder.with_name(f".{folder.name}.{state}")


def _put_in_place(folder: Path) -> None:
    """Set the old model aside, put the new one in its place, remove the old; ``_restore`` mends what a kill leaves."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        _restore(folder)
        raise StorageError(
            f"The model could not be put in place ({error.strerror}); what was there is unchanged. The new one lies "
            f"whole beside it in {new.name}: move it by hand, or choose another folder and run the command again."
        ) from error
    _discard(folder)


def _restore(folder: Path) -> None:
    """Give an old model its place back if a kill has left none there."""
    old = _beside(folder, "old")
    if not folder.exists() and (old / FACTS).is_file():
        old.rename(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left beside a model, never the only model."""
    _restore(folder)
    _discard(folder)
    shutil.rmtree(_beside(folder, "new"), ignore_errors=True)
    for half in folder.parent.glob(f"..{glob.escape(folder.name)}.new.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Remove an old model; files that somebody has put into it meanwhile are kept and told of."""
    old = _beside(folder, "old")
    if not old.exists():
        return
    with contextlib.suppress(OSError):
        for name in _NAMES:
            (old / name).unlink(missing_ok=True)
    try:
        old.rmdir()
    except OSError:
        kept = next(path for n in range(1, 1000) if not (path := folder.with_name(f"{folder.name}.kept{n}")).exists())
        old.rename(kept)
        text = f"The old {folder.name} held files that are no part of a model. They are kept beside it in {kept.name}."
        progress.publish(progress.Note(text, alarm=True))


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``write_model`` wrote: facts and tensors.

    Raises:
        ConfigError: there is no model, or this version of fedssl cannot read it.
        DataError: it is damaged.
    """
    if not folder.exists() and (_beside(folder.resolve(), "old") / FACTS).is_file():
        folder = _beside(folder.resolve(), "old")  # it is being replaced, or was when the process was killed
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


def classifier_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], encoder: nn.Module) -> Classifier:
    """Give an encoder and a new head their weights.

    Raises:
        DataError: the weights do not fit.
    """
    model = Classifier(encoder, len(facts["outputs"]))
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise DataError(f"The weights do not fit the encoder that {FACTS} describes. Restore the folder.") from error
    return model


def score_images(model: Classifier, facts: Mapping[str, Any], store: ImageStore) -> Float[np.ndarray, "images outputs"]:
    """Give the calibrated probabilities of all images of a store, as they are written."""
    rows, parts = np.arange(len(store)), []
    for start in range(0, len(rows), _CHUNK):
        parts.append(logits(model, store, rows[start : start + _CHUNK], edge=facts["edge"]))
        progress.publish(progress.Done("predicting", min(start + _CHUNK, len(rows)), len(rows)))
    prior = np.asarray(facts["prior"], np.float64)
    temperature, exclusive = facts["temperature"], facts["exclusive"]
    return as_written(probabilities(np.concatenate(parts), temperature, exclusive=exclusive, prior=prior))
