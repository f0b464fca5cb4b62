"""A Flower Grid inside one process: the real ServerApp's messages go straight to the real ClientApp.

Flower's own simulation engine needs Ray and some ten seconds for two rounds; this one needs neither. A site trains when
its answer is pulled. Messages are those that a SuperLink would carry.
"""

from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1


class SimulatedGrid(Grid):
    """What the grids of simulations have in common: there is one run, and a message is only made."""

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The only run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class InProcessGrid(SimulatedGrid):
    """Carries messages to simulated nodes.

    Args:
        client_app: answers every message.
        nodes: node configuration by node id.
        run_config: the run's configuration, the same for all.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        nodes: Mapping[int, Mapping[str, int | str]],
        run_config: Mapping[str, str],
    ) -> None:
        self._client_app = client_app
        self._contexts = {
            node: Context(RUN_ID, node, dict(node_config), RecordDict(), dict(run_config))
            for node, node_config in nodes.items()
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0

    def get_node_ids(self) -> Iterable[int]:
        """Give the ids of the simulated nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in; give their ids."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._waiting[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes answer these messages now."""
        answers = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                answers.append(self._client_app(message, self._contexts[message.metadata.dst_node_id]))
        return answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull at once."""
        del timeout
        return self.pull_messages(self.push_messages(messages))


def run_in_process(server_app: ServerApp, client_app: ClientApp, *, sites: int, overrides: str) -> None:
    """Run a whole federation in this process.

    Args:
        server_app: the server's door.
        client_app: the sites' door.
        sites: number of simulated nodes; node i gets ``partition-id`` i.
        overrides: the run configuration's overrides.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE
    nodes: dict[int, Mapping[str, int | str]] = {
        number + 2: {"partition-id": number, "num-partitions": sites} for number in range(sites)
    }
    run_config = {"overrides": overrides}
    grid = InProcessGrid(client_app, nodes, run_config)
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))
