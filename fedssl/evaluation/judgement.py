"""What is asked of a site's model, and what is known of it: calibration, cutoffs, figures with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from fedssl import progress
from fedssl.errors import ConfigError
from fedssl.evaluation.calibration import as_written, cutoffs, fit_temperature, prior_of, probabilities, reliability
from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.out_of_fold import OutOfFold
from fedssl.evaluation.recipe import Recipe
from fedssl.evaluation.statistics import interval
from fedssl.evaluation.targets import Targets
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl

_LEAST = {"number_next": 0, "resamples": 10, "threads": 1}


@dataclass(frozen=True)
class Wish:
    """What a user asks for; ``threads`` None: as many as the run."""

    recipe: Recipe
    number_next: int = 20
    resamples: int = 2000
    overwrite: bool = False
    threads: int | None = None


def wish_of(changed: Mapping[str, Any]) -> Wish:
    """Sort out fields of ``Wish`` and of its recipe.

    Raises:
        ConfigError: a name is unknown or a value impossible.
    """
    own = {field.name for field in fields(Wish)} - {"recipe"}
    known = sorted(own | {field.name for field in fields(Recipe)})
    unknown = sorted(changed.keys() - set(known))
    if unknown:
        near = nearest(unknown, known)
        raise ConfigError(f"{', '.join(unknown)} is no setting of a site's model{near}. There are {', '.join(known)}.")
    given = {name: value for name, value in changed.items() if name in own and value is not None}
    wrong = [
        f"{name} must be a whole number of at least {least}"
        for name, least in _LEAST.items()
        if name in given and (type(given[name]) is not int or given[name] < least)
    ]
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}.")
    return Wish(Recipe(**{name: value for name, value in changed.items() if name not in own}), **given)


def nearest(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Ask whether a known name was meant; empty if none is alike."""
    near = [found for name in unknown for found in get_close_matches(name, known, n=1, cutoff=0.5)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def use_threads(threads: object) -> None:
    """Compute with so many threads of the CPU; None: as many as before.

    Raises:
        ConfigError: it is no number of threads.
    """
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ConfigError("training.threads must be a whole number of at least 1.")
    torch.set_num_threads(threads)


def signs_of_collapse(run: RunFolder, number: int) -> dict[str, list[str]]:
    """Say at which sites the round of a checkpoint showed signs of collapse, also aloud."""
    signs = [row.get("ssl/collapse") for row in read_jsonl(run.round_metrics) if row.get("round") == number]
    found: dict[str, list[str]] = (signs[-1] if signs else None) or {}
    if found:
        sites = "; ".join(f"{site}: {', '.join(texts)}" for site, texts in found.items())
        text = (
            f"The encoder shows signs of collapse in round {number} of its pretraining ({sites}). Try another encoder."
        )
        progress.publish(progress.Note(text, alarm=True))
    return found


def judge(
    found: OutOfFold,
    kept: Float[np.ndarray, "images outputs"],
    targets: Targets,
    patients: np.ndarray,
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Calibrate on out-of-fold logits and score them, as JSON can hold it.

    ``figures`` and ``reliability`` "before" are of plain probabilities, "after" of those calibrated without the fold
    that is scored; ``at_cutoff`` likewise. ``temperature``, ``prior`` and ``cutoffs`` use all folds and are for new
    images; none is so low that the model kept calls more than 5 % of the negative images that it learned from.
    ``better_than_guessing``: the interval of AUROC lies above one half.

    Args:
        found: by cross-validation.
        kept: logits of the model that is kept, which has learned from these images.
        targets: of the same images.
        patients: [images] whose they are: the unit of the bootstrap.
        resamples: bootstrap draws.
        seed: of these.
    """
    prior = prior_of(targets)
    temperature = fit_temperature(found.logits, targets, prior)
    each = [probabilities(x, temperature, exclusive=targets.exclusive, prior=prior) for x in (found.logits, kept)]
    limits = np.max([cutoffs(scores, targets) for scores in each], axis=0)
    names = [targets.names[output] for output in targets.scored]
    after, above = found.calibrated(targets)
    states = {"before": probabilities(found.logits, 1.0, exclusive=targets.exclusive), "after": after}
    draws = draw_patients(patients, number=resamples, seed=seed)
    figures = {
        name: {state: _estimate(metric(scores, targets, draws)) for state, scores in states.items()}
        for name, metric in METRICS.items()
    }
    return {
        "temperature": temperature,
        "prior": prior.tolist(),
        "cutoffs": dict(zip(names, as_written(limits).tolist(), strict=True)),
        "at_cutoff": {
            name: _at(above[:, place], targets.values[:, output])
            for place, (name, output) in enumerate(zip(names, targets.scored, strict=True))
        },
        "better_than_guessing": (figures["auroc"]["before"][1] or 0.0) > 0.5,
        "folds": int(found.folds.max()) + 1,
        "figures": figures,
        "reliability": {
            state: [asdict(found) for found in reliability(scores, targets)] for state, scores in states.items()
        },
    }


def patients_by_output(targets: Targets, patients: np.ndarray) -> dict[str, dict[str, float]]:
    """Count patients with, without and with or without each scored output, and its share of the images known."""
    counts = {}
    for output in targets.scored:
        truth = targets.values[:, output]
        each = {"with": truth == 1, "without": truth == 0, "with_or_without": ~np.isnan(truth)}
        counted = {name: len(np.unique(patients[mask])) for name, mask in each.items()}
        counts[targets.names[output]] = {**counted, "share": float(np.nanmean(truth))}
    return counts


def _estimate(values: Float[np.ndarray, " draws"]) -> list[float | None]:
    """Estimate and interval; None where they are not defined."""
    numbers = interval(values) if np.isfinite(values[1:]).any() else (float(values[0]), np.nan, np.nan)
    return [number if np.isfinite(number) else None for number in numbers]


def _at(above: Bool[np.ndarray, " images"], truth: Float[np.ndarray, " images"]) -> dict[str, float]:
    return {"sensitivity": float(above[truth == 1].mean()), "specificity": float(1.0 - above[truth == 0].mean())}
