"""Audit a run: what its weights give away of the patients who trained them, see docs/audit.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fedssl import __version__
from fedssl.build import build_method, build_views
from fedssl.build_images import canary_patients, chosen_sites, open_images, simulated_sites, training_digest
from fedssl.checkpoint import Checkpoint
from fedssl.config import Config
from fedssl.data.cache import ImageStore, Subset
from fedssl.data.canaries import CanarySubset
from fedssl.data.labels import join_labels, label_table
from fedssl.data.pseudonym import numbered
from fedssl.errors import DataError
from fedssl.evaluation.judgement import use_threads
from fedssl.evaluation.leakage.attributes import attribute_rows
from fedssl.evaluation.leakage.likelihood_ratio import Shadows, ratio_rows
from fedssl.evaluation.leakage.membership import attack_figures, by_patient, difference
from fedssl.evaluation.leakage.points import VIEWS, features_of, prototype_cosines, view_agreement
from fedssl.evaluation.leakage.prototypes import nearest_images
from fedssl.evaluation.leakage.sentences import LIMITS, TRAINED, UNTRAINED, spoken
from fedssl.leakage_cohort import Cohort, cohort_of, refuse_images_elsewhere, sampled
from fedssl.methods.base import Method
from fedssl.release.card import AUDIT, write_card
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl, write_json
from fedssl.update import load_shared_state
from fedssl.weights import identity, resolve_run, trained_checkpoint

MOST_VALUES = 20  # of an attribute
Agreements = Mapping[str, Float[np.ndarray, " images"]]


@dataclass(frozen=True)
class Audited:
    """A run that is audited, and its images."""

    folder: RunFolder
    config: Config
    checkpoint: Checkpoint
    store: ImageStore
    cohort: Cohort


@dataclass(frozen=True)
class _Measured:
    """What one encoder makes of the cohort: agreement of views, features, cosines to prototypes if it has any."""

    agreement: Agreements
    features: Float[np.ndarray, "images width"]
    cosines: Float[np.ndarray, "images prototypes"] | None


def audit_run(
    path: Path, shadows: Sequence[Path] = (), *, labels: Path | None = None, attribute: str | None = None
) -> dict[str, Any]:
    """Attack a run's weights and write ``audit.json`` and ``MODEL_CARD.md`` into its folder: figures only.

    Args:
        path: a run folder or a checkpoint in one.
        shadows: run folders of shadow trainings of this run, see ``simulations.shadows``.
        labels: table with the column ``attribute``; default: the run's ``evaluation.labels``, else the index's labels.
        attribute: a further column that a probe shall predict, such as sex.

    Raises:
        ConfigError: there is no run, its encoder never trained, or its images are elsewhere.
        DataError: nobody was held out, or the attribute does not fit.
    """
    run = open_audited(path)
    columns = {name: run.store.column(name)[run.cohort.images.rows] for name in ("site", "scanner")}
    if attribute:
        columns[attribute] = _attribute(run, labels, attribute)
    method = build_method(run.config)
    plain = _measured(method, run)
    load_shared_state(method, run.checkpoint.state)
    trained = _measured(method, run)
    resamples = run.config["evaluation"]["bootstrap"]
    results: dict[str, Any] = {
        "fedssl": __version__,
        "checkpoint": identity(run.checkpoint, method),
        "synthetic": (Path(run.config["data"]["root"]) / "synthetic.json").exists(),
        "data": _counts(run.cohort),
        "membership": _membership(run.cohort, trained.agreement, plain.agreement, resamples),
        "shadows": _shadowed(run, method, shadows, resamples) if shadows else None,
        "prototypes": _prototypes(run.cohort, trained.cosines, resamples),
        "attributes": attribute_rows(
            columns, run.cohort.patients, run.cohort.member,
            {TRAINED: trained.features, UNTRAINED: plain.features}, resamples=resamples,
        ),
    }  # fmt: skip
    results |= {"sentences": spoken(results), "limits": list(LIMITS)}
    write_json(run.folder.path / AUDIT, results, "the audit")
    write_card(run.folder, results["checkpoint"])
    return results


def open_audited(path: Path) -> Audited:
    """Find run, checkpoint, images and patients, or say what is missing.

    Raises:
        ConfigError: see ``audit_run``.
        DataError: likewise.
    """
    folder, checkpoint_path = resolve_run(path)
    config = folder.config()
    checkpoint = trained_checkpoint(checkpoint_path)
    use_threads(config["training"]["threads"])
    refuse_images_elsewhere(config)
    store = open_images(config)
    folder.bind_images(training_digest(config, store))
    took_part = {row["site"] for row in read_jsonl(folder.metrics) if row["round"] <= checkpoint.round}
    cohort = cohort_of(config, store, sorted(took_part | {*checkpoint.sites}))
    return Audited(folder, config, checkpoint, store, cohort)


def _counts(cohort: Cohort) -> dict[str, int]:
    trained = cohort.trained
    return {"members": int(trained.sum()), "held_out": int((~trained).sum()), "images": len(cohort.images),
            "views": VIEWS}  # fmt: skip


def _attribute(run: Audited, labels: Path | None, attribute: str) -> np.ndarray:
    """Values of the attribute of the cohort's images as text, empty where unknown."""
    table = labels or (Path(run.config["evaluation"]["labels"]) if run.config["evaluation"]["labels"] else None)
    rows, entries = join_labels(run.store, label_table(run.store, table, [attribute]), [attribute])
    values = np.full(len(run.store), "", object)
    values[rows] = entries[attribute].astype(str)
    own = values[run.cohort.images.rows].astype(np.str_)
    number = len(np.unique(own[own != ""]))
    if number > MOST_VALUES:
        raise DataError(
            f"The column {attribute} has {number} different values, and a probe tells up to {MOST_VALUES} apart. Give "
            "a column of groups, such as sex or decade of age."
        )
    return own


def _measured(method: Method, run: Audited) -> _Measured:
    views, images = build_views(run.config), run.cohort.images
    features = features_of(method, images, edge=views.edge)
    cosines = prototype_cosines(method, features) if method.num_prototypes else None
    return _Measured(view_agreement(method, images, views, seed=run.config["seed"]), features, cosines)


def _membership(cohort: Cohort, trained: Agreements, plain: Agreements, resamples: int) -> list[dict[str, Any]]:
    """Attack with the agreement of views alone; the untrained encoder tells the patients apart by nothing but luck."""
    member, numbers = cohort.trained, np.unique(cohort.patients)
    rows: list[dict[str, Any]] = []
    for score in trained:
        own, other = (by_patient(values[score], cohort.patients) for values in (trained, plain))
        for encoder, values in ((TRAINED, own), (UNTRAINED, other)):
            figures = attack_figures(values, member, numbers, resamples=resamples)
            rows.append({"score": score, "encoder": encoder, **figures})
        rows[-2]["beyond_untrained"] = difference(own, other, member, resamples=resamples)
    return rows


def _prototypes(
    cohort: Cohort, cosines: Float[np.ndarray, "images prototypes"] | None, resamples: int
) -> dict[str, Any] | None:
    if cosines is None:
        return None
    return nearest_images(cosines, cohort.member, cohort.patients, resamples=resamples)


def _shadowed(run: Audited, method: Method, folders: Sequence[Path], resamples: int) -> dict[str, Any]:
    """Attack with shadow encoders, and these encoders with each other by canaries; ``method`` is the trained one."""
    configs = [RunFolder(folder).config() for folder in folders]
    numbers = numbered(run.store.column("group"))
    planted = canary_patients(configs[0], run.store)
    of_sites = np.isin(run.store.column("site"), chosen_sites(run.config, run.store))
    rows = run.cohort.images.rows
    if len(planted):
        rows = np.union1d(rows, sampled(np.flatnonzero(of_sites & np.isin(numbers, planted)), numbers))
    images, patients = Subset(run.store, rows), numbers[rows]
    seen = CanarySubset.of(images, patients, planted, run.config["seed"])
    views, seed = build_views(run.config), run.config["seed"]
    target = view_agreement(method, images, views, seed=seed)
    scores = []
    for folder in folders:
        load_shared_state(method, trained_checkpoint(RunFolder(folder).last).state)
        scores.append(view_agreement(method, seen, views, seed=seed))
    load_shared_state(method, run.checkpoint.state)
    names = np.unique(patients)
    inside = np.stack([np.isin(names, numbers[_rows_of(config, run.store)]) for config in configs])
    member = np.isin(names, run.cohort.patients[run.cohort.member])
    compared = Shadows(names, member, inside, np.isin(names, planted))
    found = []
    for score in target:
        own = by_patient(target[score], patients)
        others = np.stack([by_patient(values[score], patients) for values in scores])
        found += [{"score": score, **row} for row in ratio_rows(own, others, compared, resamples=resamples)]
    return {"number": len(folders), "canaries": len(planted), "attacks": found}


def _rows_of(config: Config, store: ImageStore) -> np.ndarray:
    return np.concatenate([images.rows for images in simulated_sites(config, store).values()])
