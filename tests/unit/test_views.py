"""Views: crops of any scale, pairs of images, changes by modality, and the presets of configs/augment."""

import pytest
import torch
from torch.nn import functional as F

from fedssl import augment, build, config
from fedssl.augment import Changes, Crops, Views, make_views
from fedssl.data.batches import UNLABELLED, ImageBatch
from fedssl.data.modality import CT, MODALITIES, MR, OTHER, RADIOGRAPHY, ULTRASOUND
from fedssl.errors import ConfigError

_PRESETS = sorted(path.stem for path in (config.CONFIG_FOLDER / "augment").glob("*.yaml"))
_SMALL = ["augment.crops.global.edge=32", "augment.crops.local.edge=16", "data.root=."]
_ALL = {
    "rotation": 15.0, "flip": True, "energy": 0.3, "gamma": 0.4, "contrast": 0.4, "brightness": 0.1, "blur": 1.0,
    "noise": 0.05, "ct_windows": 0.5, "ct_jitter": 0.1,
}  # fmt: skip


def _scale(count, edge, area=(0.3, 1.0)):
    return {"count": count, "edge": edge, "area": list(area)}


def _views(**changed):
    crops = {"global": _scale(2, 32), "local": _scale(1, 16, (0.1, 0.3))}
    return make_views(crops=crops, **(_ALL | changed))


def _batch(images, *, modality=None, label=None, partner=None, hounsfield=None):
    black, white = torch.zeros(len(images), 1, 1, 1), torch.ones(len(images), 1, 1, 1)
    groups, labels = (None if numbers is None else torch.as_tensor(numbers) for numbers in (modality, label))
    return ImageBatch(images, black, white, hounsfield, groups, labels, partner=partner)


def _images(batch=4, edge=40, seed=0):
    return torch.rand(batch, 1, edge, edge, generator=torch.Generator().manual_seed(seed))


def _ramps(batch, edge=64):
    """Brighter from left to right."""
    return torch.linspace(0.1, 0.9, edge).expand(batch, 1, edge, edge).contiguous()


def _constants(*values, edge=64):
    return torch.tensor(values)[:, None, None, None].expand(len(values), 1, edge, edge).contiguous()


def _mirrored(view):
    """[batch] the ramp goes down; looks at the middle, where no corner is empty."""
    edge = view.shape[-1]
    middle = view[:, :, edge // 4 : -edge // 4, edge // 4 : -edge // 4]
    return middle.diff(dim=3).mean((1, 2, 3)) < 0


def _straight(view):
    """[batch] the columns of the ramp still stand upright."""
    return view.diff(dim=2).abs().amax((1, 2, 3)) < 1e-4


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_crop_of_the_whole_image_without_rotation_or_flip_is_the_image():
    images = F.interpolate(_images(edge=8), size=32, mode="bilinear")
    whole = augment.random_crops(images, _seeded(), edge=32, area=(1.0, 1.0), rotation=0.0, flip=False)
    inner = [pictures[:, 0, 8:24, 8:24].flatten(1) for pictures in (images, whole)]
    alike = torch.corrcoef(torch.cat(inner))[:4, 4:]  # below 1: the aspect ratio squeezes one side
    assert alike.diag().min() > 0.9
    assert alike.argmax(1).tolist() == [0, 1, 2, 3]


def test_crops_lie_anywhere_in_the_image_and_have_the_area_asked_for():
    places = torch.cat([_ramps(400), _ramps(400).mT], 1)
    crops = augment.random_crops(places, _seeded(), edge=16, area=(0.1, 0.2), rotation=0.0, flip=False)
    low, high = (limit(crops, (2, 3)).sub(0.1).div(0.8) for limit in (torch.amin, torch.amax))
    assert (low.amin(0) < 0.02).all()
    assert (high.amax(0) > 0.98).all()
    area = ((high - low) * 16 / 15).prod(1)  # from the first to the last of 16 pixels
    assert 0.09 < area.min() < 0.11
    assert 0.19 < area.max() < 0.21


def test_a_flip_mirrors_half_of_the_images():
    crops = augment.random_crops(_ramps(400), _seeded(1), edge=8, area=(0.5, 0.5), rotation=0.0, flip=True)
    assert _mirrored(crops).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_a_rotated_crop_is_a_rectangle_turned_either_way_up_to_the_angle_asked_for():
    places = torch.cat([_ramps(400), _ramps(400).mT], 1)  # each pixel holds its own x and y
    crops = augment.random_crops(places, _seeded(2), edge=16, area=(0.2, 0.2), rotation=30.0, flip=False)
    right, down = (crops[:, :, 5:-5, 5:-5].diff(dim=dim).mean((2, 3)) for dim in (3, 2))
    angle = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
    assert -30.1 < angle.min() < -28
    assert 28 < angle.max() < 30.1
    assert F.cosine_similarity(right, down).abs().max() < 1e-3


def test_what_lies_outside_of_the_image_is_black():
    white = torch.ones(50, 1, 64, 64)
    crops = augment.random_crops(white, _seeded(), edge=32, area=(1.0, 1.0), rotation=0.0, flip=False)
    assert crops.min() == 1.0
    turned = augment.random_crops(white, _seeded(), edge=32, area=(1.0, 1.0), rotation=45.0, flip=False)
    assert turned[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].min() == 0.0
    assert turned[:, :, 16, 16].min() == 1.0


def test_a_constant_image_stays_finite_through_all_changes():
    for view in _views()(_batch(_constants(0.0, 0.5, 1.0, edge=40)), _seeded()).views:
        assert torch.isfinite(view).all()


def test_views_are_equal_for_a_seed_and_no_two_of_them_are_the_same():
    global_state = torch.get_rng_state()
    first, second = (_views()(_batch(_images()), _seeded(7)).views for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), global_state)


def test_views_of_an_image_do_not_depend_on_its_neighbours_in_the_batch():
    images = _images()
    changed = images.clone()
    changed[1:] = 0
    first, second = (_views()(_batch(batch), _seeded(7)).views for batch in (images, changed))
    torch.testing.assert_close(first[0][0], second[0][0])


@pytest.mark.parametrize(
    ("scales", "edges"),
    [
        ({"global": _scale(2, 24)}, [24, 24]),
        ({"global": _scale(2, 24), "local": _scale(0, 8)}, [24, 24]),
        ({"local": _scale(3, 8), "global": _scale(2, 24)}, [24, 24, 8, 8, 8]),
        ({"tiny": _scale(1, 8), "global": _scale(3, 24), "medium": _scale(2, 16)}, [24, 24, 24, 8, 16, 16]),
        ({"global": _scale(2, 8), "large": _scale(1, 48)}, [8, 8, 48]),
    ],
)
def test_there_are_as_many_views_of_each_scale_as_asked_for_and_the_global_ones_come_first(scales, edges):
    views = make_views(crops=scales)
    made = views(_batch(_images(3)), _seeded()).views
    assert [tuple(view.shape) for view in made] == [(3, 1, edge, edge) for edge in edges]
    assert views.edge == edges[0]


@pytest.mark.parametrize(("change", "strength"), _ALL.items())
def test_each_change_alone_changes_views(change, strength):
    batch = _batch(_images(), hounsfield=torch.ones(4, 1, 1, 1, dtype=torch.bool))
    crops = {"global": _scale(2, 24)}
    plain, changed = (make_views(crops=crops, **own)(batch, _seeded()) for own in ({}, {change: strength}))
    assert not torch.allclose(plain.views[0], changed.views[0], atol=1e-3)


def test_views_zero_two_four_show_the_image_and_the_others_its_partner():
    partner = _batch(_constants(0.7, 0.9), modality=[MR, CT])
    views = Views([Crops(3, 16, (0.3, 1.0)), Crops(3, 8, (0.2, 0.3))], Changes())
    made = views(_batch(_constants(0.2, 0.4), modality=[CT, MR], partner=partner), _seeded())
    for number, view in enumerate(made.views):
        expected = _constants(*((0.7, 0.9) if number % 2 else (0.2, 0.4)), edge=view.shape[-1])
        torch.testing.assert_close(view, augment.standardise(expected), atol=1e-4, rtol=0)
    assert made.modality.tolist() == [[CT, MR], [MR, CT]]


def test_labels_and_modality_travel_with_the_views():
    made = _views()(_batch(_images(3), modality=[CT, OTHER, MR], label=[2, UNLABELLED, 0]), _seeded())
    assert made.label.tolist() == [2, UNLABELLED, 0]
    assert made.modality.tolist() == [[CT, OTHER, MR]] * 2
    unknown = _views()(_batch(_images(3)), _seeded())
    assert (unknown.label.tolist(), unknown.modality.tolist()) == ([UNLABELLED] * 3, [[OTHER] * 3] * 2)


def _by_modality(**scales):
    own = {"ultrasound": {"flip": True}, "radiography": {"rotation": 45.0}}
    return make_views(crops={"global": _scale(2, 16, (0.2, 0.4)), **scales}, modalities=own)


def test_images_of_each_modality_have_their_own_changes_and_those_of_the_others_the_default():
    group = torch.arange(300) % len(MODALITIES)
    view = _by_modality()(_batch(_ramps(300), modality=group), _seeded()).views[0]
    mirrored, straight = ([test(view)[group == g].float().mean() for g in range(5)] for test in (_mirrored, _straight))
    assert 0.35 < mirrored[ULTRASOUND] < 0.65
    assert straight[RADIOGRAPHY] < 0.05
    assert [g for g in range(5) if mirrored[g] > 0] == [ULTRASOUND]
    assert [g for g in range(5) if straight[g] < 1] == [RADIOGRAPHY]
    assert _straight(_by_modality()(_batch(_ramps(60)), _seeded()).views[0]).all()  # of a modality that is not known


def test_a_view_of_a_partner_has_the_changes_of_the_partners_modality():
    partner = _batch(_ramps(60), modality=[ULTRASOUND] * 60)
    made = _by_modality()(_batch(_ramps(60), modality=[CT] * 60, partner=partner), _seeded()).views
    assert not _mirrored(made[0]).any()
    assert 0.3 < _mirrored(made[1]).float().mean() < 0.7


def test_every_image_of_a_mixed_batch_keeps_its_row():
    values = torch.linspace(0.1, 0.9, 20).tolist()
    made = _by_modality(local=_scale(1, 8))(_batch(_constants(*values), modality=[3, 0, 1, 2, 4] * 4), _seeded())
    for view in made.views:
        shown = view[:, 0, view.shape[-1] // 2, view.shape[-1] // 2] * 0.25 + 0.25
        torch.testing.assert_close(shown, torch.tensor(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", _PRESETS)
def test_every_preset_makes_finite_views_of_a_mixed_batch(preset):
    is_ct = torch.tensor([True, False, True, False])[:, None, None, None]
    values = torch.where(is_ct, (_images() * 2000.0 + 24.0) / 4096.0, _images())
    batch = _batch(values, modality=[CT, MR, CT, OTHER], hounsfield=is_ct)
    made = build.build_views(config.load([*_SMALL, f"augment={preset}"]))(batch, _seeded())
    assert [tuple(view.shape) for view in made.views] == [(4, 1, 32, 32)] * 2 + [(4, 1, 16, 16)] * 2
    assert all(torch.isfinite(view).all() and (view.std((1, 2, 3)) > 0).all() for view in made.views)


_SIDELESS = {  # of each preset, the modalities whose images may be mirrored
    "default": set(range(5)), "ultrasound": set(range(5)), "radiography": set(), "ct": set(), "mr": set(),
    "by_modality": {ULTRASOUND, OTHER},
}  # fmt: skip


@pytest.mark.parametrize("preset", _PRESETS)
def test_no_preset_mirrors_images_whose_anatomy_has_sides(preset):
    group = torch.arange(200) % len(MODALITIES)
    views = build.build_views(config.load([*_SMALL, f"augment={preset}"]))
    mirrored = _mirrored(views(_batch(_ramps(200), modality=group), _seeded()).views[0])
    assert set(group[mirrored].tolist()) == _SIDELESS[preset]


def test_another_scale_is_added_on_the_command_line():
    views = build.build_views(config.load([*_SMALL, "+augment.crops.medium={count: 2, edge: 24, area: [0.2, 0.5]}"]))
    made = views(_batch(_images()), _seeded()).views
    assert [view.shape[-1] for view in made] == [32, 32, 16, 16, 24, 24]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("augment.crops.global.count=1", r"augment\.crops\.global\.count must be at least 2: views are compared"),
        ("+augment.modalities.xray={flip: true}", r"augment\.modalities\.xray does not exist; there are radiography"),
        ("+augment.modalities.ct={gama: 0.2}", "gama"),
    ],
)
def test_views_that_cannot_be_made_are_refused_with_the_setting_named(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build.build_views(config.load([*_SMALL, override]))


def test_crops_without_a_global_scale_are_refused():
    with pytest.raises(ConfigError, match="global"):
        make_views(crops={"local": _scale(2, 16)})
