"""``fedssl privacy plan``: from a configuration to what its private sites can expect."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fedssl.build import build_method, build_views, check_settings, first_state
from fedssl.build_privacy import build_mechanism, check_privacy, planned_steps
from fedssl.config import Config, load
from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.choice import choose_engine
from fedssl.privacy.plan import measure, outlook, warnings_of
from fedssl.training import autocast_for

_OTHERS = (8.0, 3.0, 1.0)


def plan_privacy(overrides: Sequence[str]) -> dict[str, Any]:
    """Work out the plan of every size of site that the run names, and measure what a round takes here.

    Args:
        overrides: as on the command line; ``privacy=patient`` is added.

    Raises:
        ConfigError: the run's guarantee would not be true, or no useful noise keeps the budget.
    """
    given = {text.split("=", 1)[0] for text in overrides}
    added = [text for text in ("data.root=.", "privacy=patient") if text.split("=", 1)[0] not in given]
    config = load([*added, *overrides])
    check_privacy(config, check_settings(config))
    stated = config["privacy"]["patients"]
    sizes = sorted(set(stated.values()) if isinstance(stated, Mapping) else {stated}, reverse=True)
    torch.set_num_threads(config["training"]["threads"])
    method = build_method(config)
    assert isinstance(method, SeparableMethod)
    first_state(config, method)
    rows = [_row(config, method, patients, epsilon) for patients in sizes for epsilon in _epsilons(config)]
    return {"rows": rows, "cost": _cost(config, method, sizes[0]), "warnings": _warnings(config, method, sizes)}


def _epsilons(config: Config) -> list[float]:
    own = float(config["privacy"]["epsilon"])
    return [own, *(epsilon for epsilon in _OTHERS if epsilon != own)]


def _with(config: Config, patients: int, epsilon: float) -> Config:
    return {**config, "privacy": {**config["privacy"], "patients": patients, "epsilon": epsilon}}


def _outlook(config: Config, method: SeparableMethod) -> Any:  # noqa: ANN401 - an Outlook
    return outlook(
        build_mechanism(config, ""), delta=config["privacy"]["delta"], steps=planned_steps(config),
        parameters=sum(value.numel() for value in method.parameters() if value.requires_grad),
        votes=method.num_prototypes, bound=method.vote_bound,
    )  # fmt: skip


def _row(config: Config, method: SeparableMethod, patients: int, epsilon: float) -> dict[str, Any]:
    config = _with(config, patients, epsilon)
    found, mechanism = _outlook(config, method), build_mechanism(config, "")
    return {
        "patients": patients,
        "planned_epsilon": epsilon,
        "rate": mechanism.rate,
        "steps": planned_steps(config),
    } | asdict(found)


def _cost(config: Config, method: SeparableMethod, patients: int) -> dict[str, float]:
    mechanism, views = (
        build_mechanism(_with(config, patients, float(config["privacy"]["epsilon"])), ""),
        build_views(config),
    )
    device = next(method.parameters()).device
    engine = choose_engine(
        config["privacy"]["engine"], method, views, autocast_for(device, config["training"]["precision"]),
        images=mechanism.images, in_chans=config["encoder"]["in_chans"],
    )  # fmt: skip
    cost = measure(engine, views, mechanism, in_chans=config["encoder"]["in_chans"])
    return {**asdict(cost), "run_s": cost.round_s * config["federation"]["rounds"]}


def _warnings(config: Config, method: SeparableMethod, sizes: Sequence[int]) -> list[str]:
    own, told = float(config["privacy"]["epsilon"]), []
    for patients in sizes:
        sized = _with(config, patients, own)
        found = warnings_of(
            _outlook(sized, method), build_mechanism(sized, ""), patients=patients,
            public_start=bool(config["encoder"]["weights"]),
        )  # fmt: skip
        told += [f"{patients} patients, epsilon {own:g}: {text}" for text in found]
    return told
