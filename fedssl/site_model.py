"""A site's own model: an encoder fine-tuned on its labels, with honest probabilities; and its use on new images."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import nn

from fedssl import __version__, progress
from fedssl.build import build_views, image_edge
from fedssl.build_images import image_store
from fedssl.config import Config, instantiate_node, load
from fedssl.data.cache import ImageStore
from fedssl.data.indexing.scan import read_table
from fedssl.data.labels import lost_labels
from fedssl.data.store import Source
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation import judgement
from fedssl.evaluation.calibration import decide
from fedssl.evaluation.file_lists import (
    files_of,
    refuse_predictions,
    refuse_sites_below,
    write_predictions,
    write_suggestions,
)
from fedssl.evaluation.finetune import logits
from fedssl.evaluation.model_folder import classifier_of, read_model, refuse_folder, score_images, write_model
from fedssl.evaluation.next_studies import suggest
from fedssl.evaluation.out_of_fold import Lesson, cross_validate, warn_of_few, without_absent
from fedssl.evaluation.recipe import Recipe
from fedssl.evaluation.task import Labelled, Question, label_images
from fedssl.methods.base import Method
from fedssl.training import pick_device
from fedssl.values import check_values
from fedssl.weights import identity, resolve_run, trained_checkpoint, trained_method

_ENCODERS = "fedssl.encoders."
_OF_IMAGES = ("edge", "burned_in")  # settings of data that a model is used with


@dataclass(frozen=True)
class _Opened:
    """A trained run, and a site's images: ``here`` says which of the store's are the site's."""

    config: Config
    settings: Config
    method: Method
    origin: dict[str, Any]
    source: Source
    store: ImageStore
    here: Bool[np.ndarray, " stored"]


def fit_site_model(
    run: Path,
    labels: Path,
    *,
    label: str | list[str],
    output: Path,
    images: str | None = None,
    site: str = "",
    data: Mapping[str, Any] | None = None,
    **changed: Any,  # noqa: ANN401 - checked by name and by Recipe
) -> dict[str, Any]:
    """Fine-tune a run's encoder on a site's labels and write the folder ``output``.

    Every figure comes from cross-validation by patient; the model kept has learned from all labelled patients.

    Args:
        run: a run folder or a checkpoint in one.
        labels: CSV or Parquet with the column ``file`` (path below the root) and the labels.
        label: a column of classes; several columns: findings (1, 0, empty).
        output: a new or empty folder for ``model.safetensors``, ``model.json``, ``calibration.html`` and
            ``next-studies.csv``, which names files and stays at the site.
        images: folder, manifest or PACS; default: the run's data.root.
        site: whose ``images`` are (their layout is then ``<patient>/...``); of the run's own root: use only this site.
        data: settings of ``data`` that differ from the run's, such as ``burned_in``.
        changed: ``number_next`` (studies to suggest), ``resamples``, ``overwrite``, ``threads`` (of the CPU; default:
            the run's), and fields of ``Recipe``.

    Returns:
        What ``model.json`` holds.

    Raises:
        ConfigError: there is no trained run, a setting is unusable, or ``output`` holds something else.
        DataError: the labels do not fit, or too few patients have one.
        StorageError: the disk is full.
    """
    wish = judgement.wish_of(changed)
    refuse_folder(output, overwrite=wish.overwrite)
    at = _open(run, images, site, data)
    threads = wish.threads or at.config["training"]["threads"]
    judgement.use_threads(threads)
    found, counts = _labelled(at, labels, label)
    warn_of_few(found.patients, of_one_site=bool(images and site))
    lesson, seed = _lesson(at, found, wish.recipe), at.config["seed"]
    tested, model = cross_validate(lesson, seed=seed), lesson.learn(seed)
    kept = logits(model, at.store, found.rows, edge=lesson.edge)
    judged = judgement.judge(tested, kept, found.targets, lesson.patients, resamples=wish.resamples)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    chosen = suggest(at.method, at.store, at.here, found.rows, edge=lesson.edge, number=wish.number_next)
    files = files_of(at.store, at.source, [one.row for one in chosen])
    write_next = partial(write_suggestions, suggestions=chosen, files=files, studies=at.store.column("study"))
    own = {"label": label, "site": site, "labels": counts, "next_studies": len(chosen), "threads": threads}
    return write_model(output, state, {**_facts(at, found, wish), **judged, **own}, write_next)


def _settings(images: str, base: Mapping[str, Any], changed: Mapping[str, Any] | None, channels: int) -> Config:
    """Make the configuration that images are opened with: settings of a run or a model, changed by the caller."""
    config = load([f"data.root={images}"])
    own = config["data"]
    unknown = sorted((changed or {}).keys() - own.keys())
    if unknown:
        names = ", ".join(f"data.{name}" for name in unknown)
        near = judgement.nearest(unknown, sorted(own))
        raise ConfigError(f"{names} is unknown{near}. See configs/data/folder.yaml.")
    kept = {name: value for name, value in base.items() if name in own}
    config["data"] = {**own, **kept, **(changed or {}), "root": own["root"]}
    check_values(config)
    config["encoder"]["in_chans"] = channels
    return config


def _open(run: Path, images: str | None, site: str, data: Mapping[str, Any] | None) -> _Opened:
    config, method = trained_method(run)
    folder, path = resolve_run(run)
    origin = identity(trained_checkpoint(path), method)
    if images and site:
        refuse_sites_below(images, site, origin["sites"])
    root, channels = config["data"]["root"], config["encoder"]["in_chans"]
    settings = _settings(images or root, config["data"], data, channels)
    source = image_store(settings, site=site if images else "", rescan=images is not None)
    store = source.open(channels=channels, rescan=images is not None)
    here = np.ones(len(store), bool) if images or not site else store.column("site") == site
    origin["had_these_images"] = images is None or site in origin["sites"] or settings["data"]["root"] == root
    origin["had_labels"] = bool(method.classes)
    origin["collapse"] = judgement.signs_of_collapse(folder, origin["round"])
    return _Opened(config, settings, method.to(pick_device("auto")), origin, source.source, store, here)


def _labelled(at: _Opened, labels: Path, label: str | list[str]) -> tuple[Labelled, dict[str, int]]:
    question = Question(label, {})
    table = read_table(labels, question.labels)
    found = label_images(at.store, table, question)
    found = found.take(at.here[found.rows])
    if not len(found.rows):
        sites = ", ".join(sorted(set(at.store.column("site").tolist())))
        raise DataError(f"No label belongs to an image of that site. The images are of {sites}.")
    return replace(found, targets=without_absent(found.targets)), lost_labels(at.store, table)


def _lesson(at: _Opened, found: Labelled, recipe: Recipe) -> Lesson:
    """Patients who share images count as one wherever patients are kept apart."""
    views = build_views(at.config)
    flip = all(changes.flip for changes in (views.changes, *views.modalities.values()))
    groups = at.store.column("group")[found.rows]
    return Lesson(at.method.encoder, at.store, found.rows, found.targets, groups, recipe, views.edge, flip)


def _facts(at: _Opened, found: Labelled, wish: judgement.Wish) -> dict[str, Any]:
    encoder = at.config["encoder"]
    return {
        "fedssl": __version__,
        "encoder": {name: value for name, value in encoder.items() if name != "weights"},
        "in_chans": encoder["in_chans"],
        "edge": image_edge(at.config),
        "data": {name: at.settings["data"][name] for name in _OF_IMAGES},
        "outputs": found.targets.names,
        "exclusive": found.targets.exclusive,
        "part": wish.recipe.part,
        "recipe": asdict(wish.recipe),
        "patients": len(np.unique(found.patients)),
        "images": len(found.rows),
        "patients_by_output": judgement.patients_by_output(found.targets, found.patients),
        "origin": at.origin,
        "synthetic": (at.source.root / "synthetic.json").exists(),
    }


def predict_images(
    model: Path,
    images: str,
    *,
    output: Path,
    site: str = "",
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Apply a site's model to images and write a CSV ``file, frame, <probability of each output>, decision``.

    The decision is the second class above its cutoff (of two), the likeliest (of more), or 1 and 0 for each finding.

    Args:
        model: the folder that ``fit_site_model`` wrote.
        images: folder, manifest or PACS; patients need not be known.
        output: the CSV; it names files by their paths below ``images``, is readable by its owner only and stays at the
            site.
        site: whose ``images`` are; changes nothing but the layout that is expected.
        data: settings of ``data`` that differ from the model's, such as ``burned_in``.
        overwrite: replace predictions that are there.
        threads: of the CPU; default: those that the model was made with.

    Returns:
        ``images``, ``files``, ``unreadable`` (files) and ``decisions``: counts by column.

    Raises:
        ConfigError: there is no model, its format is another, or ``output`` exists and must not be replaced.
        DataError: the model is damaged, or there is no usable image.
    """
    refuse_predictions(output, overwrite=overwrite)
    facts, tensors = read_model(model)
    judgement.use_threads(facts.get("threads") if threads is None else threads)
    if not facts.get("better_than_guessing"):
        progress.publish(progress.Note("This model was not found to be better than guessing.", alarm=True))
    classifier = classifier_of(facts, tensors, _encoder(facts["encoder"])).to(pick_device("auto"))
    kept = {name: facts["data"][name] for name in _OF_IMAGES if name in facts["data"]}
    settings = _settings(images, {**kept, "patient_from": "file"}, data, facts["in_chans"])
    source = image_store(settings, site=site, rescan=True)
    store = source.open(channels=facts["in_chans"], rescan=True)
    scores = score_images(classifier, facts, store)
    files = files_of(store, source.source, list(range(len(store))))
    decisions = decide(scores, facts["outputs"], facts["cutoffs"], exclusive=facts["exclusive"])
    write_predictions(output, (files, store.column("frame").tolist()), scores, facts["outputs"], decisions)
    return {
        "images": len(store),
        "files": len(set(files)),
        "unreadable": sum(source.summary()["unreadable"].values()),
        "decisions": {column: dict(sorted(Counter(words).items())) for column, words in decisions.items()},
    }


def _encoder(node: Mapping[str, Any]) -> nn.Module:
    """Build the encoder that the facts describe, and nothing else.

    Raises:
        ConfigError: they ask for something that is no encoder.
    """
    if not str(node.get("_target_", "")).startswith(_ENCODERS):
        raise ConfigError("model.json asks for something that is no encoder of fedssl. Do not use this model.")
    return instantiate_node(node)
