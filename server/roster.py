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
from server.exchange import Plan, failure, lost, pull, push, require

_GONE = "is not connected"
_SECOND = "is the second node that says it is this site; stop one"
_LISTEN_S, _POLL_S = 1.0, 0.1
_MOST_LOST = 5


@dataclass(frozen=True)
class Member:
    """A site that takes part: its node, and how many training images it said it has."""

    node: int
    images: int


class Roster:
    """The sites of a run. Which node speaks for a site is settled by who says its name first, until that node is gone.

    Args:
        grid: the nodes.
        plan: who may take part.
    """

    def __init__(self, grid: Grid, plan: Plan) -> None:
        self.grid = grid
        self.plan = plan
        self._nodes: set[int] = set()
        self._members: dict[str, Member] = {}
        self._asked: dict[int, str] = {}  # nodes that have not answered yet, with the message
        self._refused: dict[int, wire.Refusal] = {}  # nodes that cannot take part, with their last word
        self._told: dict[str, str] = {}
        self._lost = 0  # answers to the roll call that were lost with the process that held them

    def open(self) -> None:
        """Wait for the sites on the list, or for a quorum, to connect and to say who they are.

        Who is slow to answer comes in later: with a list, all have until the deadline of a round; without one, the
        quorum is enough after ``wait_s``.

        Raises:
            FederationError: too few sites can take part; each other one is named with the reason.
        """
        self._nodes = set(_wait_for_nodes(self.grid, self.plan))
        self._ask(self._nodes)
        begin = time.monotonic()
        patience = self.plan.deadline_s if self.plan.sites else self.plan.wait_s
        while True:
            self._look(again=False)
            waited = time.monotonic() - begin
            enough = len(self._members) >= self.plan.min_sites and waited > min(patience, self.plan.deadline_s)
            missing = self._lost and waited < self.plan.rejoin_s and set(self.plan.sites) - self._members.keys()
            if not (self._asked or missing) or enough or waited > self.plan.deadline_s:
                break
            self._say("roll call", f"Waiting for the answers of {len(self._asked)} of {len(self._nodes)} sites")
            time.sleep(_POLL_S)
        self._name_absent()
        require(self.plan.min_sites, self._members, self.absent, "take part")
        progress.publish(progress.Note(f"{len(self._members)} sites take part: {', '.join(sorted(self._members))}"))

    def refresh(self) -> None:
        """Before a round: let in who came late, and notice who is gone.

        It waits while the quorum is not there, and ``rejoin_s`` for a site that has just gone: it may be restarting.
        """
        before = self._there().keys()
        back = time.monotonic() + self.plan.rejoin_s
        self._look(again=True)
        while (gone := before - self._there().keys()) and time.monotonic() < back:
            self._say("gone", f"Waiting up to {self.plan.rejoin_s:.0f} s for {', '.join(sorted(gone))} to be back")
            time.sleep(_LISTEN_S)
            self._look(again=False)
        self._told.pop("gone", None)
        deadline = time.monotonic() + self.plan.wait_s
        while len(self._there()) < self.plan.min_sites and time.monotonic() < deadline:
            self._say("quorum", f"Waiting up to {self.plan.wait_s:.0f} s for {self.plan.min_sites} sites to be back")
            time.sleep(_LISTEN_S)
            self._look(again=False)
        self._told.pop("quorum", None)
        self._name_absent()

    @property
    def absent(self) -> dict[str, str]:
        """Why sites do not take part now, by site."""
        reasons = {site: _GONE for site in self._members if site not in self._there()}
        for node, refusal in self._refused.items():
            name = refusal.site if refusal.site not in self._members else f"{refusal.site} (node {node})"
            reasons[name] = refusal.reason
        reasons |= {f"node {node}": failure(None) for node in self._asked}
        unknown = "has not answered yet" if self._asked else _GONE
        missing = [site for site in self.plan.sites if site not in self._members and site not in reasons]
        return reasons | dict.fromkeys(missing, unknown)

    def choose(self, number: int) -> dict[str, Member]:
        """Choose the sites of a round, by name: a seeded sample of those that are there, no smaller than the quorum.

        Site and round alone decide, so that a resumed run chooses as an undisturbed one.
        """
        there = self._there()
        count = max(self.plan.min_sites, math.ceil(self.plan.participation * len(there) - 1e-9))

        def draw(site: str) -> bytes:
            return hashlib.sha256(f"{self.plan.seed}/{number}/{site}".encode()).digest()

        return {site: there[site] for site in sorted(sorted(there, key=draw)[:count])}

    def _there(self) -> dict[str, Member]:
        return {site: member for site, member in self._members.items() if member.node in self._nodes}

    def _look(self, *, again: bool) -> None:
        """See which nodes there are, and ask those that are new (or, ``again``, that could not take part so far)."""
        before = set(self._there())
        self._nodes = set(self.grid.get_node_ids())
        self._asked = {node: message for node, message in self._asked.items() if node in self._nodes}
        self._refused = {node: word for node, word in self._refused.items() if node in self._nodes}
        settled = {member.node for member in self._members.values()} | set(self._asked)
        self._ask(self._nodes - settled - (set() if again else set(self._refused)))
        self._listen()
        for site in sorted(set(self._there()) - before):
            self._told.pop(site, None)
            progress.publish(progress.Note(f"Site {site} takes part from now on"))

    def _ask(self, nodes: Collection[int]) -> None:
        order = wire.write_order(Order(self.plan.run, 0, self.plan.rounds, self.plan.fingerprint), None)
        if nodes:
            self._asked |= push(self.grid, dict.fromkeys(sorted(nodes), order), MessageType.QUERY, self.plan)

    def _listen(self) -> None:
        """Take the answers that are there."""
        for node, message_id in list(self._asked.items()):
            message = pull(self.grid, message_id)
            if message is None and message_id:
                continue
            del self._asked[node]
            self._refused.pop(node, None)
            if lost(message) and self._lost < _MOST_LOST * len(self._nodes):
                self._lost += 1
                continue  # it is asked again when it is back
            answer = self._enter(_read_presence(message, node), node)
            if isinstance(answer, wire.Refusal):
                self._refused[node] = answer

    def _enter(self, answer: wire.Presence | wire.Refusal, node: int) -> wire.Presence | wire.Refusal:
        """Enter a site, unless it cannot take part, is not on the list or is there already."""
        if isinstance(answer, wire.Refusal):
            return answer
        if self.plan.sites and answer.site not in self.plan.sites:
            return wire.Refusal(answer.site, "is not on the list of sites (federation.sites)")
        if answer.site in self._there():
            return wire.Refusal(answer.site, _SECOND)
        self._members[answer.site] = Member(node, answer.images)
        return answer

    def _name_absent(self) -> None:
        """Say once why each site is not there."""
        for site, reason in self.absent.items():
            self._say(site, f"Site {site} does not take part: it {reason}.", alarm=True)

    def _say(self, about: str, text: str, *, alarm: bool = False) -> None:
        if self._told.get(about) != text:
            progress.publish(progress.Note(text, alarm=alarm))
        self._told[about] = text


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
