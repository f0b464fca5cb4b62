"""The rounds: send the state, fold each good answer into a running sum, name every site that failed.

Flower's own strategies hold every answer, wait for ever for missing nodes and die of one malformed reply; hence a loop
of our own on the Grid. Answers are folded in the order of the sites' names, so that the result does not depend on who
is first; those that wait stay at the SuperLink, and the server's memory does not grow with the sites.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedssl import progress, wire
from fedssl.aggregation import prototypes
from fedssl.aggregation.mean import RunningSum, WeightedMean
from fedssl.aggregation.prototypes import PrototypeSum
from fedssl.errors import FederationError, UpdateRefused
from fedssl.methods.base import PROTOTYPES
from fedssl.update import Update, check_update

_POLL_S = 0.05
_GRACE_S = 600.0  # answers stay at the SuperLink while earlier ones are folded


@dataclass(frozen=True)
class Plan:
    """What stays the same over the rounds: see ``federation`` in the configuration; ``terms`` of the loss."""

    run: str
    rounds: int
    fingerprint: str
    min_sites: int
    deadline_s: float
    wait_s: float
    terms: frozenset[str] = frozenset()


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
    sites = _call_roll(grid, plan)
    result = start
    for number in range(start.number + 1, plan.rounds + 1):
        order = wire.Order(plan.run, number, plan.rounds, plan.fingerprint, result.contrast)
        result = treat(_run_round(grid, sites, result.state, order, plan, aggregator), result.contrast)
        yield result


def _call_roll(grid: Grid, plan: Plan) -> dict[str, int]:
    """Wait for enough nodes, then ask each for its name; returns node ids by site, ordered by name."""
    nodes = _wait_for_nodes(grid, plan)
    order = wire.write_order(wire.Order(plan.run, 0, plan.rounds, plan.fingerprint), None)
    sites: dict[str, int] = {}
    refused: dict[str, str] = {}
    deadline = time.monotonic() + plan.deadline_s
    pending = _push(grid, order, nodes, MessageType.QUERY, plan)
    for node, message_id in pending:
        answer = _read_presence(_pull(grid, message_id, deadline), node)
        if isinstance(answer, wire.Refusal):
            refused[answer.site] = answer.reason
        elif answer.site in sites:
            refused[f"{answer.site} (again)"] = "is the second node that says it is this site; stop one"
        else:
            sites[answer.site] = node
    for site, reason in refused.items():
        progress.publish(progress.Note(f"Site {site} does not take part: it {reason}.", alarm=True))
    _require(plan, sites, refused, "take part")
    progress.publish(progress.Note(f"{len(sites)} sites take part: {', '.join(sorted(sites))}"))
    return dict(sorted(sites.items()))


def _read_presence(answer: Message | None, node: int) -> wire.Presence | wire.Refusal:
    if answer is None or not answer.has_content():
        return wire.Refusal(f"node {node}", _failure(answer))
    try:
        return wire.read_presence(answer.content)
    except FederationError as error:
        return wire.Refusal(f"node {node}", str(error))


def _wait_for_nodes(grid: Grid, plan: Plan) -> list[int]:
    deadline = time.monotonic() + plan.wait_s
    told = False
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= plan.min_sites:
            return nodes
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of at least {plan.min_sites} sites connected within {plan.wait_s:.0f} s. Start the "
                "missing sites, or change federation.min_sites or federation.wait_s."
            )
        if not told:
            progress.publish(
                progress.Note(f"Waiting up to {plan.wait_s:.0f} s for {plan.min_sites} sites ({len(nodes)} there)")
            )
            told = True
        time.sleep(1.0)


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
    pending = _push(grid, content, list(sites.values()), MessageType.TRAIN, plan)
    result.bytes_down = wire.size_in_bytes(content) * len(sites)
    mean, centres = RunningSum(), PrototypeSum()
    for site, (_, message_id) in zip(sites, pending, strict=True):
        try:
            update = _receive(_pull(grid, message_id, deadline), site, state, plan.terms, result)
        except UpdateRefused as refusal:
            result.failed[site] = refusal.reason
            progress.publish(progress.Note(f"Round {number}: {refusal}. The round goes on without it.", alarm=True))
            continue
        _fold(update, mean, centres, aggregator, result)
    _require(plan, result.metrics, result.failed, f"answered well in round {number}")
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
    if update.mass is not None and update.usage is not None:
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
        raise UpdateRefused(site, _failure(answer))
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


def _push(grid: Grid, content: RecordDict, nodes: list[int], kind: str, plan: Plan) -> list[tuple[int, str]]:
    """Send one content to many nodes; returns (node, message id) in the order given."""
    messages = [Message(content, dst_node_id=node, message_type=kind, ttl=plan.deadline_s + _GRACE_S) for node in nodes]
    ids = list(grid.push_messages(messages))
    if len(ids) != len(nodes):  # what Flower's Grid gives when the SuperLink refuses the size of a message
        raise FederationError(
            "The SuperLink refused the messages of this round as too large. Choose a smaller encoder."
        )
    return list(zip(nodes, ids, strict=True))


def _pull(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """Wait for the answer to one message until the deadline; None if it did not come or was never sent."""
    while message_id:
        for answer in grid.pull_messages([message_id]):
            return answer
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return None


def _failure(answer: Message | None) -> str:
    """Say why there is no content. Flower's own error text is left out: it names the wrong node and may hold a path."""
    if answer is None:
        return "did not answer before the deadline (federation.deadline_s)"
    return f"failed before it could answer (Flower error {answer.error.code}); its own log says more"


def _require(plan: Plan, good: Mapping[str, object], bad: Mapping[str, str], what: str) -> None:
    if len(good) >= plan.min_sites:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in bad.items()) or "no other site is connected"
    raise FederationError(
        f"{len(good)} of at least {plan.min_sites} sites {what} ({', '.join(good) or 'none'}). {reasons}. "
        "Mend these sites, or lower federation.min_sites."
    )
