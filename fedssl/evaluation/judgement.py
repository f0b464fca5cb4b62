"""What cross-validation says of a site's model: calibration, cutoffs, figures with intervals."""

from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from fedssl.evaluation.calibration import as_written, cutoffs, fit_temperature, prior_of, probabilities, reliability
from fedssl.evaluation.metrics import METRICS, draw_patients
from fedssl.evaluation.out_of_fold import OutOfFold
from fedssl.evaluation.statistics import interval
from fedssl.evaluation.targets import Targets


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
