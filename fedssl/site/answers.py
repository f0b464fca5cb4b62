"""The same question gets the same answer: a hospital's agent that was asked again does not train again."""

from collections.abc import Mapping

from torch import Tensor

from fedssl.order import Order
from fedssl.site.agent import SiteAgent
from fedssl.update import Update, state_digest


def train_once(agent: SiteAgent, order: Order, state: Mapping[str, Tensor], guide: Mapping[str, Tensor]) -> Update:
    """Train a round, or give the answer that was kept for the same question.

    A relay, a node or a server that was killed asks again; so does a server that was started again.

    Args:
        agent: of the site.
        order: which round of which run.
        state: the shared state.
        guide: as of ``SiteAgent.train``.

    Raises:
        DataError: as of ``SiteAgent.train``, or the kept answer is damaged.
    """
    received = state_digest({**state, **{f"guide/{name}": value for name, value in guide.items()}})
    update = agent.memory.recall_answer(order, received)
    if update is None:
        update = agent.train(order, state, **guide)
        agent.memory.keep_answer(order, received, update)
    return update
