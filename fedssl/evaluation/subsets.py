"""Who labels how much: nested shares of the training patients, and splits within a task."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from fedssl.evaluation.targets import Targets
from fedssl.evaluation.task import IN_DOMAIN, UNSEEN, Task, require_both, usable


def nested_label_subsets(
    task: Task, fractions: Sequence[float], *, seeds: int
) -> dict[tuple[float, int], Int[np.ndarray, " labelled"]]:
    """Choose the labelled training images for each fraction and seed, whole patients at a time.

    For one seed the subsets are nested. The order of patients is random, except that the first ones together show every
    class: a hospital that labels only a few patients would make sure of that, and a probe needs it. All encoders share
    the subsets.

    Returns:
        Positions in the task's images by (fraction, seed).
    """
    names = np.unique(task.patients[task.train])
    subsets = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(names)
        first = _first_with_all_classes(task, order)
        ordered = np.concatenate([first, order[~np.isin(order, first)]])
        for fraction in fractions:
            count = max(len(first), int(np.ceil(fraction * len(names) - 1e-9)))
            chosen = task.train & np.isin(task.patients, ordered[:count])
            subsets[fraction, seed] = np.flatnonzero(chosen)
    return subsets


def distinct_fractions(task: Task, fractions: Sequence[float], *, seeds: int) -> list[float]:
    """Drop each fraction that gives every seed the same patients as the next larger one; rising.

    A small fraction is raised to the fewest patients that show every class, so that several may come out equal. Of
    these the largest stays: 1.0 always does.
    """
    rising = sorted(set(fractions))
    nested = {key: len(rows) for key, rows in nested_label_subsets(task, rising, seeds=seeds).items()}
    kept = [x for x, y in pairwise(rising) if any(nested[x, seed] < nested[y, seed] for seed in range(seeds))]
    return kept + rising[-1:]


def _first_with_all_classes(task: Task, order: np.ndarray) -> np.ndarray:
    """Walk through the patients and keep those that add a class, or a value of a finding, not seen yet."""
    seen: set[tuple[int, float]] = set()
    first: list[np.ndarray] = []
    wanted = _shown(task.targets.take(task.train))
    for patient in order:
        if seen == wanted:
            break
        shown = _shown(task.targets.take(task.train & (task.patients == patient)))
        if shown - seen:
            first.append(patient)
            seen |= shown
    return np.array(first)


def _shown(targets: Targets) -> set[tuple[int, float]]:
    """Which outputs are seen to be 1, and for findings also which to be 0."""
    values = (1.0,) if targets.exclusive else (0.0, 1.0)
    return {
        (output, value)
        for output in range(len(targets.names))
        for value in values
        if (targets.values[:, output] == value).any()
    }


def held_back(task: Task, fraction: float, *, of: str = UNSEEN) -> Task | None:
    """Divide the test patients of one domain into those who train and those who test, in turns by their number.

    For fine-tuning out of domain (REMEDIS): the labels come from the unseen sites themselves. The first of up to 20
    shuffles counts whose two sides can both be used.

    Args:
        task: with the domain.
        fraction: of the domain's patients who test.
        of: the domain.

    Returns:
        A task that trains and tests within the domain; None where it is too small to show both classes on both sides.
    """
    here = task.tests.get(of)
    if here is None:
        return None
    names, rng = np.unique(task.patients[here]), np.random.default_rng(0)
    for _ in range(20):
        tested = np.isin(task.patients, rng.permutation(names)[: max(1, round(fraction * len(names)))])
        parts = (task.targets.take(here & ~tested), task.targets.take(here & tested))
        if all(len(part) and usable(part) for part in parts):
            return replace(task, train=here & ~tested, tests={of: here & tested})
    return None


def rehearsal(task: Task, fraction: float) -> Task:
    """Let some training patients play the test patients' part, to choose settings without looking at the test.

    Args:
        task: whose test patients are left out altogether.
        fraction: of the training patients who play them.

    Raises:
        DataError: too few patients.
    """
    names = np.random.default_rng(1).permutation(np.unique(task.patients[task.train]))
    tested = np.isin(task.patients, names[: max(1, round(fraction * len(names)))])
    divided = replace(task, train=task.train & ~tested, tests={IN_DOMAIN: task.train & tested})
    require_both(divided)
    return divided
