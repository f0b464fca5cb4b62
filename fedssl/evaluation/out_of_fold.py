"""Cross-validation by patient: every labelled image is scored by a model that never saw its patient."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from fedssl import progress
from fedssl.data.cache import ImageStore
from fedssl.errors import DataError
from fedssl.evaluation.calibration import cutoffs, fit_temperature, prior_of, probabilities
from fedssl.evaluation.finetune import Classifier, Recipe, finetune, logits
from fedssl.evaluation.targets import Targets

FOLDS = 5
_FEW = 5  # labelled patients: fewer are more often a layout misread than a site's work
_ATTEMPTS = 20


@dataclass(frozen=True)
class Lesson:
    """What is fine-tuned, on which images, and how; see ``fedssl.evaluation.finetune.finetune``."""

    encoder: nn.Module
    store: ImageStore
    rows: Int[np.ndarray, " labelled"]
    targets: Targets
    patients: np.ndarray
    recipe: Recipe
    edge: int
    flip: bool = True

    def take(self, chosen: np.ndarray) -> "Lesson":
        """Choose labelled images by position or mask."""
        return replace(self, rows=self.rows[chosen], targets=self.targets.take(chosen), patients=self.patients[chosen])

    def learn(self, seed: int) -> Classifier:
        """Train on all of them."""
        trained = finetune(
            self.encoder, self.store, self.rows, self.targets, self.patients, self.recipe,
            edge=self.edge, seed=seed, flip=self.flip,
        )  # fmt: skip
        return trained.model


@dataclass(frozen=True)
class OutOfFold:
    """Logits of every labelled image, and the fold in which its patient was left out."""

    logits: Float[np.ndarray, "labelled outputs"]
    folds: Int[np.ndarray, " labelled"]

    def calibrated(
        self, targets: Targets
    ) -> tuple[Float[np.ndarray, "labelled outputs"], Bool[np.ndarray, "labelled scored"]]:
        """Calibrate and decide each fold by what the others say, so that no figure flatters.

        Returns:
            Probabilities, and which of them lie above the cutoff of their output.
        """
        scores = np.empty(self.logits.shape, np.float64)
        above = np.empty((len(scores), len(targets.scored)), bool)
        for fold in np.unique(self.folds):
            here = self.folds == fold
            others, prior = targets.take(~here), prior_of(targets.take(~here))
            temperature = fit_temperature(self.logits[~here], others, prior)
            each = probabilities(self.logits, temperature, exclusive=targets.exclusive, prior=prior)
            scores[here] = each[here]
            above[here] = each[here][:, targets.scored] > cutoffs(each[~here], others)
        return scores, above


def cross_validate(lesson: Lesson, *, seed: int = 0) -> OutOfFold:
    """Fine-tune once for every fold and score the patients left out.

    Raises:
        DataError: too few patients, see ``patient_folds``.
    """
    folds = patient_folds(lesson.targets, lesson.patients, seed=seed)
    scores = np.zeros(lesson.targets.values.shape, np.float32)
    count = int(folds.max()) + 1
    for fold in range(count):
        here = folds == fold
        model = lesson.take(~here).learn(seed)
        scores[here] = logits(model, lesson.store, lesson.rows[here], edge=lesson.edge)
        progress.publish(progress.Done("cross-validating", fold + 1, count))
    return OutOfFold(scores, folds)


def warn_of_few(patients: np.ndarray, *, of_one_site: bool) -> None:
    """Say aloud that hardly anybody is labelled, and which layout is expected: sites may have been taken for patients.

    Args:
        patients: [images] whose the labelled ones are.
        of_one_site: the images' root is said to be one site's.
    """
    number = len(np.unique(patients))
    if number < _FEW:
        layout = "<patient>/... (because a site was named)" if of_one_site else "<site>/<patient>/..."
        text = (
            f"Labelled patients: only {number}. If there are more, check the layout: below the images' root fedssl "
            f"expects {layout}, unless a manifest or the files themselves say whose they are. Otherwise label more."
        )
        progress.publish(progress.Note(text, alarm=True))


def without_absent(targets: Targets) -> Targets:
    """Drop classes that no image shows, such as those of other sites; findings stay."""
    if not targets.exclusive:
        return targets
    shown = targets.values.any(0)
    return Targets(targets.values[:, shown], [targets.names[place] for place in np.flatnonzero(shown)], exclusive=True)


def patient_folds(
    targets: Targets, patients: np.ndarray, *, most: int = FOLDS, seed: int = 0
) -> Int[np.ndarray, " images"]:
    """Deal whole patients out to folds, each class evenly, so that what is left without a fold shows every class.

    Args:
        targets: of the images.
        patients: [images] whose they are.
        most: folds; fewer where a class has fewer patients.
        seed: of the order of patients.

    Raises:
        DataError: a class, or one side of a finding, is seen in fewer than two patients.
    """
    names, owner = np.unique(patients, return_inverse=True)
    shows = _shows(targets, owner, len(names))
    rarest = int(shows.sum(0).min())
    single = shows.shape[1] < 2
    for count in range(0 if single else min(most, rarest), 1, -1):
        for attempt in range(_ATTEMPTS):
            fold = _dealt(shows, count, np.random.default_rng([seed, count, attempt]))
            if all(shows[fold != number].any(0).all() for number in range(count)):
                return fold[owner]
    what = "two classes, each" if targets.exclusive else "each finding, present and absent,"
    counts = ", ".join(str(number) for number in sorted(shows.sum(0).tolist()))
    raise DataError(
        f"Cross-validation needs {what} in labelled images of at least 2 patients (10 or more are better), so that a "
        f"patient can be left out. The {len(names)} labelled patients show them {counts} times. Label more patients."
    )


def _shows(targets: Targets, owner: Int[np.ndarray, " images"], patients: int) -> Bool[np.ndarray, "patients kinds"]:
    """Tell which patient shows which class, or which finding as present and which as absent."""
    kinds = targets.values == 1 if targets.exclusive else np.concatenate([targets.values == 1, targets.values == 0], 1)
    shows = np.zeros((patients, kinds.shape[1]), bool)
    np.logical_or.at(shows, owner, kinds)
    return shows


def _dealt(shows: Bool[np.ndarray, "patients kinds"], count: int, rng: np.random.Generator) -> np.ndarray:
    """Deal patients of the rarest kind first; each goes where its kind is rarest, then where patients are fewest."""
    fold = np.full(len(shows), -1)
    for kind in np.argsort(shows.sum(0), kind="stable"):
        for patient in rng.permutation(np.flatnonzero(shows[:, kind] & (fold < 0))):
            alike = np.bincount(fold[shows[:, kind] & (fold >= 0)], minlength=count)
            full = np.bincount(fold[fold >= 0], minlength=count)
            fold[patient] = np.lexsort([full, alike])[0]
    return fold
