"""The rounds: send the state, fold each good answer into a running sum, name every site that failed.

Flower's own strategies hold every answer, wait for ever for missing nodes and die of one malformed reply; hence a loop
of our own on the Grid. Answers are folded in the order of the sites' names, so that the result does not depend on who
is first; those that wait stay at the SuperLink, and the server's memory does not grow with the sites.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedssl import progress, wire
from fedssl.aggregation.base import Aggregator
from fedssl.clustering import cluster_information
from fedssl.errors import FederationError, UpdateRefused
from fedssl.marginals import FEDERATED_SINKHORN, SITE_MARGINALS
from fedssl.methods.base import PROTOTYPES
from fedssl.order import Order
from fedssl.packing import FULL, pack, size_in_bytes, unpack
from fedssl.update import Limits, Update, change_of, check_update, cosine_to
from server.combine import Combination
from server.equalise import Guides, federated_sinkhorn, site_marginals
from server.exchange import Plan, ask, failure, require
from server.roster import Member, Roster

_ALWAYS = 0.1  # a change of a tenth is never refused
_USUAL = 100.0  # a change so many times the usual one of the last round is an error or an attack
_JUMP = 10.0  # combined, in largest changes of one site
_MORE_IMAGES = 2.0  # a site's index may grow during a run, but not so much


@dataclass
class RoundResult:
    """The federation after a round: what the next one starts from, and the figures.

    Attributes:
        number: the round, from 1.
        state: the new shared state.
        memory: what the aggregator remembers.
        mass: soft number of images of each prototype, by site, from the last round that it took part in.
        answered: the last round in which each site answered well.
        ledgers: newest entry of each site's privacy ledger that it told.
        contrast: factor of the contrastive term in the next round.
        usual_change: median of ``change``; None before round 1.
        metrics: each site's figures, by site.
        examples: each site's images, by site.
        usage: share of each site's samples by prototype.
        counts: samples nearest to each prototype, by site.
        change: of each site's weights, in norms of the weights.
        cosine: between each site's weights and those that it was sent.
        agreement: mean length of the averaged prototypes before renormalising; None without prototypes.
        site_nmi: normalised information of the cluster on the site; None where there is nothing to tell.
        failed: reason by site, for those whose answer is missing or refused.
        absent: reason by site, for those that were not asked.
        bytes_up: received from all sites.
        bytes_down: sent to all sites.
        signs: of collapse, by site.
        reseeded: prototypes that were started again.
    """

    number: int
    state: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[str, Tensor] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    ledgers: dict[str, str] = field(default_factory=dict)
    contrast: float = 1.0
    usual_change: float | None = None
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    usage: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    site_nmi: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    signs: dict[str, list[str]] = field(default_factory=dict)
    reseeded: int = 0


def _untreated(result: RoundResult, contrast: float) -> RoundResult:  # noqa: ARG001 - what a treatment is given
    return result


def run_rounds(
    grid: Grid,
    start: RoundResult,
    plan: Plan,
    aggregator: Aggregator,
    treat: Callable[[RoundResult, float], RoundResult] = _untreated,
) -> Iterator[RoundResult]:
    """Run the rounds after ``start`` and give each one's result.

    Args:
        grid: the sites.
        start: the federation as it stands.
        plan: what stays the same.
        aggregator: combines the sites' states.
        treat: looks at each round's result and the contrast it was trained with; may change what comes next.

    Raises:
        FederationError: fewer than ``min_sites`` sites are there or answer well; each missing one is named.
    """
    roster = Roster(grid, plan)
    roster.open()
    result = start
    del start  # nothing holds a state longer than its round
    for number in range(result.number + 1, plan.rounds + 1):
        roster.refresh()
        result = treat(_Round(grid, roster, result, plan, number).run(aggregator), result.contrast)
        yield result


class _Round:
    """One round in the making."""

    def __init__(self, grid: Grid, roster: Roster, before: RoundResult, plan: Plan, number: int) -> None:
        self.grid = grid
        self.members = roster.choose(number)
        self.before = before
        self.plan = plan
        self.deadline = time.monotonic() + plan.deadline_s
        try:
            self.packed = pack(before.state, plan.precision)
        except FederationError as error:
            raise FederationError(f"Round {number} cannot begin: the shared state does not travel; {error}.") from error
        self.received = before.state if plan.precision == FULL else unpack(*self.packed)
        self.result = RoundResult(
            number, before.state, before.memory, dict(before.mass), dict(before.answered), dict(before.ledgers),
            absent=dict(roster.absent),
        )  # fmt: skip

    def run(self, aggregator: Aggregator) -> RoundResult:
        """Ask the sites, fold their answers, name those that failed."""
        result, plan = self.result, self.plan
        combination = Combination(aggregator, self.before.state, self.received)
        guides = self._guides()
        sites = {member.node: site for site, member in self.members.items()}
        for node, answer in ask(self.grid, self._contents(guides), MessageType.TRAIN, plan, self.deadline):
            try:
                self._note(combination.add(self._receive(answer, sites[node])))
            except UpdateRefused as refusal:
                result.failed[refusal.site] = refusal.reason
                text = f"Round {result.number}: {refusal}. The round goes on without it."
                progress.publish(progress.Note(text, alarm=True))
            del answer  # else two are in memory while the next one is pulled
        missing = result.failed | result.absent
        require(plan.min_sites, result.metrics, missing, f"answered well in round {result.number}")
        result.state, result.memory, result.agreement = combination.finish(self.before.memory)
        self._sound(result.state)
        result.usual_change = statistics.median(result.change.values())
        if result.counts:
            result.site_nmi = cluster_information(torch.stack(list(result.counts.values())))
        return result

    def _sound(self, state: Mapping[str, Tensor]) -> None:
        """Refuse to go on from what no site could have reached, such as a mean divided by claims.

        Raises:
            FederationError: says how far it jumped.
        """
        change = change_of(state, self.before.state)
        if not change <= _JUMP * self.plan.largest_change:
            raise FederationError(
                f"The answers of round {self.result.number} combine to a change of {change:.3g} times the norm of the "
                "weights; nothing of it was kept. Lower aggregation.rate, or hold sites off: aggregation=median."
            )

    def _guides(self) -> Guides:
        """Tell the sites what their images should fill of the prototypes, if the run asks for it."""
        if self.plan.equipartition == SITE_MARGINALS:
            return site_marginals(self.members, self.before.mass)
        if self.plan.equipartition != FEDERATED_SINKHORN:
            return {}
        count = len(self.before.state[PROTOTYPES])
        self.result.bytes_down += self.packed[0].count_bytes() * len(self.members)
        return federated_sinkhorn(
            self.grid, self.members, self.packed, count, self._order(""), self.plan, self.deadline
        )

    def _order(self, site: str) -> Order:
        plan, last, ledger = self.plan, self.before.answered.get(site, 0), self.before.ledgers.get(site, "")
        return Order(
            plan.run, self.result.number, plan.rounds, plan.fingerprint, self.before.contrast, last, ledger,
            plan.precision,
        )  # fmt: skip

    def _contents(self, guides: Guides) -> dict[int, RecordDict]:
        contents = {
            member.node: wire.write_order(self._order(site), self.packed, guides.get(site))
            for site, member in self.members.items()
        }
        del self.packed  # what is on its way lies at the SuperLink
        self.result.bytes_down += sum(size_in_bytes(content) for content in contents.values())
        return contents

    def _receive(self, answer: Message | None, site: str) -> Update:
        """Read and check one answer.

        Raises:
            UpdateRefused: it is missing, malformed, or cannot be averaged.
        """
        if answer is None or not answer.has_content():
            raise UpdateRefused(site, failure(answer))
        try:
            update = wire.read_update(answer.content, self.received)
        except FederationError as error:
            raise UpdateRefused(site, str(error)) from error
        if isinstance(update, wire.Refusal):
            raise UpdateRefused(site, update.reason)
        if update.site != site:
            raise UpdateRefused(site, f"answered under the name {update.site}")
        if site in self.before.answered:
            update = replace(update, independent=False)  # its own start is a thing of its first round
        limits = self._limits(self.members[site], joins=update.independent)
        self.result.change[site] = check_update(update, self.received, limits)
        self.result.bytes_up += size_in_bytes(answer.content)
        return update

    def _limits(self, member: Member, *, joins: bool) -> Limits:
        plan, usual, images = self.plan, self.before.usual_change, _MORE_IMAGES * member.images
        change = plan.largest_change
        if usual is not None and not joins:
            change = min(change, max(_USUAL * usual, _ALWAYS))
        return Limits(plan.terms, change, images, plan.most_steps(images), plan.batch_size)

    def _note(self, update: Update) -> None:
        """Keep the figures of a good answer; its state is in the running total."""
        result, site = self.result, update.site
        result.metrics[site], result.examples[site] = update.metrics, update.examples
        result.answered[site] = result.number
        if update.ledger:
            result.ledgers[site] = update.ledger
        result.cosine[site] = cosine_to(update.state, self.received)
        if update.mass is not None and update.usage is not None:
            result.mass[site], result.counts[site] = update.mass, update.usage
            result.usage[site] = (update.usage / update.usage.sum().clamp_min(1e-12)).tolist()
