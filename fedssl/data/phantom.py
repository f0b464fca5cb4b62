"""Synthetic images that look like radiographs, CT, MR and ultrasound, with or without a lesion.

Grey values run from 0 to 1 over a square of coordinates from -1 to 1. The lesion differs from its benign counterpart
by structure (a jagged ring with a dark core against a smooth disc), at a random place: neither single pixels nor
grey-value statistics give it away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

Field = Float[np.ndarray, "edge edge"]


@dataclass(frozen=True)
class Anatomy:
    """What stays the same over the images of one patient: three random shape factors and a seed for tissue texture."""

    shape: tuple[float, float, float]
    texture_seed: int


@dataclass(frozen=True)
class Finding:
    """A round finding: ``lesion`` is jagged with a dark core, else it is smooth. Place and radius in coordinates."""

    x: float
    y: float
    radius: float
    spikes: int
    lesion: bool


def draw(modality: str, anatomy: Anatomy, slice_place: float, finding: Finding | None, edge: int) -> Field:
    """Draw one image.

    Args:
        modality: ``CR``, ``CT``, ``MR`` or ``US`` (DICOM 0008,0060).
        anatomy: of the patient.
        slice_place: -1 to 1 through the body; shapes change slowly with it.
        finding: what is to be seen, or None.
        edge: pixels on a side.
    """
    y, x = np.meshgrid(np.linspace(-1, 1, edge), np.linspace(-1, 1, edge), indexing="ij")
    rng = np.random.default_rng([anatomy.texture_seed, round(1000 * (slice_place + 1))])
    image = _PAINTERS[modality](x, y, anatomy, slice_place, rng)
    if finding is not None:
        image = image + _finding(x, y, finding)
    return np.clip(image, 0.0, 1.0)


def random_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient's anatomy."""
    first, second, third = rng.uniform(-1, 1, 3)
    return Anatomy((first, second, third), int(rng.integers(2**31)))


def random_finding(rng: np.random.Generator, modality: str, *, lesion: bool) -> Finding:
    """Draw a finding somewhere in the body, which is flat in a CT slice."""
    angle, distance = rng.uniform(0, 2 * np.pi), 0.5 * np.sqrt(rng.uniform())
    flatness = 0.6 if modality == "CT" else 1.0
    return Finding(
        x=distance * np.cos(angle),
        y=flatness * distance * np.sin(angle),
        radius=rng.uniform(0.17, 0.26),
        spikes=int(rng.integers(6, 10)),
        lesion=lesion,
    )


def _finding(x: Field, y: Field, finding: Finding) -> Field:
    distance = np.hypot(x - finding.x, y - finding.y) / finding.radius
    angle = np.arctan2(y - finding.y, x - finding.x)
    if not finding.lesion:
        return 0.18 * _soft(1.0 - distance, 0.10)
    edge = 1.0 + 0.16 * np.sin(finding.spikes * angle)
    rim = np.exp(-(((distance - 0.82 * edge) / 0.2) ** 2))
    return 0.30 * rim - 0.08 * _soft(0.55 - distance, 0.10)


def _soft(signed_distance: Field, softness: float) -> Field:
    """One inside, zero outside, with a soft border."""
    return 1.0 / (1.0 + np.exp(-np.clip(signed_distance / softness, -30, 30)))


def _ellipse(
    x: Field, y: Field, centre: tuple[float, float], radii: tuple[float, float], softness: float = 0.04
) -> Field:
    return _soft(1.0 - np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1]), softness)


def _texture(rng: np.random.Generator, edge: int, scale: float) -> Field:
    """Smooth noise of unit variance; ``scale`` is a share of the image."""
    field = gaussian_filter(rng.standard_normal((edge, edge)), scale * edge, mode="wrap")
    return field / max(float(field.std()), 1e-9)


def _radiograph(x: Field, y: Field, anatomy: Anatomy, slice_place: float, rng: np.random.Generator) -> Field:
    a, b, c = anatomy.shape
    body = _ellipse(x, y, (0, 0.1), (0.92 + 0.05 * a, 1.05), 0.08)
    lungs = _ellipse(x, y, (-0.42, 0.0), (0.30 + 0.05 * b, 0.62), 0.15) + _ellipse(
        x, y, (0.42, 0.0), (0.30 + 0.05 * b, 0.58), 0.15
    )
    ribs = np.clip(np.sin((y + 0.25 * np.abs(x) + 0.05 * slice_place) * (17 + 2 * c)), 0, 1) ** 2
    heart = _ellipse(x, y, (0.12 + 0.05 * slice_place, 0.28), (0.28 + 0.06 * a, 0.30 + 0.04 * b), 0.2)
    spine = np.exp(-((x / 0.10) ** 2))
    image = 0.55 * body - 0.30 * np.clip(lungs, 0, 1) + 0.06 * ribs * body + 0.15 * heart + 0.12 * spine * body
    return image + 0.015 * _texture(rng, len(x), 0.03)


def _ct(x: Field, y: Field, anatomy: Anatomy, slice_place: float, rng: np.random.Generator) -> Field:
    a, b, c = anatomy.shape
    wide, high = 0.85 + 0.06 * a - 0.06 * abs(slice_place), 0.66 + 0.06 * b
    body = _ellipse(x, y, (0, 0), (wide, high), 0.02)
    inside = _ellipse(x, y, (0, 0), (0.88 * wide, 0.86 * high), 0.03)
    liver = _ellipse(x, y, (-0.34 + 0.05 * c, -0.05 + 0.1 * slice_place), (0.36, 0.34 + 0.05 * a), 0.06)
    spleen = _ellipse(x, y, (0.46, 0.05), (0.18, 0.22 + 0.04 * b), 0.08)
    spine = _ellipse(x, y, (0, 0.42), (0.13, 0.13), 0.10)
    image = 0.22 * body + 0.22 * inside + 0.10 * liver + 0.08 * spleen + 0.45 * spine
    return image + 0.02 * inside * _texture(rng, len(x), 0.02)


def _mr(x: Field, y: Field, anatomy: Anatomy, slice_place: float, rng: np.random.Generator) -> Field:
    a, b, c = anatomy.shape
    size = 0.90 - 0.25 * slice_place**2
    skull = _ellipse(x, y, (0, 0), (size * (0.78 + 0.04 * a), size * 0.95), 0.02)
    brain = _ellipse(x, y, (0, 0), (size * (0.68 + 0.04 * a), size * 0.85), 0.03)
    gap = 0.12 + 0.04 * b
    ventricles = _ellipse(x, y, (-gap, -0.05), (0.08, 0.26 + 0.05 * c), 0.15) + _ellipse(
        x, y, (gap, -0.05), (0.08, 0.26 + 0.05 * c), 0.15
    )
    folds = _texture(rng, len(x), 0.035)
    image = 0.55 * (skull - brain) + brain * (0.42 + 0.05 * folds) - 0.22 * brain * np.clip(ventricles, 0, 1)
    return image * (1.0 + 0.15 * (a * x + b * y))


def _ultrasound(x: Field, y: Field, anatomy: Anatomy, slice_place: float, rng: np.random.Generator) -> Field:
    a, b, c = anatomy.shape
    depth, angle = np.hypot(x, y + 1.3), np.arctan2(x, y + 1.3)
    fan = _soft(0.62 - np.abs(angle), 0.01) * _soft(2.15 - depth, 0.02) * _soft(depth - 0.35, 0.02)
    organ = _ellipse(x, y, (0.15 * a, 0.05 + 0.1 * slice_place), (0.52 + 0.06 * b, 0.42 + 0.06 * c), 0.06)
    border = np.exp(-(((np.hypot((x - 0.15 * a) / 0.52, (y - 0.05) / 0.42) - 1.0) / 0.08) ** 2))
    layers = 0.06 * np.sin(14 * depth + 3 * a)
    tissue = 0.46 - 0.14 * organ + 0.2 * border + layers
    speckle = 1.0 + 0.16 * _texture(rng, len(x), 0.012)
    return fan * tissue * speckle * np.exp(-0.25 * (depth - 1.0))


_PAINTERS: dict[str, Callable[[Field, Field, Anatomy, float, np.random.Generator], Field]] = {
    "CR": _radiograph,
    "CT": _ct,
    "MR": _mr,
    "US": _ultrasound,
}
