"""Messages out, answers in: every wait has an end, and every failure a sentence."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedssl.errors import FederationError

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


def push(grid: Grid, content: RecordDict, nodes: list[int], kind: str, plan: Plan) -> list[tuple[int, str]]:
    """Send one content to many nodes; returns (node, message id) in the order given."""
    messages = [Message(content, dst_node_id=node, message_type=kind, ttl=plan.deadline_s + _GRACE_S) for node in nodes]
    ids = list(grid.push_messages(messages))
    if len(ids) != len(nodes):  # what Flower's Grid gives when the SuperLink refuses the size of a message
        raise FederationError(
            "The SuperLink refused the messages of this round as too large. Choose a smaller encoder."
        )
    return list(zip(nodes, ids, strict=True))


def pull(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """Wait for the answer to one message until the deadline; None if it did not come or was never sent."""
    while message_id:
        for answer in grid.pull_messages([message_id]):
            return answer
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return None


def failure(answer: Message | None) -> str:
    """Say why there is no content. Flower's own error text is left out: it names the wrong node and may hold a path."""
    if answer is None:
        return "did not answer before the deadline (federation.deadline_s)"
    return f"failed before it could answer (Flower error {answer.error.code}); its own log says more"


def require(plan: Plan, good: Mapping[str, object], bad: Mapping[str, str], what: str) -> None:
    """End the run unless enough sites did what was asked.

    Raises:
        FederationError: names those that did, and why the others did not.
    """
    if len(good) >= plan.min_sites:
        return
    reasons = "; ".join(f"{site}: {reason}" for site, reason in bad.items()) or "no other site is connected"
    raise FederationError(
        f"{len(good)} of at least {plan.min_sites} sites {what} ({', '.join(good) or 'none'}). {reasons}. "
        "Mend these sites, or lower federation.min_sites."
    )
