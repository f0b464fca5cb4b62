"""How much worse a fixed model gets when its images change at test time (Ghesu et al. 2022)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LEVELS: Mapping[str, Sequence[float]] = {
    "rotation": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0),  # degrees
    "scale": (0.8, 0.9, 1.0, 1.1, 1.2),  # above 1: larger
    "gamma": (0.5, 0.7, 1.0, 1.4, 2.0),  # exponent
    "contrast": (0.5, 0.75, 1.0, 1.25, 1.5),  # factor about the mid grey
    "brightness": (-0.2, -0.1, 0.0, 0.1, 0.2),  # shift
}
NEUTRAL: Mapping[str, float] = {"rotation": 0.0, "scale": 1.0, "gamma": 1.0, "contrast": 1.0, "brightness": 0.0}
_MID_GREY = 0.5


def changed(
    images: Float[Tensor, "batch channels edge edge"], kind: str, level: float
) -> Float[Tensor, "batch channels edge edge"]:
    """Change all images alike, without randomness; the neutral level gives the images themselves.

    Args:
        images: grey values in 0..1.
        kind: one of ``LEVELS``.
        level: degrees anticlockwise for rotation; a factor for scale and contrast; the exponent for gamma; a shift of
            grey values for brightness. Grey values are clipped to 0..1, and what was outside of the image is black.
    """
    if level == NEUTRAL[kind]:
        return images
    match kind:
        case "rotation":
            return _sampled(images, degrees=level, scale=1.0)
        case "scale":
            return _sampled(images, degrees=0.0, scale=level)
        case "gamma":
            return images.clamp(0.0, 1.0) ** level
        case "contrast":
            return ((images - _MID_GREY) * level + _MID_GREY).clamp(0.0, 1.0)
        case _:
            return (images + level).clamp(0.0, 1.0)


def _sampled(
    images: Float[Tensor, "batch channels edge edge"], *, degrees: float, scale: float
) -> Float[Tensor, "batch channels edge edge"]:
    """Turn and enlarge about the centre, bilinear: each new pixel looks up its place in the image."""
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    lookup = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], dtype=images.dtype, device=images.device)
    grid = F.affine_grid(lookup.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def mean_drop(values: Mapping[float, Float[np.ndarray, " draws"]], neutral: float) -> Float[np.ndarray, " draws"]:
    """Metric at the neutral level minus its mean over all other levels, draw by draw.

    Args:
        values: metric by level, in the same draws.
        neutral: the level at which images are unchanged.
    """
    others = [metric for level, metric in values.items() if level != neutral]
    assert others
    return values[neutral] - np.mean(others, axis=0)
