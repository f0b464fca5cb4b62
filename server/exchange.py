"""Messages out, answers in: every wait has an end, and every failure a sentence."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedssl import progress
from fedssl.errors import FederationError
from fedssl.update import MOST_IMAGES

_POLL_S = 0.05
_LISTEN_S = 1.0
_MOST_ASKED = 8  # times that one question is asked
_LOST = {3, 4, 5, 8}  # Flower's codes for a node or a relay that was stopped, not for one that failed by itself
_GRACE_S = 600.0  # answers stay at the SuperLink while earlier ones are folded


@dataclass(frozen=True)
class Plan:
    """What stays the same over the rounds: see ``federation`` in the configuration.

    Attributes:
        run: random name of the run.
        rounds: of the whole federation.
        fingerprint: of the configuration.
        min_sites: quorum of a round.
        deadline_s: of a round.
        wait_s: for sites to connect.
        terms: names of the terms of the method's loss.
        sites: names of those who may take part; empty: whoever connects.
        participation: share of the sites that train in a round.
        seed: of the choice of sites.
        precision: of numbers on the wire.
        largest_change: of a site's weights in a round, in norms of the weights.
        equipartition: ``local``, ``site-marginals`` or ``federated-sinkhorn``.
        sinkhorn_iterations: of federated Sinkhorn.
        batch_size: most images of an optimiser step.
        local_epochs: of a round.
        local_steps: of a round instead, or None.
        private_steps: of a round at a private site; 0 where there is none.
        timed: a round lasts so long as the clock says: nobody knows how many steps.
        rejoin_s: how long a site that took part is waited for when its node is gone.
    """

    run: str
    rounds: int
    fingerprint: str
    min_sites: int
    deadline_s: float
    wait_s: float
    terms: frozenset[str] = frozenset()
    sites: tuple[str, ...] = ()
    participation: float = 1.0
    seed: int = 0
    precision: str = "float32"
    largest_change: float = 3.0
    equipartition: str = "local"
    sinkhorn_iterations: int = 5
    batch_size: float = MOST_IMAGES
    local_epochs: float = MOST_IMAGES
    local_steps: int | None = None
    timed: bool = False
    private_steps: int = 0
    rejoin_s: float = 0.0

    def most_steps(self, images: float) -> float:
        """Bound the optimiser steps of a site with so many images: at least two are in a step."""
        if self.timed:
            return MOST_IMAGES
        steps = self.local_steps if self.local_steps is not None else max(1.0, self.local_epochs * images / 2.0)
        return max(steps, self.private_steps)


def push(grid: Grid, contents: Mapping[int, RecordDict], kind: str, plan: Plan) -> dict[int, str]:
    """Send each node its content; returns the message ids by node, in the order given."""
    ttl = plan.deadline_s + _GRACE_S
    messages = [Message(content, dst_node_id=node, message_type=kind, ttl=ttl) for node, content in contents.items()]
    ids = list(grid.push_messages(messages))
    if len(ids) != len(contents):  # what Flower's Grid gives when the SuperLink refuses the size of a message
        raise FederationError(
            "The SuperLink refused the messages of this round as too large. Choose a smaller encoder, or "
            "federation.precision=bfloat16."
        )
    return dict(zip(contents, ids, strict=True))


def pull(grid: Grid, message_id: str, deadline: float = 0.0) -> Message | None:
    """Wait for the answer to one message until the deadline, by ``time.monotonic``; None if it is not there by then."""
    while message_id:
        for answer in grid.pull_messages([message_id]):
            return answer
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return None  # it was never sent


def ask(
    grid: Grid, contents: Mapping[int, RecordDict], kind: str, plan: Plan, deadline: float
) -> Iterator[tuple[int, Message | None]]:
    """Send each node its content and give the answers one by one, in the order given; None for those not in time.

    A node or a relay that was killed is asked again when it is back: a site gives the same answer to the same question.
    """
    for node, message_id in push(grid, contents, kind, plan).items():
        answer = pull(grid, message_id, deadline)
        for _ in range(_MOST_ASKED):
            if not lost(answer) or not _is_back(grid, node, min(deadline, time.monotonic() + plan.rejoin_s)):
                break
            progress.publish(progress.Note(f"Node {node} was interrupted ({failure(answer)}) and is asked again"))
            answer = pull(grid, push(grid, {node: contents[node]}, kind, plan)[node], deadline)
        yield node, answer


def lost(answer: Message | None) -> bool:
    """Tell whether a question was lost with the process that held it."""
    return answer is not None and answer.has_error() and answer.error.code in _LOST


def _is_back(grid: Grid, node: int, deadline: float) -> bool:
    """Wait for a node until the deadline."""
    while time.monotonic() < deadline:
        if node in set(grid.get_node_ids()):
            return True
        time.sleep(_LISTEN_S)
    return False


def failure(answer: Message | None) -> str:
    """Say why there is no content. Flower's own error text is left out: it names the wrong node and may hold a path."""
    if answer is None:
        return "did not answer before the deadline (federation.deadline_s)"
    return f"failed before it could answer (Flower error {answer.error.code}); its own log says more"


def require(least: int, good: Mapping[str, object], bad: Mapping[str, str], what: str) -> None:
    """End the run unless enough sites did what was asked.

    Raises:
        FederationError: names those that did, and why the others did not.
    """
    if len(good) >= least:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in bad.items()) or "no other site is connected"
    raise FederationError(
        f"{len(good)} of at least {least} sites {what} ({', '.join(good) or 'none'}). {reasons}. "
        "Mend these sites, or lower federation.min_sites."
    )
