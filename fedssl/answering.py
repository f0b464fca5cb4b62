"""A site's answers: each message of the server goes to the site's agent, whose answer goes back.

The same code answers in a simulation, in a Flower process and in the agent of a hospital.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import MessageType, RecordDict

from fedssl import wire
from fedssl.build_site import build_agent
from fedssl.config import Config, fingerprint, load, overrides_of
from fedssl.errors import FederationError, FedsslError
from fedssl.order import Order
from fedssl.site.agent import SiteAgent
from fedssl.site.answers import train_once
from fedssl.site.private_agent import PrivateSiteAgent

_log = logging.getLogger(__name__)
NodeConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What goes back.

    Attributes:
        content: of the message.
        order: what was asked; None where that could not be read.
    """

    content: RecordDict
    order: Order | None = None


def answer(
    kind: str, overrides: str, content: RecordDict, node_config: NodeConfig, admit: Callable[..., None] | None = None
) -> Answer:
    """Answer a message; whatever goes wrong becomes a sentence for the server.

    Args:
        kind: of the message: ``query`` or ``train``.
        overrides: of the run, as one string.
        content: of the message.
        node_config: of the site, see ``build_agent``.
        admit: the hospital's rules: called with configuration, request and whether it is to train; raises PolicyError.
    """
    site, order = _name(node_config), None
    try:
        config = configuration(overrides)
        request = wire.read_order(content, fingerprint(config))
        order = request.order
        training = kind.partition(".")[0] == MessageType.TRAIN
        if admit is not None:
            admit(config, request, training=training)
        agent = _agent(overrides, _frozen(node_config))
        site = agent.site
        kept = "data-dir" in node_config and not isinstance(agent, PrivateSiteAgent)  # which keeps its own
        return Answer(_work(agent, request, training=training, kept=kept), order)
    except FedsslError as error:
        return Answer(wire.write_refusal(wire.Refusal(site, str(error))), order)
    except Exception as error:  # noqa: BLE001 - the text of an unforeseen error may hold a path: it stays in the site's own log
        _log.exception("The site could not answer")
        reason = f"failed with an unforeseen {type(error).__name__}; its own log says more"
        return Answer(wire.write_refusal(wire.Refusal(site, reason)), order)


def _work(agent: SiteAgent, request: wire.Request, *, training: bool, kept: bool) -> RecordDict:
    order = request.order
    if training and order.number < 1:
        raise FederationError("was asked to train no round; the server is not a fedssl server")
    if training:
        if kept:
            update = train_once(agent, order, request.state, request.guide)
        else:
            update = agent.train(order, request.state, **request.guide)
        return wire.write_update(update, order.precision, request.state)
    if order.number == 0:
        agent.check()
        agent.check_start()
        return wire.write_presence(agent.site, {"images": agent.examples})
    return wire.write_column_sums(agent.site, agent.column_sums(order, request.state, request.guide.get("potentials")))


@functools.lru_cache(maxsize=8)
def configuration(overrides: str) -> Config:
    """Compose the configuration that one string of overrides describes."""
    return load(overrides_of(overrides))


@functools.lru_cache(maxsize=32)
def _agent(overrides: str, node_config: tuple[tuple[str, Any], ...]) -> SiteAgent:
    """Build the site's agent once a process. An agent remembers nothing between rounds but what is on its disk."""
    return build_agent(configuration(overrides), dict(node_config))


def forget_sites() -> None:
    """Drop the agents that this process keeps, with their models."""
    _agent.cache_clear()


def _frozen(node_config: NodeConfig) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(node_config.items()))


def _name(node_config: NodeConfig) -> str:
    return str(node_config.get("site", f"node {node_config.get('partition-id', '?')}"))
