"""Who takes part: the roll call, sites that come late or are gone, and the seeded choice of a round's sites."""

import hashlib
import math
import time
from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedssl import progress, wire
from fedssl.errors import FederationError
from fedssl.order import Order
from server.exchange import Plan, failure, pull, push, require

_GONE = "is not connected"
_SECOND = "is the second node that says it is this site; stop one"
_LISTEN_S = 1.0


@dataclass(frozen=True)
class Member:
    """A site that takes part: its node, and how many training images it said it has."""

    node: int
    images: int


class Roster:
    """The sites of a run.

    Args:
        grid: the nodes.
        plan: who may take part.

    Attributes:
        absent: why sites do not take part now, by site.
    """

    def __init__(self, grid: Grid, plan: Plan) -> None:
        self.grid = grid
        self.plan = plan
        self.absent: dict[str, str] = {}
        self._members: dict[str, Member] = {}
        self._asked: dict[int, str] = {}  # nodes that have not answered yet, with the message

    def open(self) -> None:
        """Wait for enough nodes and ask each who it is; one that is slow to answer may come in later.

        Raises:
            FederationError: too few sites can take part; each other one is named with the reason.
        """
        self._ask(_wait_for_nodes(self.grid, self.plan))
        self._listen(time.monotonic() + self.plan.deadline_s)
        for node in self._asked:
            self._note_absent(f"node {node}", failure(None))
        require(self.plan.min_sites, self._members, self.absent, "take part")
        progress.publish(progress.Note(f"{len(self._members)} sites take part: {', '.join(sorted(self._members))}"))

    def refresh(self) -> None:
        """Before a round: let in who came late, and notice who is gone; wait only while the quorum is not there."""
        deadline = time.monotonic() + self.plan.wait_s
        while True:
            self._look()
            if len(self._there()) >= self.plan.min_sites or time.monotonic() > deadline:
                return
            time.sleep(_LISTEN_S)

    def _look(self) -> None:
        nodes, before = set(self.grid.get_node_ids()), set(self._members)
        self._asked = {node: message for node, message in self._asked.items() if node in nodes}
        for site, member in self._members.items():
            if member.node not in nodes:
                self._note_absent(site, _GONE)
            elif self.absent.pop(site, None):
                progress.publish(progress.Note(f"Site {site} is back"))
        self._ask(sorted(nodes - {member.node for member in self._members.values()} - set(self._asked)))
        self._listen()
        for site in sorted(set(self._members) - before):
            progress.publish(progress.Note(f"Site {site} takes part from now on"))

    def _there(self) -> dict[str, Member]:
        return {site: member for site, member in self._members.items() if site not in self.absent}

    def choose(self, number: int) -> dict[str, Member]:
        """Choose the sites of a round, by name: a seeded sample of those that are there, no smaller than the quorum.

        Site and round alone decide, so that a resumed run chooses as an undisturbed one.
        """
        there = self._there()
        count = max(self.plan.min_sites, math.ceil(self.plan.participation * len(there) - 1e-9))

        def draw(site: str) -> bytes:
            return hashlib.sha256(f"{self.plan.seed}/{number}/{site}".encode()).digest()

        return {site: there[site] for site in sorted(sorted(there, key=draw)[:count])}

    def _ask(self, nodes: Collection[int]) -> None:
        order = wire.write_order(Order(self.plan.run, 0, self.plan.rounds, self.plan.fingerprint), None)
        if nodes:
            self._asked |= push(self.grid, dict.fromkeys(nodes, order), MessageType.QUERY, self.plan)

    def _listen(self, deadline: float = 0.0) -> None:
        """Take the answers that are there by ``deadline``."""
        for node, message_id in list(self._asked.items()):
            message = pull(self.grid, message_id, deadline)
            if message is None and message_id:
                continue
            del self._asked[node]
            answer = _read_presence(message, node)
            if not isinstance(answer, wire.Refusal):
                answer = self._enter(answer, node)
            if isinstance(answer, wire.Refusal):
                self._note_absent(answer.site, answer.reason)
        for site in self.plan.sites:
            if site not in self._members and site not in self.absent:
                self._note_absent(site, _GONE)

    def _enter(self, answer: wire.Presence, node: int) -> wire.Presence | wire.Refusal:
        """Enter a site, unless it is not on the list or there already."""
        if self.plan.sites and answer.site not in self.plan.sites:
            return wire.Refusal(answer.site, "is not on the list of sites (federation.sites)")
        if answer.site in self._there():
            return wire.Refusal(f"{answer.site} (again)", _SECOND)
        self._members[answer.site] = Member(node, answer.images)
        for name in (answer.site, f"node {node}"):
            self.absent.pop(name, None)
        return answer

    def _note_absent(self, site: str, reason: str) -> None:
        """Say once why a site is not there."""
        if self.absent.get(site) != reason:
            progress.publish(progress.Note(f"Site {site} does not take part: it {reason}.", alarm=True))
        self.absent[site] = reason


def _read_presence(answer: Message | None, node: int) -> wire.Presence | wire.Refusal:
    if answer is None or not answer.has_content():
        return wire.Refusal(f"node {node}", failure(answer))
    try:
        return wire.read_presence(answer.content)
    except FederationError as error:
        return wire.Refusal(f"node {node}", str(error))


def _wait_for_nodes(grid: Grid, plan: Plan) -> list[int]:
    """Wait for all sites on the list, or for the quorum where there is no list; at the deadline the quorum is enough.

    Raises:
        FederationError: there are fewer.
    """
    wanted = max(plan.min_sites, len(plan.sites))
    deadline = time.monotonic() + plan.wait_s
    told = False
    while True:
        nodes = sorted(grid.get_node_ids())
        late = time.monotonic() > deadline
        if len(nodes) >= wanted or (late and len(nodes) >= plan.min_sites):
            return nodes
        if late:
            raise FederationError(
                f"{len(nodes)} of at least {plan.min_sites} sites connected within {plan.wait_s:.0f} s. Start the "
                "missing sites, or change federation.min_sites or federation.wait_s."
            )
        if not told:
            progress.publish(
                progress.Note(f"Waiting up to {plan.wait_s:.0f} s for {wanted} sites ({len(nodes)} there)")
            )
            told = True
        time.sleep(_LISTEN_S)
