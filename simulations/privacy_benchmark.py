"""Time and memory of a private step against a plain one: ``python -m simulations.privacy_benchmark OVERRIDES...``.

Every way runs in a process of its own, on noise: the views of ``privacy.batch`` patients with one image each, the
optimiser's step and, where it is private, votes and noise. ``step`` is the median of five steps after one; ``memory``
is the largest resident memory of the process.
"""

import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from fedssl.build import build_method, build_views, optimizer_maker
from fedssl.config import Config, load
from fedssl.data.batches import ViewBatch
from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.choice import ENGINES
from fedssl.privacy.mechanism import released
from fedssl.training import autocast_for

PLAIN = "plain"
_STEPS = 5


def main(overrides: Sequence[str]) -> None:
    """Measure every way and print a table."""
    settings = ["data.root=.", "privacy=patient", "privacy.batch=32", "augment.crops.local.count=0", *overrides]
    print("| way | step (s) | patients / s | against plain | memory (GB) | against plain |")  # noqa: T201 - a script
    print("|---|---|---|---|---|---|")  # noqa: T201
    plain: tuple[float, float] | None = None
    for way in (PLAIN, *ENGINES):
        seconds, memory = _measured(settings, way)
        plain = plain or (seconds, memory)
        patients = load(settings)["privacy"]["batch"] / seconds
        ratios = seconds / plain[0], memory / plain[1]
        print(f"| {way} | {seconds:.2f} | {patients:.1f} | {ratios[0]:.2f} | {memory:.2f} | {ratios[1]:.2f} |")  # noqa: T201


def _measured(settings: Sequence[str], way: str) -> tuple[float, float]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(there, list(settings), way))
    process.start()
    there.close()
    with contextlib.closing(here):
        found: tuple[float, float] = here.recv()
    process.join()
    return found


def _run(answer: Connection, settings: list[str], way: str) -> None:
    config = load(settings)
    torch.set_num_threads(config["training"]["threads"])
    method = build_method(config)
    assert isinstance(method, SeparableMethod)
    seconds = []
    step = _plain_step(config, method) if way == PLAIN else _private_step(config, method, way)
    for _ in range(_STEPS + 1):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
    answer.send((statistics.median(seconds[1:]), memory))


def _views(config: Config, rows: int, device: torch.device) -> list[Tensor]:
    channels = config["encoder"]["in_chans"]
    sizes = [scale.edge for scale in build_views(config).scales for _ in range(scale.count)]
    return [torch.randn(rows, channels, edge, edge, device=device) for edge in sizes]


def _plain_step(config: Config, method: SeparableMethod) -> Callable[[], None]:
    device = next(method.parameters()).device
    optimizer, autocast = optimizer_maker(config)(method), autocast_for(device, config["training"]["precision"])
    nothing = torch.zeros(config["privacy"]["batch"], dtype=torch.long, device=device)
    batch = ViewBatch(_views(config, len(nothing), device), nothing.repeat(2, 1), nothing)

    def step() -> None:
        with autocast():
            total = method.loss(batch).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        method.after_step()

    return step


def _private_step(config: Config, method: SeparableMethod, way: str) -> Callable[[], None]:
    device = next(method.parameters()).device
    optimizer = optimizer_maker(config)(method)
    engine = ENGINES[way](method, autocast_for(device, config["training"]["precision"]))
    units = [_views(config, 1, device) for _ in range(config["privacy"]["batch"])]

    def step() -> None:
        engine.see(units)
        method.take_votes(released(engine.votes(), bound=method.vote_bound, sigma=1.0) / len(units))
        total = engine.gradients(1.0).total
        for parameter, part in zip(engine.parameters, total, strict=True):
            parameter.grad = released(part, bound=1.0, sigma=1.0).div_(len(units))
        optimizer.step()
        method.after_step()

    return step


if __name__ == "__main__":
    main(sys.argv[1:])
