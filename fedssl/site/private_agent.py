"""A site that trains privately: the gate before a round, the ledger around it, and what it does not say."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedssl import progress
from fedssl.errors import ConfigError, DataError, FederationError, PrivacyError
from fedssl.methods.separable import SeparableMethod
from fedssl.order import Order
from fedssl.privacy.cohort import Cohort
from fedssl.privacy.engines.base import Engine
from fedssl.privacy.engines.choice import choose_engine
from fedssl.privacy.mechanism import Mechanism
from fedssl.privacy.training import train_private_round
from fedssl.site.agent import SiteAgent
from fedssl.site.ledger import Ledger
from fedssl.storage import atomic_file
from fedssl.training import Round, Trained, autocast_for
from fedssl.update import Update, shared_state, state_digest

LARGEST_DELTA = 0.1  # times the patients: a delta of 1 / N lets one patient be published whole


@dataclass(frozen=True)
class Terms:
    """On which terms a site trains privately.

    Attributes:
        mechanism: the noise of a step, the rate, the steps of a round.
        ledger: counts what was spent, over all runs.
        bound: file beside the index that remembers which ledger counts these patients; None in a simulation.
        run_cap: epsilon of this run that may not be passed.
        cap: epsilon of all runs together that may not be passed: the hospital's own.
        patients: public number of patients that the run takes the site to have, its weight in averages.
        declared: public number of patients that the hospital says it has.
        most_images: a patient with more is no single person and does not train.
        engine: how clipped gradients are computed.
        rounds: of the run.
        simulated: nobody's patients: reasons may name numbers.
    """

    mechanism: Mechanism
    ledger: Ledger
    bound: Path | None
    run_cap: float
    cap: float
    patients: int
    declared: int
    most_images: int
    engine: str
    rounds: int
    simulated: bool


class PrivateSiteAgent(SiteAgent):
    """One site, from which nothing leaves but noised sums, what follows from them, and public constants.

    Args:
        arguments: as of ``SiteAgent``.
        terms: on which it trains.
        settings: as of ``SiteAgent``.
    """

    def __init__(self, *arguments: Any, terms: Terms, **settings: Any) -> None:  # noqa: ANN401 - handed on
        super().__init__(*arguments, **settings)
        if not isinstance(self.method, SeparableMethod):
            raise ConfigError(f"cannot train this method privately: {self.method.couples}")
        self.private_method: SeparableMethod = self.method
        self.terms = terms
        self._told: set[str] = set()

    @property
    def examples(self) -> int:
        """The nominal number of patients: the true one is private."""
        return self.terms.patients

    @cached_property
    def cohort(self) -> Cohort:
        """The site's patients, but for those with more images than one person has: each by a rule of its own."""
        cohort, left_out = Cohort.of(self.images).without_crowds(self.terms.most_images)
        if left_out:
            self._tell(
                f"{left_out} of its patients have more than privacy.most_images={self.terms.most_images} images and "
                "do not train. Are they placeholders such as ANONYMOUS, or many patients who share an image? "
                "Mend the index (data.patient_from)"
            )
        return cohort

    @cached_property
    def engine(self) -> Engine:
        """What computes clipped gradients fastest here."""
        device = next(self.method.parameters()).device
        return choose_engine(
            self.terms.engine, self.private_method, self.views, autocast_for(device, self.work.precision),
            images=self.terms.mechanism.images, in_chans=self.images.store.channels,
        )  # fmt: skip

    def check(self) -> None:
        """Refuse to take part where nothing could be learnt; by public numbers, so that the answer tells of no patient.

        What the site's true patients say against it is said at the site alone, and it takes part with noise. Where they
        are simulated it is refused.

        Raises:
            DataError: the declared patients are too few.
        """
        terms, there = self.terms, len(self.cohort.members)
        for patients, whose in ((terms.declared, "declares"), (there, "has")):
            reasons = list(self._against(patients, whose))
            if reasons and (whose == "declares" or terms.simulated):
                raise DataError("; ".join(reasons))
            for reason in reasons:
                self._tell(f"{reason}. It takes part all the same, or its answer would tell how many patients it has")

    def _against(self, patients: int, whose: str) -> Iterator[str]:
        mechanism, delta = self.terms.mechanism, self.terms.ledger.delta
        if patients < mechanism.batch:
            yield (
                f"{whose} {patients} training patients, fewer than the {mechanism.batch:g} that a step expects "
                "(privacy.batch). Lower it, or do without privacy for this site (privacy.sites)"
            )
        if delta * patients > LARGEST_DELTA:
            yield (
                f"{whose} {patients} training patients, for whom privacy.delta={delta:g} is too large. Use "
                f"{LARGEST_DELTA / patients:.1g}"
            )

    def check_start(self) -> None:
        """Accept: a private site never starts from weights of its own, which would carry no noise."""

    def _tell(self, text: str) -> None:
        """Say something once, to the hospital alone."""
        if text in self._told:
            return
        self._told.add(text)
        progress.publish(progress.Note(f"Site {self.site} (this stays here): it {text}.", alarm=True))

    def train(
        self,
        order: Order,
        state: Mapping[str, Tensor],
        *,
        marginal: Tensor | None = None,
        potentials: Tensor | None = None,
    ) -> Update:
        """Train one round within the budget; a round that was done already is answered with the same bits again.

        Args:
            order: which round of which run.
            state: the shared state.
            marginal: none is taken: it would be made of unnoised sums.
            potentials: likewise.

        Raises:
            PrivacyError: the budget is spent or the ledger cannot be trusted; nothing was computed.
        """
        if marginal is not None or potentials is not None:
            raise ConfigError("was sent marginals of prototypes, which private training does not take")
        self._check_order(order, state)
        ledger, mechanism = self.terms.ledger, self.terms.mechanism
        ledger.check_known(order.ledger)
        received = state_digest(state)
        known = self.memory.recall_answer(order, received)
        if known is not None:
            return self._let_go(order, known)
        self.check()
        self.engine.see([])  # made, or refused, before it costs anything
        self._check_bound()
        reservation = ledger.reserve(
            order.run, order.number, mechanism.spend, cap=self.terms.cap, run_cap=self.terms.run_cap
        )
        self._bind()
        limit = min(self.terms.cap, self.terms.run_cap)
        text = f"Site {self.site}, round {order.number}: epsilon {reservation.epsilon:.3f} reserved (limit {limit:g})."
        progress.publish(progress.Note(text))
        update = super().train(order, state)
        self.memory.keep_answer(order, received, update)
        return self._let_go(order, update)

    def _check_order(self, order: Order, state: Mapping[str, Tensor]) -> None:
        """Refuse what cannot be trained before it costs anything.

        Raises:
            FederationError: says what does not fit.
        """
        expected = shared_state(self.method)
        if not 1 <= order.number <= order.rounds == self.terms.rounds:
            raise FederationError(
                f"was asked for round {order.number} of {order.rounds}; the run has {self.terms.rounds}"
            )
        if {name: value.shape for name, value in state.items()} != {
            name: value.shape for name, value in expected.items()
        }:
            raise FederationError("was sent weights of another encoder or method; nothing was trained")
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise FederationError("was sent weights that are not finite; nothing was trained")

    def _check_bound(self) -> None:
        """Refuse to count the same patients in a second ledger, such as after a new name of the site.

        Raises:
            PrivacyError: they are counted in another one.
        """
        bound, name = self.terms.bound, self.terms.ledger.name
        if bound is not None and bound.exists() and bound.read_text() != name:
            raise PrivacyError(
                "has another privacy ledger than the one that counts these patients, or none any more. Give the site "
                "its old name, or the folder of that ledger (node-config ledger)"
            )

    def _bind(self) -> None:
        if self.terms.bound is not None and not self.terms.bound.exists():
            with atomic_file(self.terms.bound, "the name of the privacy ledger") as stream:
                stream.write(self.terms.ledger.name.encode())

    def _let_go(self, order: Order, update: Update) -> Update:
        """Write into the ledger what leaves, before it does."""
        ledger = self.terms.ledger
        ledger.release((order.run, order.number), state_digest(update.state))
        figures = {"epsilon": ledger.epsilon(), "delta": ledger.delta}
        return replace(update, metrics={**update.metrics, **figures}, ledger=ledger.head)

    def _train(self, order: Order, optimizer: Optimizer, received: Mapping[str, Tensor]) -> Trained:
        place = Round(self.site, order.number, order.rounds, self.work.seed, self.work.schedule)
        return train_private_round(
            self.engine, optimizer, self.cohort, self.views, place, self.terms.mechanism,
            pairing=self.work.pairing, correction=self._correction(received),
        )  # fmt: skip

    def column_sums(
        self,
        order: Order,  # noqa: ARG002
        state: Mapping[str, Tensor],  # noqa: ARG002
        potentials: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Refuse: sums over the site's images carry no noise.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError("trains privately and gives no column sums. Use federation.equipartition=local")
