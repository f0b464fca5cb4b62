"""Changes of images at test time, by hand and against torch.rot90."""

import numpy as np
import pytest
import torch

from fedssl.evaluation.robustness import LEVELS, NEUTRAL, changed, mean_drop

_KINDS = sorted(LEVELS)


def _images(edge=16, channels=1, batch=3):
    return torch.rand(batch, channels, edge, edge, generator=torch.Generator().manual_seed(edge))


def _grey(*values, edge=4):
    return torch.tensor(values)[:, None, None, None].expand(len(values), 1, edge, edge).contiguous()


@pytest.mark.parametrize("kind", _KINDS)
def test_the_neutral_level_gives_the_images_themselves(kind):
    images = _images()
    assert changed(images, kind, NEUTRAL[kind]) is images
    assert NEUTRAL[kind] in LEVELS[kind]


@pytest.mark.parametrize("kind", _KINDS)
def test_every_other_level_changes_the_images_and_keeps_shape_type_and_range(kind):
    images = _images(channels=2)
    before = images.clone()
    for level in set(LEVELS[kind]) - {NEUTRAL[kind]}:
        after = changed(images, kind, level)
        assert (after.shape, after.dtype) == (images.shape, images.dtype)
        assert (after - images).abs().max() > 0.05
        assert after.min() >= 0.0
        assert after.max() <= 1.0 + 1e-6
        assert torch.equal(after, changed(images, kind, level))
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", _KINDS)
def test_an_image_is_changed_alike_alone_and_in_a_batch(kind):
    images = _images()
    level = LEVELS[kind][-1]
    together = changed(images, kind, level)
    for row in range(len(images)):
        torch.testing.assert_close(changed(images[row : row + 1], kind, level), together[row : row + 1])


@pytest.mark.parametrize("edge", [8, 9])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_rotation_by_quarters_is_that_of_torch(edge, quarters):
    images = _images(edge, channels=2)
    expected = torch.rot90(images, quarters, (2, 3))
    torch.testing.assert_close(changed(images, "rotation", 90.0 * quarters), expected, atol=1e-5, rtol=0)


def test_two_small_rotations_of_a_smooth_image_are_one_large_one():
    place = torch.linspace(-1, 1, 65)
    blob = torch.exp(-((place[:, None] - 0.2) ** 2 + (place[None] + 0.3) ** 2) / 0.1)[None, None]
    twice = changed(changed(blob, "rotation", 15.0), "rotation", 15.0)
    torch.testing.assert_close(twice, changed(blob, "rotation", 30.0), atol=0.01, rtol=0)


def test_a_constant_image_stays_constant_inside_when_turned_and_its_corners_become_black():
    for level in LEVELS["rotation"][1:]:
        turned = changed(_grey(0.3, 1.0, edge=32), "rotation", level)
        torch.testing.assert_close(turned[:, :, 8:-8, 8:-8], _grey(0.3, 1.0, edge=16))
    assert turned[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs().max() == 0.0


def test_a_scale_of_two_makes_the_middle_twice_as_large():
    images = torch.zeros(1, 1, 8, 8)
    images[:, :, 2:6, 2:6] = 1.0
    line = torch.tensor([0.75, 1, 1, 1, 1, 1, 1, 0.75])  # the outermost pixel looks a quarter into the black
    torch.testing.assert_close(changed(images, "scale", 2.0)[0, 0], line[:, None] * line[None])


def test_a_scale_of_one_half_puts_the_whole_image_into_the_middle_of_a_black_one():
    small = changed(torch.ones(1, 1, 8, 8), "scale", 0.5)[0, 0]
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1.0
    torch.testing.assert_close(small, expected)


@pytest.mark.parametrize("level", LEVELS["gamma"])
def test_gamma_is_a_power_of_the_grey_value(level):
    after = changed(_grey(0.0, 0.25, 1.0), "gamma", level)
    torch.testing.assert_close(after, _grey(0.0, 0.25**level, 1.0))


@pytest.mark.parametrize(
    ("kind", "level", "before", "after"),
    [
        ("contrast", 0.5, (0.0, 0.3, 0.5, 1.0), (0.25, 0.4, 0.5, 0.75)),
        ("contrast", 1.5, (0.0, 0.3, 0.5, 0.9), (0.0, 0.2, 0.5, 1.0)),
        ("brightness", 0.2, (0.0, 0.3, 0.8, 0.9), (0.2, 0.5, 1.0, 1.0)),
        ("brightness", -0.1, (0.0, 0.05, 0.3, 1.0), (0.0, 0.0, 0.2, 0.9)),
    ],
)
def test_contrast_and_brightness_are_those_by_hand(kind, level, before, after):
    torch.testing.assert_close(changed(_grey(*before), kind, level), _grey(*after))


@pytest.mark.parametrize(("kind", "grey", "sign"), [("gamma", 0.4, -1), ("contrast", 0.6, 1), ("brightness", 0.4, 1)])
def test_a_higher_level_changes_a_grey_value_more(kind, grey, sign):
    values = torch.stack([changed(_grey(grey), kind, level).mean() for level in sorted(LEVELS[kind])])
    assert (sign * values.diff() > 0).all()


@pytest.mark.parametrize("kind", ["gamma", "contrast", "brightness"])
def test_grey_values_keep_their_order_at_every_level(kind):
    ramp = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    for level in LEVELS[kind]:
        assert (changed(ramp, kind, level).flatten().diff() >= 0).all()


def test_a_larger_scale_shows_a_larger_object():
    images = torch.zeros(1, 1, 32, 32)
    images[:, :, 12:20, 12:20] = 1.0
    areas = torch.stack([changed(images, "scale", level).sum() for level in LEVELS["scale"]])
    torch.testing.assert_close(areas / 64, torch.tensor(LEVELS["scale"]) ** 2, atol=0.03, rtol=0)


def test_a_change_that_does_not_exist_is_refused():
    with pytest.raises(KeyError):
        changed(_images(), "colour", 1.0)


def test_the_mean_drop_is_that_by_hand_in_every_draw():
    values = {-1.0: np.array([0.7, 0.5]), 0.0: np.array([0.9, 0.6]), 1.0: np.array([0.8, 0.9])}
    np.testing.assert_allclose(mean_drop(values, 0.0), [0.15, -0.1])
    np.testing.assert_allclose(mean_drop(values, 1), [0.0, 0.35])
