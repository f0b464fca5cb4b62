"""What each site's images should fill of the prototypes in a round: nothing said, worked out, or negotiated."""

import time
from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from fedssl import progress, wire
from fedssl.errors import FederationError
from fedssl.marginals import balance, column_step
from fedssl.order import Order
from fedssl.packing import Packed
from server.exchange import Plan, ask, failure
from server.roster import Member

COLUMN_SUMS = "marginals"  # the action of the query by which a site answers one iteration
Guides = dict[str, dict[str, Tensor]]


def site_marginals(members: Mapping[str, Member], mass: Mapping[str, Tensor]) -> Guides:
    """Work out marginals from the mass of each site's last round; a site without one equipartitions as if alone."""
    known = {site: value for site, value in mass.items() if site in members and float(value.sum()) > 0}
    if not known:
        return {}
    shares = balance(known, {site: members[site].images for site in known})
    return {site: {"marginal": share} for site, share in shares.items()}


def federated_sinkhorn(
    grid: Grid,
    members: Mapping[str, Member],
    packed: Packed,
    prototypes: int,
    order: Order,
    plan: Plan,
    deadline: float,
) -> Guides:
    """Run the iterations of Sinkhorn over all sites' images; only sums over a site's images travel.

    Each iteration has an equal share of half of the time that is left, so that a site that hangs does not use up the
    time to train. Whoever does not answer goes on as if alone.

    Args:
        grid: the sites.
        members: those of the round.
        packed: the shared state, sent with the first iteration.
        prototypes: K.
        order: of the round.
        plan: iterations.
        deadline: of the round.

    Returns:
        The potentials of the columns for every site that answered each time.
    """
    there, potentials = dict(members), None
    begin = time.monotonic()
    share = max(deadline - begin, 0.0) / 2.0 / plan.sinkhorn_iterations
    for iteration in range(plan.sinkhorn_iterations):
        guide: dict[str, Tensor] = {} if potentials is None else {"potentials": potentials}
        content = wire.write_order(order, packed if iteration == 0 else None, guide)
        contents = {member.node: content for member in there.values()}
        kind = f"{MessageType.QUERY}.{COLUMN_SUMS}"
        sums: dict[str, Tensor] = {}
        for site, (_, answer) in zip(
            list(there), ask(grid, contents, kind, plan, begin + (iteration + 1) * share), strict=True
        ):
            told = _read(answer, prototypes, first=iteration == 0)
            if isinstance(told, Tensor):
                sums[site] = told
                continue
            del there[site]
            text = f"Round {order.number}: site {site} {told}. Federated Sinkhorn goes on without it."
            progress.publish(progress.Note(text, alarm=True))
        if not there:
            break
        potentials = column_step(potentials, list(sums.values()), [there[site].images for site in sums])
    return {site: {"potentials": potentials} for site in there if potentials is not None}


def _read(answer: Message | None, prototypes: int, *, first: bool) -> Tensor | str:
    """Give the column sums of an answer, or why there are none."""
    if answer is None or not answer.has_content():
        return failure(answer)
    try:
        told = wire.read_column_sums(answer.content, prototypes, first=first)
    except FederationError as error:
        return str(error)
    return told if isinstance(told, Tensor) else told.reason
