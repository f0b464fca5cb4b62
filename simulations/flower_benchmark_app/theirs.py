"""Flower's own FedAvg with the same arrays and sites; it imports nothing of fedssl, as its users would."""

import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from simulations.flower_benchmark_app.arrays import change, examples, make_state
from simulations.flower_benchmark_app.meter import DEADLINE_S, Meter, setting

server = ServerApp()
client = ClientApp()


class _TimedFedAvg(FedAvg):
    def __init__(self, sites: int, meter: Meter) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        self._meter = meter

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        answers = list(replies)
        bytes_up = sum(answer.content.array_records["arrays"].count_bytes() for answer in answers)
        arrays, metrics = super().aggregate_train(server_round, answers)
        assert arrays is not None
        self._meter.round_done(bytes_up, arrays.count_bytes() * len(answers))
        return arrays, metrics


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg and write what it costs."""
    sites, rounds = int(setting(context, "sites")), int(setting(context, "rounds"))
    arrays = ArrayRecord(make_state(float(setting(context, "megabytes"))))
    deadline = time.monotonic() + DEADLINE_S
    while len(list(grid.get_node_ids())) < sites and time.monotonic() < deadline:
        time.sleep(1.0)
    meter = Meter(grid)
    result = _TimedFedAvg(sites, meter).start(grid, arrays, num_rounds=rounds, timeout=DEADLINE_S)
    meter.write(Path(setting(context, "result")), result.arrays.to_torch_state_dict())


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round at once: what was received plus a small change."""
    number = int(str(context.node_config["number"]))
    received = message.content.array_records["arrays"].to_torch_state_dict()
    moved = {name: value + change(number) for name, value in received.items()}
    content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": examples(number)})})
    return Message(content, reply_to=message)
