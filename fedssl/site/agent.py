"""The hospital's side of the federation: holds the images, trains a round, keeps its own state on its own disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.augment import Views
from fedssl.checkpoint import load_checkpoint
from fedssl.cluster_sums import count_patients
from fedssl.data.batches import Batches
from fedssl.data.cache import Subset
from fedssl.data.modality import modality_groups
from fedssl.data.pseudonym import numbered
from fedssl.errors import DataError
from fedssl.local.base import Correction
from fedssl.marginals import column_log_sums, site_marginal
from fedssl.methods.base import PROTOTYPES, Method
from fedssl.optim import load_optimizer_tensors, optimizer_tensors
from fedssl.order import Order
from fedssl.site.memory import Remembered, SiteMemory
from fedssl.site.work import LocalWork
from fedssl.training import Round, Trained, autocast_for, sample_scores, train_round
from fedssl.update import Update, load_shared_state, shared_state

_SMALLEST_BATCH = 2
_ENDLESS = 10**9  # steps of a round that ends by the clock
_MARGINAL_IMAGES = 4096


class SiteAgent:
    """One site. Nothing but ``Update`` values, its image count and column sums leave it.

    Args:
        site: name of the site.
        images: its training images.
        memory: its state on its own disk between rounds.
        method: the method to train; its weights are replaced at each round.
        make_optimizer: makes a fresh optimiser for the method.
        views: makes augmented views.
        work: how to train a round.
        labels: [training images] their labels, empty where unknown; for methods that learn from labels.
        own_start: checkpoint of the site's own pretraining, with which it joins; None: it starts as the server says.
    """

    def __init__(  # noqa: PLR0913 - all that belongs to a hospital
        self,
        site: str,
        images: Subset,
        memory: SiteMemory,
        method: Method,
        make_optimizer: Callable[[Method], Optimizer],
        views: Views,
        work: LocalWork,
        labels: np.ndarray,
        *,
        own_start: Path | None = None,
    ) -> None:
        self.site = site
        self.images = images
        self.memory, self.method = memory, method
        self.make_optimizer = make_optimizer
        self.views = views
        self.work = work
        self.labels = labels
        self.own_start = own_start

    @property
    def examples(self) -> int:
        """The site's weight in averages: its training images, or its patients."""
        return len(np.unique(self.images.column("group"))) if self.work.by_patients else len(self.images)

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

    def check_start(self) -> None:
        """Refuse to take part with a start of its own that does not fit.

        Raises:
            DataError: it cannot be read, or belongs to another encoder or method.
        """
        if self.own_start is not None:
            self._own_state(shared_state(self.method))

    def train(
        self,
        order: Order,
        state: Mapping[str, Tensor],
        *,
        marginal: Float[Tensor, " prototypes"] | None = None,
        potentials: Float[Tensor, " prototypes"] | None = None,
    ) -> Update:
        """Train one round from the shared ``state`` and remember optimiser and own weights on disk.

        Args:
            order: which round of which run.
            state: the shared state.
            marginal: share of the site's samples that each prototype shall hold, as the server worked it out.
            potentials: or how the columns stand after federated Sinkhorn, from which the site makes its own marginal.

        Raises:
            DataError: too few images, or the site's own state of the last round is damaged.
            FederationError: the loss is not finite.
        """
        self.check()
        torch.set_num_threads(self.work.threads)
        method, rule = self.method, self.work.rule
        remembered = self._recall(order)
        independent = remembered is None and order.last == 0 and self.own_start is not None
        own, scale = (remembered.own or None, remembered.scale) if remembered else (None, None)
        begun, scale = rule.begin(self._own_state(state) if independent else state, own, scale)
        load_shared_state(method, begun)
        method.contrast, method.marginal = order.contrast, marginal
        if potentials is not None:
            method.marginal = site_marginal(self.memory.scores(order)[0], potentials, epsilon=method.epsilon)
        if independent:  # its prototypes have an order of their own
            method.marginal = None
        if method.marginal is not None:
            method.marginal = method.marginal.float().to(next(method.parameters()).device)
        optimizer = self.make_optimizer(method)
        if remembered:
            load_optimizer_tensors(optimizer, dict(remembered.optimizer))
        trained = self._train(order, optimizer, state)
        kept = shared_state(method)
        self.memory.remember(order, Remembered(optimizer_tensors(optimizer), kept if rule.remembers else {}, scale))
        lost = remembered is None and order.last > 0
        return self._release(kept, state, trained, restarted=lost, independent=independent)

    def _correction(self, received: Mapping[str, Tensor]) -> Correction:
        shared = [(name, value) for name, value in self.method.named_parameters() if name in received]
        start = [received[name].to(value.device) for name, value in shared]
        return Correction(self.work.rule, [value for _, value in shared], start)

    def _train(self, order: Order, optimizer: Optimizer, received: Mapping[str, Tensor]) -> Trained:
        work, method = self.work, self.method
        place = Round(self.site, order.number, order.rounds, work.seed, work.schedule)
        steps = work.steps if work.seconds is None else _ENDLESS
        batches = Batches(
            self.images, work.batch_size, work.epochs, place.derived_seed("order"), work.pairing, self.labels,
            method.classes, steps,
        )  # fmt: skip
        return train_round(
            method, optimizer, batches, self.views, place, seconds=work.seconds,
            autocast=autocast_for(next(method.parameters()).device, work.precision),
            correction=self._correction(received),
        )  # fmt: skip

    def _release(
        self,
        state: dict[str, Tensor],
        received: Mapping[str, Tensor],
        trained: Trained,
        *,
        restarted: bool,
        independent: bool,
    ) -> Update:
        """Choose what leaves: a prototype behind which too few patients stand goes back as it came, without counts."""
        mass, usage = trained.mass, trained.usage
        metrics = trained.metrics | {"optimizer_restarted": float(restarted)}
        if trained.support is not None and mass is not None and usage is not None:
            released = trained.support >= self.work.prototype_patients
            state[PROTOTYPES] = torch.where(released[:, None], state[PROTOTYPES], received[PROTOTYPES])
            mass, usage = mass * released, usage * released
            metrics["released_prototypes"] = float(released.sum())
        if self._rare_modality():
            metrics.pop("modality_nmi", None)
        return Update(self.site, state, self.examples, trained.steps, mass, usage, metrics, independent=independent)

    def _rare_modality(self) -> bool:
        """Tell whether so few patients have some modality that a figure about it would say that they are here."""
        groups = modality_groups(self.images.column("modality").tolist())
        patients = self.images.column("group")
        return any(len(np.unique(patients[groups == one])) < self.work.prototype_patients for one in np.unique(groups))

    def column_sums(
        self, order: Order, state: Mapping[str, Tensor], potentials: Float[Tensor, " prototypes"] | None
    ) -> Float[Tensor, " prototypes"]:
        """Answer one iteration of federated Sinkhorn: see ``fedssl.marginals.column_log_sums``.

        The column of a prototype behind which too few patients stand says what the least of the others says: less
        would tell of these patients, more would keep images from ever being moved there.

        Args:
            order: which round of which run.
            state: the shared state; with it the site scores its images, up to 4,096 of them, anew. Empty: as before.
            potentials: of the columns so far; None in the first iteration.

        Raises:
            DataError: too few images, or the scores of this round are lost.
        """
        self.check()
        torch.set_num_threads(self.work.threads)
        if state:
            load_shared_state(self.method, state)
            place = Round(self.site, order.number, order.rounds, self.work.seed, self.work.schedule)
            rows, scores = sample_scores(self.method, self.images, self.views.edge, place, most=_MARGINAL_IMAGES)
            patients = torch.from_numpy(numbered(self.images.column("group")[rows]))
            support = count_patients(scores.argmax(1), patients, scores.shape[1])
            self.memory.keep_scores(order, scores, support >= self.work.prototype_patients)
        scores, released = self.memory.scores(order)
        sums = column_log_sums(scores, potentials, epsilon=self.method.epsilon)
        return torch.where(released, sums, sums[released].min() if bool(released.any()) else 0.0)

    def _recall(self, order: Order) -> Remembered | None:
        """Take up the site's state of the last round that counted; None, with an alarm, if it is not there."""
        remembered = self.memory.recall(order)
        if remembered is None and order.last:
            text = f"Site {self.site} lost its optimiser state of round {order.last}; it takes a fresh one."
            progress.publish(progress.Note(text, alarm=True))
        return remembered

    def _own_state(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Read the shared state of the site's own pretraining.

        Raises:
            DataError: it does not fit this federation.
        """
        assert self.own_start is not None
        try:
            state = load_checkpoint(self.own_start).state
        except DataError as error:  # its text names the file
            raise DataError("has a start of its own (start) that cannot be read; give a checkpoint of a run") from error
        if {name: value.shape for name, value in state.items()} != {n: value.shape for n, value in received.items()}:
            raise DataError(
                "has a start of its own (start) that was trained with another encoder or method. Give a checkpoint of "
                "the same encoder, method and heads, or none"
            )
        return state
