"""fedssl's loop with sites that answer at once."""

from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedssl import progress, wire
from fedssl.aggregation.mean import WeightedMean
from fedssl.update import Update
from server.exchange import Plan
from server.rounds import RoundResult, run_rounds
from simulations.flower_benchmark_app.arrays import change, examples, make_state
from simulations.flower_benchmark_app.meter import DEADLINE_S, Meter, setting

_FINGERPRINT = "benchmark"

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write what they cost."""
    sites, rounds = int(setting(context, "sites")), int(setting(context, "rounds"))
    megabytes = float(setting(context, "megabytes"))
    plan = Plan(
        "ab" * 8, rounds, _FINGERPRINT, sites, DEADLINE_S, DEADLINE_S, precision=setting(context, "precision")
    )  # fmt: skip
    meter = Meter(grid)
    stop = progress.listen(lambda event: print(event, flush=True))  # noqa: T201 - a script
    for result in run_rounds(grid, RoundResult(0, make_state(megabytes)), plan, WeightedMean()):
        meter.round_done(result.bytes_up, result.bytes_down)
    stop()
    meter.write(Path(setting(context, "result")), result.state)


@client.query()
def present(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    number = int(str(context.node_config["number"]))
    return Message(wire.write_presence(f"s{number}", {"images": examples(number)}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round at once: what was received plus a small change."""
    number = int(str(context.node_config["number"]))
    request = wire.read_order(message.content, _FINGERPRINT)
    prototypes = len(request.state["prototypes"])
    counts = torch.full((prototypes,), examples(number) / prototypes)
    moved = {name: value + change(number) for name, value in request.state.items()}
    metrics = {"loss": 1.0, "images": float(examples(number))}
    update = Update(f"s{number}", moved, examples(number), 1, counts, counts, metrics)
    return Message(wire.write_update(update, request.order.precision, request.state), reply_to=message)
