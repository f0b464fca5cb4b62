"""Random changes of grey values for a whole batch at once, on the batch's device.

Grey values stay in 0 to 1, but for noise. Every random number comes from the given generator, one row an image; a
change of strength zero draws none and gives the images back.
"""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from fedssl.data.batches import ImageBatch
from fedssl.data.cache import HOUNSFIELD_LOW, HOUNSFIELD_SPAN

CT_WINDOWS = (  # centre and width in Hounsfield units: soft tissue, lung, bone, brain, mediastinum, liver
    (40.0, 400.0), (-600.0, 1500.0), (400.0, 1800.0), (40.0, 80.0), (50.0, 350.0), (60.0, 160.0),
)  # fmt: skip
BAND_SIGMAS = (1.0, 2.0, 4.0, 8.0, 16.0)  # pixels; one Gaussian after the other
Images = Float[Tensor, "batch channels rows columns"]


def uniform(batch: int, low: float, high: float, generator: Generator) -> Float[Tensor, " batch"]:
    """Draw one number an image."""
    return torch.rand(batch, generator=generator, device=generator.device) * (high - low) + low


def gamma(images: Images, generator: Generator, *, strength: float) -> Images:
    """Raise grey values to exp(U(-strength, strength))."""
    if strength == 0.0:
        return images
    exponent = torch.exp(uniform(len(images), -strength, strength, generator))
    return images.clamp(1e-4, 1.0) ** exponent[:, None, None, None]


def linear_intensity(images: Images, generator: Generator, *, contrast: float, brightness: float) -> Images:
    """Scale contrast about the mean by exp(U(-contrast, contrast)), add U(-brightness, brightness), clip to 0..1."""
    if contrast == 0.0 and brightness == 0.0:
        return images
    scale = torch.exp(uniform(len(images), -contrast, contrast, generator))[:, None, None, None]
    shift = uniform(len(images), -brightness, brightness, generator)[:, None, None, None]
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * scale + mean + shift).clamp(0.0, 1.0)


def noise(images: Images, generator: Generator, *, sigma: float) -> Images:
    """Add white noise of a standard deviation drawn from U(0, sigma) for each image."""
    if sigma == 0.0:
        return images
    level = uniform(len(images), 0.0, sigma, generator)[:, None, None, None]
    return images + level * torch.randn(images.shape, generator=generator, device=images.device)


def blur(images: Images, generator: Generator, *, sigma: float) -> Images:
    """Convolve each image with a Gaussian whose standard deviation is drawn from U(0, sigma) pixels."""
    if sigma == 0.0:
        return images
    return smooth(images, uniform(len(images), 0.0, sigma, generator))


def smooth(images: Images, sigmas: Float[Tensor, " batch"]) -> Images:
    """Convolve with Gaussians, [batch] standard deviations in pixels; at the border the kernel is cut and renormalised.

    As products of matrices, rows then columns: a constant image stays constant, whatever the size of the kernel.
    """
    rows, columns = images.shape[2:]
    down, across = _kernel(rows, sigmas), _kernel(columns, sigmas)
    return down[:, None] @ images @ across[:, None].transpose(2, 3)


def _kernel(length: int, sigmas: Float[Tensor, " batch"]) -> Float[Tensor, "batch length length"]:
    """Weights of pixel j in the smoothed pixel i; every row sums to one."""
    place = torch.arange(length, device=sigmas.device, dtype=sigmas.dtype)
    squared = (place[:, None] - place[None]).square()
    return torch.softmax(-squared / (2.0 * sigmas.clamp_min(1e-3).square())[:, None, None], dim=2)


def energy_bands(images: Images) -> tuple[list[Images], Images]:
    """Split images into bands of detail, from fine to coarse, and what is left.

    band_i = I_i - G_i(I_i), I_{i+1} = G_i(I_i) with Gaussians of 1, 2, 4, 8 and 16 pixels one after the other; the sum
    of all bands and the rest is the image (Philipsen et al. 2015, IEEE TMI 34(9), section II).

    Returns:
        The bands, and the rest.
    """
    bands = []
    rest = images
    for sigma in BAND_SIGMAS:
        smoothed = smooth(rest, torch.full((len(images),), sigma, device=images.device, dtype=images.dtype))
        bands.append(rest - smoothed)
        rest = smoothed
    return bands, rest


def rescale_bands(images: Images, gains: Float[Tensor, "batch bands"]) -> Images:
    """Multiply the standard deviation of each band of detail by its gain: rest + sum_i g_i band_i."""
    bands, rest = energy_bands(images)
    for number, band in enumerate(bands):
        rest = rest + gains[:, number, None, None, None] * band
    return rest


def energy(images: Images, generator: Generator, *, strength: float) -> Images:
    """Change the energy of each band of detail by exp(U(-strength, strength)), clip to 0..1.

    The normalisation of Philipsen et al. 2015 made random, our reading of the energy-based augmentation of Ghesu et
    al. 2022: scanners and their filters differ in how much they sharpen and smooth.
    """
    if strength == 0.0:
        return images
    shape = (len(images), len(BAND_SIGMAS))
    draws = torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0
    return rescale_bands(images, torch.exp(draws * strength)).clamp(0.0, 1.0)


def clinical_window(batch: ImageBatch, generator: Generator, *, probability: float, jitter: float = 0.0) -> Images:
    """Show CT through its own window or, with ``probability``, through one of the windows of radiologists.

    Everything that is not in Hounsfield units is left as it is. The choice is drawn for each image.

    Args:
        batch: the images.
        generator: decides everything.
        probability: of another window than the image's own.
        jitter: the window's width is multiplied by exp(U(-jitter, jitter)) and its centre moved by U(-jitter, jitter)
            times the width.
    """
    if batch.hounsfield is None:
        return batch.shown()
    low, high = batch.low, batch.high
    if probability:
        low, high = _drawn_windows(batch, generator, probability)
    if jitter:
        scale = torch.exp(uniform(len(batch), -jitter, jitter, generator))[:, None, None, None]
        shift = uniform(len(batch), -jitter, jitter, generator)[:, None, None, None]
        centre, half = (low + high) / 2.0 + shift * (high - low), (high - low) / 2.0 * scale
        low = torch.where(batch.hounsfield, centre - half, low)
        high = torch.where(batch.hounsfield, centre + half, high)
    return ImageBatch(batch.values, low, high, batch.hounsfield).shown()


def _drawn_windows(batch: ImageBatch, generator: Generator, probability: float) -> tuple[Tensor, Tensor]:
    """Draw a clinical window for some of the CT images; returns what is black and white in each, [batch, 1, 1, 1]."""
    assert batch.hounsfield is not None
    count = len(batch)
    choice = torch.randint(len(CT_WINDOWS), (count,), generator=generator, device=generator.device)
    change = (uniform(count, 0.0, 1.0, generator) < probability)[:, None, None, None] & batch.hounsfield
    windows = torch.tensor(CT_WINDOWS, device=generator.device)[choice]
    centre, half = (windows[:, 0] - HOUNSFIELD_LOW) / HOUNSFIELD_SPAN, windows[:, 1] / HOUNSFIELD_SPAN / 2.0
    low = torch.where(change, (centre - half)[:, None, None, None], batch.low)
    return low, torch.where(change, (centre + half)[:, None, None, None], batch.high)
