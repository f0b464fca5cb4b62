"""The site's door: a Flower ClientApp that hands each message to the site's agent and sends its answer back."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedssl import wire
from fedssl.build_site import build_agent
from fedssl.config import fingerprint, load, overrides_of
from fedssl.errors import FedsslError
from fedssl.site.agent import SiteAgent

app = ClientApp()
_log = logging.getLogger(__name__)


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Say who is here, or why this site cannot take part."""
    return _answer(message, context)


@app.query("marginals")
def column_sums(message: Message, context: Context) -> Message:
    """Answer one iteration of federated Sinkhorn."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    site = _name(context.node_config)
    try:
        agent, expected = _agent(str(context.run_config.get("overrides", "")), _frozen(context.node_config))
        site = agent.site
        content = _work(agent, expected, message)
    except FedsslError as error:
        content = wire.write_refusal(wire.Refusal(site, str(error)))
    except Exception as error:  # noqa: BLE001 - the text of an unforeseen error may hold a path: it stays in the site's own log
        _log.exception("The site could not answer")
        reason = f"failed with an unforeseen {type(error).__name__}; its own log says more"
        content = wire.write_refusal(wire.Refusal(site, reason))
    return Message(content, reply_to=message)


def _work(agent: SiteAgent, expected: str, message: Message) -> RecordDict:
    request = wire.read_order(message.content, expected)
    order = request.order
    if message.metadata.message_type == MessageType.TRAIN:
        update = agent.train(order, request.state, **request.guide)
        return wire.write_update(update, order.precision, request.state)
    if order.number == 0:
        agent.check()
        agent.check_start()
        return wire.write_presence(agent.site, {"images": agent.examples})
    return wire.write_column_sums(agent.site, agent.column_sums(order, request.state, request.guide.get("potentials")))


@functools.lru_cache(maxsize=32)
def _agent(overrides: str, node_config: tuple[tuple[str, Any], ...]) -> tuple[SiteAgent, str]:
    """Build the site's agent once a process. An agent remembers nothing between rounds but what is on its disk."""
    config = load(overrides_of(overrides))
    return build_agent(config, dict(node_config)), fingerprint(config)


def forget_sites() -> None:
    """Drop the agents that this process keeps, with their models."""
    _agent.cache_clear()


def _frozen(node_config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(node_config.items()))


def _name(node_config: Mapping[str, Any]) -> str:
    return str(node_config.get("site", f"node {node_config.get('partition-id', '?')}"))
