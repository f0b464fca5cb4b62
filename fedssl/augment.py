"""Views of medical images, made for a whole batch at once on the batch's device.

Grey values stay in 0 to 1. Every random number comes from the given generator, one row an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from fedssl.data.batches import ImageBatch
from fedssl.data.cache import HOUNSFIELD_LOW, HOUNSFIELD_SPAN

CT_WINDOWS = (  # centre and width in Hounsfield units: soft tissue, lung, bone, brain, mediastinum, liver
    (40.0, 400.0), (-600.0, 1500.0), (400.0, 1800.0), (40.0, 80.0), (50.0, 350.0), (60.0, 160.0),
)  # fmt: skip
Images = Float[Tensor, "batch channels rows columns"]


def _uniform(batch: int, low: float, high: float, generator: Generator) -> Float[Tensor, " batch"]:
    return torch.rand(batch, generator=generator, device=generator.device) * (high - low) + low


def random_crops(
    images: Images, generator: Generator, *, edge: int, area: tuple[float, float], rotation: float, flip: bool
) -> Float[Tensor, "batch channels edge edge"]:
    """Cut one random rectangle a image, rotate and scale it to ``edge`` pixels (Inception crops, Szegedy et al. 2015).

    Args:
        images: the batch.
        generator: decides everything.
        edge: output pixels on a side.
        area: smallest and largest share of the image's area.
        rotation: largest angle in degrees, either way.
        flip: mirror left and right with probability one half; only where anatomy allows.
    """
    batch = len(images)
    share = _uniform(batch, *area, generator)
    ratio = torch.exp(_uniform(batch, math.log(3 / 4), math.log(4 / 3), generator))
    width, height = (share * ratio).sqrt().clamp(max=1.0), (share / ratio).sqrt().clamp(max=1.0)
    centre_x = _uniform(batch, -1.0, 1.0, generator) * (1.0 - width)
    centre_y = _uniform(batch, -1.0, 1.0, generator) * (1.0 - height)
    angle = _uniform(batch, -math.radians(rotation), math.radians(rotation), generator)
    if flip:
        width = width * torch.where(_uniform(batch, 0.0, 1.0, generator) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([width * cos, -height * sin, centre_x], 1),
        torch.stack([width * sin, height * cos, centre_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [batch, images.shape[1], edge, edge], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def gamma(images: Images, generator: Generator, *, strength: float) -> Images:
    """Raise grey values to exp(U(-strength, strength))."""
    exponent = torch.exp(_uniform(len(images), -strength, strength, generator))
    return images.clamp(1e-4, 1.0) ** exponent[:, None, None, None]


def linear_intensity(images: Images, generator: Generator, *, contrast: float, brightness: float) -> Images:
    """Scale contrast about the mean by exp(U(-contrast, contrast)), add U(-brightness, brightness), clip to 0..1."""
    scale = torch.exp(_uniform(len(images), -contrast, contrast, generator))[:, None, None, None]
    shift = _uniform(len(images), -brightness, brightness, generator)[:, None, None, None]
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * scale + mean + shift).clamp(0.0, 1.0)


def noise(images: Images, generator: Generator, *, sigma: float) -> Images:
    """Add white noise of a standard deviation drawn from U(0, sigma) for each image."""
    level = _uniform(len(images), 0.0, sigma, generator)[:, None, None, None]
    return images + level * torch.randn(images.shape, generator=generator, device=images.device)


def clinical_window(batch: ImageBatch, generator: Generator, *, probability: float) -> Images:
    """Show CT through its own window or, with ``probability``, through one of the windows of radiologists.

    Everything that is not in Hounsfield units is left as it is. The choice is drawn for each image.
    """
    if batch.hounsfield is None or probability == 0.0:
        return batch.shown()
    count = len(batch)
    choice = torch.randint(len(CT_WINDOWS), (count,), generator=generator, device=generator.device)
    change = (_uniform(count, 0.0, 1.0, generator) < probability)[:, None, None, None] & batch.hounsfield
    windows = torch.tensor(CT_WINDOWS, device=generator.device)[choice]
    centre, half = (windows[:, 0] - HOUNSFIELD_LOW) / HOUNSFIELD_SPAN, windows[:, 1] / HOUNSFIELD_SPAN / 2.0
    low = torch.where(change, (centre - half)[:, None, None, None], batch.low)
    high = torch.where(change, (centre + half)[:, None, None, None], batch.high)
    return ImageBatch(batch.values, low, high, batch.hounsfield).shown()


@dataclass(frozen=True)
class Views:
    """Multi-crop views (SwAV, section 3.2): ``globals`` large crops, then ``locals`` small ones.

    Attributes:
        global_count: large crops of each image; at least two.
        global_edge: their pixels on a side.
        global_area: their share of the image's area.
        local_count: small crops of each image.
        local_edge: their pixels on a side.
        local_area: their share of the image's area.
        rotation: degrees, either way.
        flip: mirror left and right.
        gamma: strength of the gamma change.
        contrast: strength of the contrast change.
        brightness: largest shift of the grey values.
        noise: largest standard deviation of added noise.
        ct_windows: probability that a view of a CT image has another window than the image's own.
    """

    global_count: int
    global_edge: int
    global_area: Sequence[float]
    local_count: int
    local_edge: int
    local_area: Sequence[float]
    rotation: float
    flip: bool
    gamma: float
    contrast: float
    brightness: float
    noise: float
    ct_windows: float = 0.2

    def __call__(self, images: ImageBatch, generator: Generator) -> list[Tensor]:
        """Make all views of a batch; each is standardised by ``standardise``."""
        globals_ = [self._view(images, generator, self.global_edge, self.global_area) for _ in range(self.global_count)]
        locals_ = [self._view(images, generator, self.local_edge, self.local_area) for _ in range(self.local_count)]
        return globals_ + locals_

    def _view(
        self, images: ImageBatch, generator: Generator, edge: int, area: Sequence[float]
    ) -> Float[Tensor, "batch channels edge edge"]:
        low, high = area
        grey = clinical_window(images, generator, probability=self.ct_windows)
        view = random_crops(grey, generator, edge=edge, area=(low, high), rotation=self.rotation, flip=self.flip)
        view = gamma(view, generator, strength=self.gamma)
        view = linear_intensity(view, generator, contrast=self.contrast, brightness=self.brightness)
        return standardise(noise(view, generator, sigma=self.noise))


def standardise(images: Images) -> Images:
    """Shift and scale grey values from 0..1 to about zero mean and unit variance, the same for every image and site."""
    return (images - 0.25) / 0.25


def centre_view(images: Images, *, edge: int) -> Float[Tensor, "batch channels edge edge"]:
    """The whole image at ``edge`` pixels without randomness, for evaluation."""
    if images.shape[-1] != edge:
        images = F.interpolate(images, size=(edge, edge), mode="bilinear", antialias=True, align_corners=False)
    return standardise(images)
