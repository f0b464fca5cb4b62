"""The rounds: send the state, fold each good answer into a running sum, name every site that failed.

Flower's own strategies hold every answer, wait for ever for missing nodes and die of one malformed reply; hence a loop
of our own on the Grid. Answers are folded in the order of the sites' names, so that the result does not depend on who
is first; those that wait stay at the SuperLink, and the server's memory does not grow with the sites.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from fedssl import progress, wire
from fedssl.aggregation import prototypes
from fedssl.aggregation.mean import RunningSum, WeightedMean
from fedssl.aggregation.prototypes import PrototypeSum
from fedssl.errors import FederationError, UpdateRefused
from fedssl.methods.base import PROTOTYPES
from fedssl.update import Update, check_update
from server.exchange import Plan, failure, pull, push, require
from server.roll_call import call_roll


@dataclass
class RoundResult:
    """The federation after a round.

    Attributes:
        number: the round, from 1.
        state: the new shared state.
        metrics: each site's figures, by site.
        examples: each site's images, by site.
        usage: share of each site's samples by prototype.
        agreement: mean length of the averaged prototypes before renormalising; None without prototypes.
        failed: reason by site, for those whose answer is missing or refused.
        bytes_up: received from all sites.
        bytes_down: sent to all sites.
        signs: of collapse, by site.
        reseeded: prototypes that were started again.
        contrast: factor of the contrastive term in the next round.
    """

    number: int
    state: dict[str, Tensor]
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    usage: dict[str, list[float]] = field(default_factory=dict)
    agreement: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    signs: dict[str, list[str]] = field(default_factory=dict)
    reseeded: int = 0
    contrast: float = 1.0


def _untreated(result: RoundResult, contrast: float) -> RoundResult:  # noqa: ARG001 - what a treatment is given
    return result


def run_rounds(
    grid: Grid,
    start: RoundResult,
    plan: Plan,
    aggregator: WeightedMean,
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
    sites = call_roll(grid, plan)
    result = start
    for number in range(start.number + 1, plan.rounds + 1):
        order = wire.Order(plan.run, number, plan.rounds, plan.fingerprint, result.contrast)
        result = treat(_run_round(grid, sites, result.state, order, plan, aggregator), result.contrast)
        yield result


def _run_round(
    grid: Grid,
    sites: Mapping[str, int],
    state: dict[str, Tensor],
    order: wire.Order,
    plan: Plan,
    aggregator: WeightedMean,
) -> RoundResult:
    number = order.number
    result = RoundResult(number, state)
    content = wire.write_order(order, state)
    deadline = time.monotonic() + plan.deadline_s
    pending = push(grid, content, list(sites.values()), MessageType.TRAIN, plan)
    result.bytes_down = wire.size_in_bytes(content) * len(sites)
    mean, centres = RunningSum(), PrototypeSum()
    for site, (_, message_id) in zip(sites, pending, strict=True):
        try:
            update = _receive(pull(grid, message_id, deadline), site, state, plan.terms, result)
        except UpdateRefused as refusal:
            result.failed[site] = refusal.reason
            progress.publish(progress.Note(f"Round {number}: {refusal}. The round goes on without it.", alarm=True))
            continue
        _fold(update, mean, centres, aggregator, result)
    require(plan, result.metrics, result.failed, f"answered well in round {number}")
    others = {name: value for name, value in state.items() if name != PROTOTYPES}
    result.state = aggregator.finish(mean, others)
    if PROTOTYPES in state:
        result.state[PROTOTYPES], result.agreement = prototypes.finish(centres, state[PROTOTYPES])
    return result


def _fold(
    update: Update, mean: RunningSum, centres: PrototypeSum, aggregator: WeightedMean, result: RoundResult
) -> None:
    others = {name: value for name, value in update.state.items() if name != PROTOTYPES}
    aggregator.fold(mean, others, update.examples)
    if PROTOTYPES in update.state and update.mass is not None and update.usage is not None:
        prototypes.fold(centres, update.state[PROTOTYPES], update.mass)
        result.usage.update(prototypes.usage_by_site({update.site: update.usage}))
    result.metrics[update.site] = update.metrics
    result.examples[update.site] = update.examples


def _receive(
    answer: Message | None, site: str, state: Mapping[str, Tensor], terms: frozenset[str], result: RoundResult
) -> Update:
    """Read and check one answer.

    Raises:
        UpdateRefused: it is missing, malformed, or cannot be averaged.
    """
    if answer is None or not answer.has_content():
        raise UpdateRefused(site, failure(answer))
    try:
        update = wire.read_update(answer.content)
    except FederationError as error:
        raise UpdateRefused(site, str(error)) from error
    if isinstance(update, wire.Refusal):
        raise UpdateRefused(site, update.reason)
    if update.site != site:
        raise UpdateRefused(site, f"answered under the name {update.site}")
    check_update(update, state, terms)
    result.bytes_up += wire.size_in_bytes(answer.content)
    return update
