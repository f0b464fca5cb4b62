"""What every change of grey values keeps, for any images and any strength."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fedssl import intensity
from fedssl.data.batches import ImageBatch

_any = settings(deadline=None, max_examples=25, derandomize=True)
SEEDS = st.integers(0, 2**31)
_BANDS = len(intensity.BAND_SIGMAS)
_CHANGES = {
    "energy": lambda images, generator, strength: intensity.energy(images, generator, strength=strength),
    "gamma": lambda images, generator, strength: intensity.gamma(images, generator, strength=strength),
    "linear_intensity": lambda images, generator, strength: intensity.linear_intensity(
        images, generator, contrast=strength, brightness=strength
    ),
    "blur": lambda images, generator, strength: intensity.blur(images, generator, sigma=strength),
    "noise": lambda images, generator, strength: intensity.noise(images, generator, sigma=strength),
}


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(seed, batch=3, rows=24, columns=None):
    return torch.rand(batch, 1, rows, columns or rows, generator=_seeded(seed))


def _smoothed_by_hand(image, sigma):
    """Weigh all pixels of a picture for each of its pixels."""
    rows, columns = image.shape
    result = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            total = weights = 0.0
            for i in range(rows):
                for j in range(columns):
                    weight = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                    total, weights = total + weight * image[i, j], weights + weight
            result[row, column] = total / weights
    return result


def _hounsfield(units, centre=40.0, width=400.0):
    """CT with its own window, as the cache stores it."""
    low, high = (torch.full((len(units), 1, 1, 1), (centre + side * width / 2 + 1024) / 4096) for side in (-1, 1))
    return ImageBatch((units + 1024) / 4096, low, high, torch.ones(len(units), 1, 1, 1, dtype=torch.bool))


@_any
@given(SEEDS)
def test_energy_gains_of_one_give_the_image_back(seed):
    images = _images(seed)
    torch.testing.assert_close(intensity.rescale_bands(images, torch.ones(3, _BANDS)), images, rtol=0, atol=1e-6)


@_any
@given(SEEDS, st.floats(0.2, 5.0), st.integers(0, _BANDS - 1))
def test_one_energy_gain_multiplies_the_standard_deviation_of_its_band_and_leaves_the_rest(seed, gain, number):
    images, gains = _images(seed), torch.ones(3, _BANDS)
    gains[:, number] = gain
    band = intensity.energy_bands(images)[0][number]
    changed = intensity.rescale_bands(images, gains)
    torch.testing.assert_close(changed - images, (gain - 1.0) * band, rtol=0, atol=2e-6)
    without = images - band
    torch.testing.assert_close((changed - without).std((1, 2, 3)), gain * band.std((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_energy_bands_are_differences_of_gaussians_one_after_the_other():
    image = _images(0, batch=1, rows=9, columns=12)
    bands, rest = intensity.energy_bands(image)
    left = image[0, 0].double().numpy()
    for sigma, band in zip((1, 2, 4, 8, 16), bands, strict=True):
        smooth = _smoothed_by_hand(left, sigma)
        np.testing.assert_allclose(band[0, 0].numpy(), left - smooth, atol=1e-6)
        left = smooth
    np.testing.assert_allclose(rest[0, 0].numpy(), left, atol=1e-6)


@_any
@given(SEEDS, st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_energy_and_blur_leave_a_constant_image_alone(seed, value, strength):
    images = torch.full((2, 1, 20, 28), value)
    for change in ("energy", "blur"):
        torch.testing.assert_close(_CHANGES[change](images, _seeded(seed), strength), images, rtol=0, atol=2e-6)


@_any
@given(SEEDS, st.floats(0.05, 1.0))
def test_energy_gains_are_drawn_evenly_between_the_limits_for_each_image_and_band(seed, strength):
    mild = 0.5 + 0.01 * (_images(seed, batch=40) - 0.5)  # far from clipping
    change = (intensity.energy(mild, _seeded(seed), strength=strength) - mild).flatten(1).double()
    bands = torch.stack([band.flatten(1) for band in intensity.energy_bands(mild)[0]], 2).double()
    log_gains = torch.log1p(torch.linalg.lstsq(bands, change[..., None]).solution[..., 0])[:, :3]  # fine bands: exact
    assert log_gains.abs().max() <= strength * 1.02
    assert log_gains.std().item() == pytest.approx(strength / 3**0.5, rel=0.25)


@_any
@given(SEEDS, st.floats(0.0, 1.5))
def test_smoothing_equals_a_plain_loop_over_all_pixels(seed, sigma):
    image = _images(seed, batch=1, rows=7, columns=10)
    smooth = intensity.smooth(image, torch.tensor([sigma]))[0, 0].numpy()
    np.testing.assert_allclose(smooth, _smoothed_by_hand(image[0, 0].double().numpy(), max(sigma, 0.01)), atol=1e-6)


@_any
@given(SEEDS, st.lists(st.floats(0.1, 1.5), min_size=1, max_size=4))
def test_smoothing_equals_scipy_away_from_the_border_for_each_image_its_own_sigma(seed, sigmas):
    images = _images(seed, batch=len(sigmas), rows=32, columns=26)
    smooth = intensity.smooth(images, torch.tensor(sigmas))
    for image, result, sigma in zip(images, smooth, sigmas, strict=True):
        expected = gaussian_filter(image[0].double().numpy(), sigma, truncate=8.0)
        np.testing.assert_allclose(result[0, 9:-9, 9:-9].numpy(), expected[9:-9, 9:-9], atol=1e-6)


@_any
@given(st.floats(0.0, 1.0), st.floats(0.0, 1000.0))
def test_smoothing_leaves_a_constant_image_alone_at_any_sigma(value, sigma):
    images = torch.full((1, 3, 20, 28), value)
    torch.testing.assert_close(intensity.smooth(images, torch.tensor([sigma])), images, rtol=0, atol=1e-6)


@_any
@given(SEEDS)
def test_smoothing_by_zero_pixels_is_the_identity(seed):
    images = _images(seed)
    assert torch.equal(intensity.smooth(images, torch.zeros(3)), images)


@_any
@given(SEEDS, st.floats(0.5, 10.0))
def test_blur_lowers_the_variance_of_each_image(seed, sigma):
    images = _images(seed, batch=8)
    assert (intensity.blur(images, _seeded(seed), sigma=sigma).var((1, 2, 3)) <= images.var((1, 2, 3))).all()


@_any
@given(SEEDS, st.floats(0.0, 2.0))
def test_gamma_keeps_the_order_of_grey_values_and_zero_to_one(seed, strength):
    ramp = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16).expand(6, 1, 16, 16).contiguous()
    changed = intensity.gamma(ramp, _seeded(seed), strength=strength)
    assert (changed.flatten(1).diff(dim=1) >= 0).all()
    assert changed.min() >= 0
    assert changed.max() <= 1
    exponents = changed[:, 0, 8, 0].log() / ramp[:, 0, 8, 0].log()
    assert exponents.log().abs().max() <= strength + 1e-4


@_any
@given(SEEDS, st.floats(0.0, 0.6), st.floats(0.0, 0.1))
def test_linear_intensity_keeps_the_mean_but_for_brightness_and_scales_all_contrast_alike(seed, contrast, brightness):
    images = 0.4 + 0.2 * _images(seed, batch=20)
    changed = intensity.linear_intensity(images, _seeded(seed), contrast=contrast, brightness=0.0)
    torch.testing.assert_close(changed.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=1e-5)
    scale = changed.std((1, 2, 3)) / images.std((1, 2, 3))
    assert scale.log().abs().max() <= contrast + 1e-4
    shifted = intensity.linear_intensity(images, _seeded(seed), contrast=0.0, brightness=brightness) - images
    assert shifted.amax((1, 2, 3)).sub(shifted.amin((1, 2, 3))).max() < 1e-5
    assert shifted.abs().max() <= brightness + 1e-5


@_any
@given(SEEDS, st.floats(0.01, 0.5))
def test_noise_has_a_standard_deviation_spread_evenly_up_to_the_one_asked_for(seed, sigma):
    images = torch.full((300, 1, 24, 24), 0.5)
    added = intensity.noise(images, _seeded(seed), sigma=sigma) - images
    levels = added.std((1, 2, 3)).sort().values / sigma
    assert (levels - torch.linspace(0, 1, 300)).abs().max() < 0.13
    assert added.mean().abs() < 0.02 * sigma


@_any
@given(SEEDS, st.floats(0.01, 0.3))
def test_window_jitter_changes_width_and_centre_of_a_ct_window_within_its_limits(seed, jitter):
    units = torch.linspace(20, 60, 64).reshape(1, 1, 8, 8).expand(50, 1, 8, 8).contiguous()  # no window clips these
    shown = intensity.clinical_window(_hounsfield(units), _seeded(seed), probability=0.0, jitter=jitter).double()
    width = 40.0 / (shown[:, 0, -1, -1] - shown[:, 0, 0, 0])
    centre = 20.0 + (0.5 - shown[:, 0, 0, 0]) * width
    assert (width / 400.0).log().abs().max() <= jitter + 1e-3
    assert (centre - 40.0).abs().max() <= 400.0 * jitter + 0.2
    assert (width / 400.0).log().std().item() == pytest.approx(jitter / 3**0.5, rel=0.35)
    assert centre.std().item() == pytest.approx(400.0 * jitter / 3**0.5, rel=0.35)


@_any
@given(SEEDS, st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_windows_and_their_jitter_leave_everything_but_ct_alone(seed, probability, jitter):
    images = _images(seed, batch=6)
    is_ct = (torch.arange(6) < 3)[:, None, None, None]
    black, white = torch.zeros(6, 1, 1, 1), torch.ones(6, 1, 1, 1)
    mixed = ImageBatch(images, black, white, is_ct)
    shown = intensity.clinical_window(mixed, _seeded(seed), probability=probability, jitter=jitter)
    assert torch.equal(shown[3:], images[3:])
    none = ImageBatch(images, black, white, None)
    assert torch.equal(intensity.clinical_window(none, _seeded(seed), probability=probability, jitter=jitter), images)


def test_ct_is_shown_through_its_own_window_and_draws_no_random_number_when_nothing_is_to_change():
    units, generator = torch.linspace(-1024, 1024, 64).expand(4, 1, 64, 64), _seeded()
    shown = intensity.clinical_window(_hounsfield(units), generator, probability=0.0, jitter=0.0)
    torch.testing.assert_close(shown, ((units + 160) / 400).clamp(0, 1), atol=1e-4, rtol=0)
    assert torch.equal(generator.get_state(), _seeded().get_state())


def test_a_drawn_window_is_one_of_the_clinical_ones():
    units = torch.linspace(-1024, 3071, 256).reshape(1, 1, 16, 16).expand(64, 1, 16, 16)
    shown = intensity.clinical_window(_hounsfield(units), _seeded(), probability=1.0)
    expected = torch.stack([((units[0] - (c - w / 2)) / w).clamp(0, 1) for c, w in intensity.CT_WINDOWS])
    distance = (shown[:, None] - expected[None]).abs().amax((2, 3, 4))
    assert (distance.min(1).values < 1e-3).all()
    assert len(set(distance.argmin(1).tolist())) == len(intensity.CT_WINDOWS)


@pytest.mark.parametrize("change", _CHANGES)
def test_a_change_of_strength_zero_is_the_identity(change):
    images = _images(0)
    torch.testing.assert_close(_CHANGES[change](images, _seeded(), 0.0), images, rtol=0, atol=0)


@pytest.mark.parametrize("change", _CHANGES)
def test_a_change_of_strength_zero_draws_no_random_number(change):
    generator = _seeded()
    _CHANGES[change](_images(0), generator, 0.0)
    assert torch.equal(generator.get_state(), _seeded().get_state())
