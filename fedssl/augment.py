"""Views of medical images: crops of several scales with random geometry and grey values, made batch by batch.

Every random number comes from the given generator, one row an image.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from fedssl import intensity
from fedssl.data.batches import UNLABELLED, ImageBatch, ViewBatch
from fedssl.data.modality import MODALITIES, OTHER
from fedssl.errors import ConfigError
from fedssl.intensity import Images, uniform


def random_crops(
    images: Images, generator: Generator, *, edge: int, area: tuple[float, float], rotation: float, flip: bool
) -> Float[Tensor, "batch channels edge edge"]:
    """Cut one random rectangle an image, rotate and scale it to ``edge`` pixels (Inception crops, Szegedy et al. 2015).

    Args:
        images: the batch.
        generator: decides everything.
        edge: output pixels on a side.
        area: smallest and largest share of the image's area.
        rotation: largest angle in degrees, either way.
        flip: mirror left and right with probability one half; only where anatomy allows.
    """
    batch = len(images)
    share = uniform(batch, *area, generator)
    ratio = torch.exp(uniform(batch, math.log(3 / 4), math.log(4 / 3), generator))
    width, height = (share * ratio).sqrt().clamp(max=1.0), (share / ratio).sqrt().clamp(max=1.0)
    centre_x = uniform(batch, -1.0, 1.0, generator) * (1.0 - width)
    centre_y = uniform(batch, -1.0, 1.0, generator) * (1.0 - height)
    angle = uniform(batch, -math.radians(rotation), math.radians(rotation), generator)
    if flip:
        width = width * torch.where(uniform(batch, 0.0, 1.0, generator) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([width * cos, -height * sin, centre_x], 1),
        torch.stack([width * sin, height * cos, centre_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [batch, images.shape[1], edge, edge], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class Crops:
    """Crops of one scale.

    Attributes:
        count: of each image.
        edge: their pixels on a side.
        area: their smallest and largest share of the image's area.
    """

    count: int
    edge: int
    area: Sequence[float]


@dataclass(frozen=True)
class Changes:
    """How strongly views differ from their image; 0 switches a change off.

    Attributes:
        rotation: degrees, either way.
        flip: mirror left and right; only where anatomy allows.
        energy: of the bands of detail, see ``fedssl.intensity.energy``.
        gamma: strength of the gamma change.
        contrast: strength of the contrast change.
        brightness: largest shift of the grey values.
        blur: largest standard deviation of a Gaussian, in pixels of the view.
        noise: largest standard deviation of added noise.
        ct_windows: probability that a view of a CT image has another window than the image's own.
        ct_jitter: random change of a CT window, a share of its width.
    """

    rotation: float = 0.0
    flip: bool = False
    energy: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    ct_windows: float = 0.0
    ct_jitter: float = 0.0

    def view(self, images: ImageBatch, generator: Generator, crops: Crops) -> Float[Tensor, "batch channels edge edge"]:
        """Make one standardised view of each image."""
        low, high = crops.area
        grey = intensity.clinical_window(images, generator, probability=self.ct_windows, jitter=self.ct_jitter)
        view = random_crops(grey, generator, edge=crops.edge, area=(low, high), rotation=self.rotation, flip=self.flip)
        view = intensity.energy(view, generator, strength=self.energy)
        view = intensity.gamma(view, generator, strength=self.gamma)
        view = intensity.linear_intensity(view, generator, contrast=self.contrast, brightness=self.brightness)
        view = intensity.blur(view, generator, sigma=self.blur)
        return standardise(intensity.noise(view, generator, sigma=self.noise))


@dataclass(frozen=True)
class Views:
    """Multi-crop views (SwAV, section 3.2) of any number of scales.

    Attributes:
        scales: the first holds the pair of views that is compared.
        changes: how strongly views differ.
        modalities: other changes for images of some modalities, by position in ``MODALITIES``.
    """

    scales: Sequence[Crops]
    changes: Changes
    modalities: Mapping[int, Changes] = field(default_factory=dict)

    @property
    def edge(self) -> int:
        """Pixels on a side of the compared views: the size for which the encoder is trained."""
        return self.scales[0].edge

    @property
    def flip(self) -> bool:
        """Whether images of every modality may be mirrored."""
        return all(changes.flip for changes in (self.changes, *self.modalities.values()))

    def __call__(self, images: ImageBatch, generator: Generator) -> ViewBatch:
        """Make all views of a batch; rows with a partner take every other view from it."""
        sources = (images, images if images.partner is None else images.partner)
        plan = [crops for crops in self.scales for _ in range(crops.count)]
        views = [self._view(sources[number % 2], generator, crops) for number, crops in enumerate(plan)]
        nothing = torch.full((len(images),), OTHER, device=images.values.device)
        modality = torch.stack([nothing if source.modality is None else source.modality for source in sources])
        label = torch.full_like(nothing, UNLABELLED) if images.label is None else images.label
        known = [source.patient for source in sources if source.patient is not None]
        return ViewBatch(views, modality, label, torch.stack(known) if len(known) == len(sources) else None)

    def _view(
        self, images: ImageBatch, generator: Generator, crops: Crops
    ) -> Float[Tensor, "batch channels edge edge"]:
        if not self.modalities or images.modality is None:
            return self.changes.view(images, generator, crops)
        view = images.values.new_empty(len(images), images.values.shape[1], crops.edge, crops.edge)
        for group in images.modality.unique().tolist():
            rows = (images.modality == group).nonzero()[:, 0]
            changes = self.modalities.get(group, self.changes)
            view[rows] = changes.view(images.pick(rows), generator, crops)
        return view


def make_views(
    *,
    crops: Any,  # noqa: ANN401 - checked here, so that the message names the setting
    modalities: Mapping[str, Mapping[str, Any]] | None = None,
    **changes: Any,  # noqa: ANN401 - likewise
) -> Views:
    """Make views from plain settings.

    Args:
        crops: ``count``, ``edge`` and ``area`` of each scale by a name; the scale ``global`` is the first.
        modalities: what differs for images of a modality, by its name in ``MODALITIES``.
        changes: see ``Changes``.

    Raises:
        ConfigError: a scale, a modality or a strength is not usable.
    """
    others = modalities or {}
    problems = [*_unusable_crops(crops), *_unusable_changes(changes, "")]
    problems += [text for name, other in others.items() for text in _unusable_changes(other, f"modalities.{name}.")]
    problems += [
        f"modalities.{name} does not exist; there are {', '.join(MODALITIES)}"
        for name in others.keys() - set(MODALITIES)
    ]
    if problems:
        raise ConfigError("; ".join(f"augment.{text}" for text in problems) + ".")
    plain = Changes(**changes)
    by_group = {MODALITIES.index(name): replace(plain, **other) for name, other in others.items()}
    names = ["global", *(name for name in crops if name != "global")]
    return Views([Crops(**crops[name]) for name in names], plain, by_group)


def _unusable_crops(crops: Any) -> Iterator[str]:  # noqa: ANN401 - whatever the YAML holds
    """Give every scale that makes no views, with what it must be."""
    if not isinstance(crops, Mapping) or "global" not in crops:
        yield "crops must hold the scale global: its first two views are compared"
        return
    for name, scale in crops.items():
        if not isinstance(scale, Mapping) or scale.keys() != {"count", "edge", "area"}:
            yield f"crops.{name} must be {{count: ..., edge: ..., area: [low, high]}}"
        elif not _is_scale(**scale):
            yield f"crops.{name} needs a whole count of at least 0, a whole edge of at least 8 and 0 < low <= high <= 1"
        elif name == "global" and scale["count"] < 2:
            yield "crops.global.count must be at least 2: views are compared"


def _is_scale(*, count: object, edge: object, area: object) -> bool:
    whole = type(count) is int and type(edge) is int and count >= 0 and edge >= 8
    low, high = area if isinstance(area, Sequence) and len(area) == 2 else (1.0, 0.0)
    return whole and isinstance(low, int | float) and isinstance(high, int | float) and 0 < low <= high <= 1


def _unusable_changes(changes: Mapping[str, Any], place: str) -> Iterator[str]:
    """Give every strength that is none."""
    known = sorted(setting.name for setting in fields(Changes))
    for name, strength in changes.items():
        most = 1.0 if name == "ct_windows" else 180.0  # degrees; far beyond what any other strength can mean
        if name not in known:
            yield f"{place}{name} does not exist; there are {', '.join(known)}"
        elif not isinstance(strength, int | float) or not 0.0 <= strength <= most:
            yield f"{place}{name} must be a number from 0 to {most:g}"


def standardise(images: Images) -> Images:
    """Shift and scale grey values from 0..1 to about zero mean and unit variance, the same for every image and site."""
    return (images - 0.25) / 0.25


def noise_images(
    count: int, channels: int, edge: int, *, seed: int
) -> Float[Tensor, "{count} {channels} {edge} {edge}"]:
    """Public images that are nobody's: standardised noise with as much energy at coarse as at fine scales."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, channels, edge, edge)
    for size in (2, 4, 8, 16, 32):
        coarse = torch.randn(count, channels, size, size, generator=generator)
        total += F.interpolate(coarse, size=(edge, edge), mode="bilinear", align_corners=False)
    return standardise((total / 8.0 + 0.4).clamp(0.0, 1.0))


def centre_view(images: Images, *, edge: int) -> Float[Tensor, "batch channels edge edge"]:
    """The whole image at ``edge`` pixels without randomness, for evaluation."""
    if images.shape[-1] != edge:
        images = F.interpolate(images, size=(edge, edge), mode="bilinear", antialias=True, align_corners=False)
    return standardise(images)
