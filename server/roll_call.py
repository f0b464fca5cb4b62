"""The roll call: wait for enough sites, ask each who it is, and name those that cannot take part."""

import time

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedssl import progress, wire
from fedssl.errors import FederationError
from server.exchange import Plan, failure, pull, push, require


def call_roll(grid: Grid, plan: Plan) -> dict[str, int]:
    """Wait for enough nodes, then ask each for its name; returns node ids by site, ordered by name."""
    nodes = _wait_for_nodes(grid, plan)
    order = wire.write_order(wire.Order(plan.run, 0, plan.rounds, plan.fingerprint), None)
    sites: dict[str, int] = {}
    refused: dict[str, str] = {}
    deadline = time.monotonic() + plan.deadline_s
    pending = push(grid, order, nodes, MessageType.QUERY, plan)
    for node, message_id in pending:
        answer = _read_presence(pull(grid, message_id, deadline), node)
        if isinstance(answer, wire.Refusal):
            refused[answer.site] = answer.reason
        elif answer.site in sites:
            refused[f"{answer.site} (again)"] = "is the second node that says it is this site; stop one"
        else:
            sites[answer.site] = node
    for site, reason in refused.items():
        progress.publish(progress.Note(f"Site {site} does not take part: it {reason}.", alarm=True))
    require(plan, sites, refused, "take part")
    progress.publish(progress.Note(f"{len(sites)} sites take part: {', '.join(sorted(sites))}"))
    return dict(sorted(sites.items()))


def _read_presence(answer: Message | None, node: int) -> wire.Presence | wire.Refusal:
    if answer is None or not answer.has_content():
        return wire.Refusal(f"node {node}", failure(answer))
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
