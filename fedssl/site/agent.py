"""The hospital's side of the federation: holds the images, trains a round, keeps its own state on its own disk."""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.augment import Views
from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.data.batches import Batches
from fedssl.data.cache import Subset
from fedssl.errors import DataError
from fedssl.methods.base import Method
from fedssl.optim import Schedule, load_optimizer_tensors, optimizer_tensors
from fedssl.training import Round, autocast_for, train_round
from fedssl.update import Update, load_shared_state, shared_state

_FORGET_AFTER_S = 14 * 24 * 3600.0
_RUN_NAME = re.compile(r"[0-9a-f]{8,64}")
_SMALLEST_BATCH = 2


@dataclass(frozen=True)
class LocalWork:
    """How a site trains one round.

    Attributes:
        batch_size: images in a batch.
        epochs: passes over the site's images in a round; may be a fraction.
        seed: of the run.
        schedule: of the learning rate over the federation.
        pairing: where the two views of a row come from: ``image``, ``patient`` or ``series``.
        precision: ``auto``, ``bf16`` or ``float32``.
        threads: CPU threads; results on a CPU are equal bit for bit only at equal threads.
    """

    batch_size: int
    epochs: float
    seed: int
    schedule: Schedule
    pairing: str
    precision: str
    threads: int


class SiteAgent:
    """One site. Nothing but ``Update`` values leaves it.

    Args:
        site: name of the site.
        images: its training images.
        state_folder: where the site keeps its optimiser state between rounds.
        method: the method to train; its weights are replaced at each round.
        make_optimizer: makes a fresh optimiser for the method.
        views: makes augmented views.
        work: how to train a round.
        labels: [training images] their labels, empty where unknown; for methods that learn from labels.
    """

    def __init__(
        self,
        site: str,
        images: Subset,
        state_folder: Path,
        method: Method,
        make_optimizer: Callable[[Method], Optimizer],
        views: Views,
        work: LocalWork,
        labels: np.ndarray,
    ) -> None:
        self.site = site
        self.images = images
        self.state_folder = state_folder
        self.method = method
        self.make_optimizer = make_optimizer
        self.views = views
        self.work = work
        self.labels = labels

    def check(self) -> None:
        """Refuse to take part without enough images.

        Raises:
            DataError: says what the site lacks.
        """
        count = len(self.images)
        if count < _SMALLEST_BATCH:
            raise DataError(
                f"has {count} training images; contrastive learning needs at least two. Check data.root and the split"
            )
        patients = len(np.unique(self.images.column("group")))
        if self.work.pairing == "patient" and patients < _SMALLEST_BATCH:
            raise DataError("has images of one patient; pairing=patient needs at least two. Use pairing=image")
        if self.method.num_prototypes > count:
            raise DataError(
                f"has {count} training images, fewer than the {self.method.num_prototypes} prototypes. "
                f"Lower heads.num_prototypes to {max(2, count // 4)} or less"
            )

    def train(
        self, run: str, number: int, rounds: int, state: Mapping[str, Tensor], *, contrast: float = 1.0
    ) -> Update:
        """Train round ``number`` of ``rounds`` from the shared ``state`` and remember the optimiser on disk.

        Args:
            run: random name of the run.
            number: of the round, from 1.
            rounds: of the federation.
            state: the shared state.
            contrast: factor of the method's contrastive term, 1 unless the server acts against collapse.

        Raises:
            DataError: too few images, or the site's own state of the last round is damaged.
            FederationError: the loss is not finite.
        """
        self.check()
        torch.set_num_threads(self.work.threads)
        load_shared_state(self.method, state)
        self.method.contrast = contrast
        optimizer = self.make_optimizer(self.method)
        restarted = not self._recall(run, number - 1, optimizer)
        place = Round(self.site, number, rounds, self.work.seed, self.work.schedule)
        batches = Batches(
            self.images, self.work.batch_size, self.work.epochs, place.derived_seed("order"), self.work.pairing,
            self.labels, self.method.classes,
        )  # fmt: skip
        device = next(self.method.parameters()).device
        autocast = autocast_for(device, self.work.precision)
        trained = train_round(self.method, optimizer, batches, self.views, place, autocast=autocast)
        self._remember(run, number, optimizer)
        metrics = trained.metrics | {"optimizer_restarted": float(restarted)}
        return Update(self.site, shared_state(self.method), len(self.images), trained.mass, trained.usage, metrics)

    def _recall(self, run: str, number: int, optimizer: Optimizer) -> bool:
        """Load the optimiser as it was after round ``number``; False, with an alarm, if it is not there."""
        path = self._state_file(run, number)
        if number == 0:
            return True
        if not path.exists():
            text = f"Site {self.site} lost its optimiser state of round {number}; it takes a fresh one."
            progress.publish(progress.Note(text, alarm=True))
            return False
        load_optimizer_tensors(optimizer, load_tensors(path)[0])
        return True

    def _state_file(self, run: str, number: int) -> Path:
        if not _RUN_NAME.fullmatch(run):  # it becomes a folder name: never trust what came by wire
            raise DataError("was sent a run name that is no hexadecimal number; the server is not a fedssl server")
        return self.state_folder / run / self.site / f"round_{number:05d}.safetensors"

    def _remember(self, run: str, number: int, optimizer: Optimizer) -> None:
        """Keep this round's optimiser and the one before, which a resumed server may ask for again."""
        save_tensors(self._state_file(run, number), optimizer_tensors(optimizer), {"round": number}, "the site's state")
        self._state_file(run, number - 2).unlink(missing_ok=True)
        for other in self.state_folder.iterdir():
            newest = max((path.stat().st_mtime for path in other.rglob("*")), default=0.0)
            if other.name != run and time.time() - newest > _FORGET_AFTER_S:
                shutil.rmtree(other, ignore_errors=True)
