"""How much fedssl adds to the bare work: ``python -m simulations.benchmark`` prints two figures with their goals.

1. A training step of fedssl (reading, views, loss, optimiser, telemetry) beside a bare loop of the same model, views
   and loss whose images are already in memory. Goal: at most 1.05.
2. A federation of 8 sites and 2 rounds whose training costs nothing. Goal: under one second.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from fedssl import wire
from fedssl.aggregation.mean import WeightedMean
from fedssl.build import build_method, build_views, optimizer_maker
from fedssl.config import Config, load
from fedssl.data.batches import Batches
from fedssl.data.cache import Subset
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.store import Source, Store
from fedssl.optim import Schedule
from fedssl.training import Round, autocast_for, train_round
from fedssl.update import Update, shared_state
from server.exchange import Plan
from server.rounds import RoundResult, run_rounds
from simulations.grid import InProcessGrid

_IMAGES, _REPEATS = 512, 5


def main() -> None:
    """Print both figures."""
    config = load(["data.root=.", "encoder=resnet18"])
    torch.set_num_threads(config["training"]["threads"])
    ratios = _step_ratios(config)
    print(f"fedssl step / bare step: {statistics.median(ratios):.3f} (goal 1.05; {_REPEATS} pairs: {_list(ratios)})")  # noqa: T201
    seconds = [_overhead() for _ in range(_REPEATS)]
    print(f"8 sites, 2 rounds, no training: {statistics.median(seconds):.3f} s (goal 1; {_list(seconds)})")  # noqa: T201


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _step_ratios(config: Config) -> list[float]:
    """Time fedssl's round and the bare loop in turn on the same images, batches and views."""
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(_random_images(Path(folder), config["data"]["edge"]), 128, 1.0, seed=0)
        _fedssl(config, batches)
        return [_fedssl(config, batches) / _bare(config, batches) for _ in range(_REPEATS)]


def _random_images(folder: Path, edge: int) -> Subset:
    rng = np.random.default_rng(0)
    for number in range(_IMAGES):
        path = folder / "images" / f"p{number // 4}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (edge, edge), dtype=np.uint8)).save(path, compress_level=1)
    store = Store(folder / "store", Source(folder / "images", site="bench"), Decoding(edge)).open()
    return Subset(store, np.arange(_IMAGES))


def _fedssl(config: Config, batches: Batches) -> float:
    """Seconds of one round, without the RankMe sample at its end."""
    method = build_method(config)
    place = Round("bench", 1, 10, 0, Schedule(warmup=0.1))
    autocast = autocast_for(torch.device("cpu"), "float32")
    trained = train_round(
        method, optimizer_maker(config)(method), batches, build_views(config), place, autocast=autocast
    )
    return trained.metrics["seconds"]


def _bare(config: Config, batches: Batches) -> float:
    """Seconds of a plain loop: images in memory, views, loss, backward, step."""
    method, views = build_method(config), build_views(config)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    images = list(batches)
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    for batch in images:
        optimizer.zero_grad()
        method.loss(views(batch, generator)).total.backward()
        optimizer.step()
    return time.perf_counter() - begin


def _overhead() -> float:
    """Seconds of two rounds of eight sites that answer at once with the state of the smallest encoder."""
    state = shared_state(build_method(load(["data.root=.", "encoder=tiny"])))
    counts = torch.ones(len(state["prototypes"]))

    def answer(message: Message, context: Context) -> Message:
        site = str(context.node_config["site"])
        if message.metadata.message_type == "query":
            return Message(wire.write_presence(site, {"images": 1000}), reply_to=message)
        received = wire.read_order(message.content, "bench").state
        update = Update(site, received, 1000, 1, counts, counts, {"loss": 1.0, "images": 1000.0})
        return Message(wire.write_update(update), reply_to=message)

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    begin = time.perf_counter()
    grid = InProcessGrid(answer, {number + 2: {"site": f"s{number}"} for number in range(8)}, {})
    list(run_rounds(grid, RoundResult(0, state), Plan("ab" * 8, 2, "bench", 8, 60.0, 1.0), WeightedMean()))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
