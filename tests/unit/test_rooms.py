"""How many functions a setting passes through from its YAML to the equation that uses it."""

import sys
from pathlib import Path

import pytest
import torch

from fedssl.build import build_method
from fedssl.config import load
from fedssl.data.batches import ViewBatch

_SMALL = ["data.root=.", "encoder=tiny", "heads.hidden=16", "heads.width=8"]
_ODD = 0.31415  # no other setting has this value


def _rooms(overrides, value):
    """Every function of fedssl that is handed ``value`` as an argument while a method is built and computes a loss."""
    rooms = set()

    def watch(frame, event, _):
        if event != "call" or "/fedssl/" not in frame.f_code.co_filename:
            return
        file = Path(frame.f_code.co_filename)
        if file.stem not in {"config", "build"}:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
            handed = [frame.f_locals.get(name) for name in names]
            if any(type(item) is type(value) and item == value for item in handed):
                rooms.add(f"{file.stem}.{frame.f_code.co_qualname}")

    sys.setprofile(watch)
    try:
        method = build_method(load([*_SMALL, *overrides]))
        views = [torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        method.loss(ViewBatch(views, torch.zeros(2, 8, dtype=torch.long), torch.full((8,), -1)))
    finally:
        sys.setprofile(None)
    return rooms


@pytest.mark.parametrize(
    ("method", "setting", "loss"),
    [
        ("simclr", "temperature", "contrastive.nt_xent"),
        ("moco", "temperature", "moco.info_nce"),
        ("relic", "temperature", "relic.log_similarity"),
        ("contrastive_clustering", "contrastive_temperature", "contrastive.nt_xent"),
        ("contrastive_clustering", "clustering_temperature", "prototypes.swapped_prediction"),
        ("swav", "temperature", "prototypes.swapped_prediction"),
    ],
)
def test_a_temperature_passes_two_rooms_the_method_and_the_loss(method, setting, loss):
    rooms = _rooms([f"method={method}", "heads.num_prototypes=8", f"method.{setting}={_ODD}"], _ODD)
    rooms -= {"prototypes.assignment_mass", "prototypes.observe"}  # telemetry, handed the same value
    assert loss in rooms
    assert len(rooms) == 2
    assert {room.split(".")[0] for room in rooms} == {method, loss.split(".")[0]}


@pytest.mark.parametrize("method", ["contrastive_clustering", "swav"])
def test_the_number_of_prototypes_passes_at_most_three_rooms(method):
    rooms = _rooms([f"method={method}", "heads.num_prototypes=37"], 37)
    assert any(room.endswith("__init__") for room in rooms)
    assert len(rooms) <= 3
