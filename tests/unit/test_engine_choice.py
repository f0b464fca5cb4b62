"""How an engine is chosen: measured on noise, never on patients, and only if it gives the loop's sum."""

import math
import time

import pytest
import torch
from private_parts import PLAIN, byol, clustering
from test_private_engines import flat, vit
from torch import nn

from fedssl.augment import make_views
from fedssl.errors import ConfigError
from fedssl.methods.byol import BYOL
from fedssl.privacy.engines import choice
from fedssl.privacy.engines.choice import ENGINES, choose_engine
from fedssl.privacy.engines.ghost import Ghost
from fedssl.privacy.engines.loop import Loop
from fedssl.progress import Note

VIEWS = make_views(crops={"global": {"count": 2, "edge": 32, "area": [0.5, 1.0]},
                          "local": {"count": 1, "edge": 16, "area": [0.1, 0.5]}})  # fmt: skip


class Scaled(nn.Module):
    """A module with a direct parameter."""

    def __init__(self):
        super().__init__()
        self.num_features, self.scale = 1024, nn.Parameter(torch.ones(1024))

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 32).flatten(1) * self.scale


class Standardised(nn.Conv2d):
    """Another computation than its base class, as timm's StdConv2d."""

    def forward(self, images):
        return nn.functional.conv2d(images, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


def strange(encoder):
    return BYOL(encoder, hidden=32, width=16, momentum=0.9, norm="layer")


def standardised():
    method = byol()
    old = method.encoder.conv1[0] if isinstance(method.encoder.conv1, nn.Sequential) else method.encoder.conv1
    new = Standardised(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    parent = next(part for part in method.encoder.modules() if old in part.children())
    setattr(parent, next(name for name, part in parent.named_children() if part is old), new)
    return method


def choose(name, method):
    return choose_engine(name, method, VIEWS, PLAIN, images=2, in_chans=1)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_asked_for_by_name_is_taken_without_measuring(name, heard):
    assert type(choose(name, clustering())) is ENGINES[name]
    assert heard == []


@pytest.mark.parametrize("name", ["hooks", "", "Loop"])
def test_an_unknown_engine_is_refused_with_those_that_exist(name):
    with pytest.raises(ConfigError, match=rf"privacy\.engine={name} does not exist; there are auto, loop, vmap, ghost"):
        choose(name, clustering())


@pytest.mark.parametrize("make", [vit, lambda: strange(Scaled()), standardised])
def test_ghost_is_refused_where_it_does_not_know_a_layer_and_auto_leaves_it_out(make, heard):
    method = make()
    with pytest.raises(ConfigError, match=r"ghost does not know a layer.*privacy\.engine=auto, loop or vmap"):
        choose("ghost", method)
    assert type(choose("auto", method)) is not Ghost
    assert "ghost" not in heard[-1].text


def shared_parameter():
    method = clustering()
    method.projector[0].weight = method.projector[3].weight = nn.Parameter(torch.randn(32, 32) / 6)
    return method


def circular():
    method = clustering()
    next(layer for layer in method.modules() if isinstance(layer, nn.Conv2d)).padding_mode = "circular"
    return method


@pytest.mark.parametrize("make", [shared_parameter, circular])
def test_ghost_is_not_for_layers_that_opacus_would_take_for_others(make):
    assert not Ghost.fits(make())


def test_an_engine_that_gives_another_sum_than_the_loop_is_left_out(monkeypatch, heard):
    class Wrong(Loop):
        def gradients(self, clip):
            return super().gradients(2 * clip)

    monkeypatch.setattr(choice, "ENGINES", {"loop": Loop, "wrong": Wrong})
    assert type(choose("auto", clustering())) is Loop
    assert "wrong" not in heard[-1].text
    with pytest.raises(ConfigError, match="does not give the loop's gradients"):
        choose("wrong", clustering())


def test_auto_measures_all_engines_on_noise_and_says_which_it_takes_and_why(heard):
    method = clustering()
    before = flat(method.parameters()).clone()
    chosen = choose("auto", method)
    (note,) = heard
    assert isinstance(note, Note)
    speeds = {name: float(note.text.split(f"{name} ")[-1].split(")")[0].split(",")[0]) for name in ENGINES}
    best = max(speeds, key=speeds.get)
    assert f"engine {best}, the fastest here" in note.text
    assert type(chosen) is ENGINES[best]
    assert torch.equal(flat(method.parameters()), before)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_what_is_measured_is_noise_of_the_views_sizes_and_the_fastest_that_works_wins(monkeypatch, heard):
    shown = []

    class Watched(Loop):
        def see(self, units):
            shown.append(units)
            super().see(units)

    class Slow(Loop):
        def gradients(self, clip):
            time.sleep(0.5)
            return super().gradients(clip)

    class Broken(Loop):
        def gradients(self, clip):
            raise RuntimeError("vmap: not possible")

    monkeypatch.setattr(choice, "ENGINES", {"slow": Slow, "loop": Watched, "broken": Broken})
    engine = choose("auto", clustering())
    assert type(engine) is Watched
    assert engine.units == []
    assert "engine loop, " in heard[-1].text
    assert "broken" not in heard[-1].text
    seen = [unit for units in shown for unit in units]
    shapes = {tuple(view.shape for view in unit) for unit in seen}
    assert shapes == {tuple((images, 1, edge, edge) for edge in (32, 32, 16)) for images in (1, 2)}
    values = torch.cat([view.flatten() for unit in seen for view in unit])
    assert abs(float(values.mean())) < 6.0 / math.sqrt(len(values))
    assert float(values.std()) == pytest.approx(1.0, abs=6.0 / math.sqrt(2.0 * len(values)))
    assert shown[-1] == []  # and it is forgotten
