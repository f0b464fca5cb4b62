"""The site's door: a Flower ClientApp that hands each message to the site's agent and sends its answer back.

At a hospital it is only a relay to the agent behind a Unix socket: it imports nothing that trains or reads images.
"""

import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedssl.errors import FederationError
from fedssl.relay import refusal, relay

app = ClientApp()


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
    kind, overrides = message.metadata.message_type, str(context.run_config.get("overrides", ""))
    if "socket" in context.node_config:
        return _relayed(message, context, {"kind": kind, "overrides": overrides})
    from fedssl.answering import answer

    return Message(answer(kind, overrides, message.content, context.node_config).content, reply_to=message)


def _relayed(message: Message, context: Context, facts: dict[str, str]) -> Message:
    patience_s = max(1.0, message.metadata.created_at + message.metadata.ttl - time.time())
    try:
        content = relay(str(context.node_config["socket"]), facts, message.content, patience_s=patience_s)
    except FederationError as error:
        content = refusal(str(context.node_config.get("site", "site")), str(error))
    return Message(content, reply_to=message)
