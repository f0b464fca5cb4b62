"""A picture as the cache keeps it: a small square in 8 or 16 bits, with what is needed to show and to compare it."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from fedssl.data.decoding.picture import LUMA, Meaning, Picture, inside

LAYOUTS = {"grey8": ("|u1", 1), "grey16": ("<u2", 1), "rgb8": ("|u1", 3)}  # name -> dtype, channels
LEVELS = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
HASH_EDGE = 16
_HOUNSFIELD_ZERO = 32768.0
_SAMPLE_EDGE = 128  # pixels on a side, at least, of the grid on which percentiles are taken
_BINS, _LEAST_BINS = 2**16, 1024
_MARGIN = 4.0  # of the span of nearly all values: what lies farther out is cut before 16 bits are chosen
_LEAST_STEP = 2.0  # of 255: smaller differences are no edge for the perceptual hash


@dataclass(frozen=True)
class Record:
    """One image of the cache.

    Attributes:
        layout: a key of ``LAYOUTS``.
        data: [edge, edge] or [edge, edge, 3] bytes of that layout.
        scale: value = stored x scale + offset.
        offset: see ``scale``.
        low: the value shown as black.
        high: the value shown as white; below ``low`` where small values are bright.
        quantiles: values at ``LEVELS``; pooled over a series they give its range.
        digest: 16 bytes of BLAKE2b over the native pixels.
        hash: 256-bit difference hash of what is shown.
        hash_turned: the same of the image turned by 90 degrees.
        flags: names of what looks wrong, separated by blanks.
    """

    meaning: Meaning
    layout: str
    data: bytes
    scale: float
    offset: float
    low: float
    high: float
    quantiles: list[float]
    digest: bytes
    hash: bytes
    hash_turned: bytes
    rows: int
    columns: int
    position: float | None
    plane: str
    flags: str


def record(picture: Picture, edge: int) -> Record:
    """Shrink a picture into a square of ``edge`` pixels, aspect ratio kept, and describe it."""
    spread = _Spread(_sample(picture))
    quantiles = spread.quantiles()
    low, high = _range(picture, quantiles)
    fill = low if picture.meaning in (Meaning.RAW, Meaning.DISPLAY) else 0.0
    square = fit_square(_filled(picture, fill), edge, -1024.0 if picture.meaning is Meaning.HOUNSFIELD else fill)
    layout, stored, scale, offset = _stored(picture, square, quantiles)
    small = shrunk(np.asarray(_grey(square, low, high)), HASH_EDGE + 1)
    return Record(
        picture.meaning, layout, stored.tobytes(), scale, offset, low, high, quantiles.tolist(), _digest(picture),
        difference_hash(small), difference_hash(np.rot90(small)), picture.values.shape[0], picture.values.shape[1],
        picture.position, picture.plane, " ".join(_flags(picture, spread, quantiles, low, high)),
    )  # fmt: skip


def _sample(picture: Picture) -> Float[np.ndarray, " pixels"]:
    """A regular grid of the values inside the patient: percentiles of it cost little even for large radiographs."""
    step = max(1, min(picture.values.shape[:2]) // _SAMPLE_EDGE)
    padding = None if picture.padding is None else picture.padding[::step, ::step]
    thin = Picture(picture.values[::step, ::step], picture.meaning, picture.bits, padding=padding)
    return inside(thin).astype(np.float32)


class _Spread:
    """The distribution of a sample: a histogram of up to 65,536 bins, many times faster than sorting.

    Where a few far values leave the others only a handful of bins, the sample is sorted after all.
    """

    def __init__(self, sample: Float[np.ndarray, " pixels"]) -> None:
        self.least, self.most = float(sample.min()), float(sample.max())
        self.sample = sample
        span = self.most - self.least
        whole = span < _BINS and bool((sample == np.rint(sample)).all())
        self.step = 1.0 if whole or span == 0 else span / (_BINS - 1)
        counts = np.bincount(np.rint((sample - self.least) / self.step).astype(np.int64))
        self.below = np.cumsum(counts) / len(sample)

    def quantiles(self) -> Float[np.ndarray, " levels"]:
        """Values at ``LEVELS``: the smallest value that the share of the sample does not pass."""
        bins = np.searchsorted(self.below, np.asarray(LEVELS) - 1e-12)
        if self.step != 1.0 and bins[-3] - bins[2] < _LEAST_BINS:
            return np.quantile(self.sample, LEVELS, method="inverted_cdf").astype(np.float64)
        return self.least + self.step * bins

    def share_below(self, place: float) -> float:
        """Share of the sample up to ``place`` (0 to 1) of its range."""
        return float(self.below[int(place * (len(self.below) - 1))])


def _range(picture: Picture, quantiles: Float[np.ndarray, " levels"]) -> tuple[float, float]:
    if picture.meaning is Meaning.HOUNSFIELD:
        return picture.window
    if picture.meaning is Meaning.RAW:
        low, high = float(quantiles[LEVELS.index(0.005)]), float(quantiles[LEVELS.index(0.995)])
        return (high, low) if picture.inverted else (low, high)
    return (0.0, 1.0) if picture.meaning is Meaning.DISPLAY else (0.0, 255.0)


def _filled(picture: Picture, fill: float) -> Shaped[np.ndarray, "..."]:
    """Padding is shown black."""
    if picture.padding is None or picture.meaning is Meaning.DISPLAY:
        return picture.values
    return np.where(picture.padding, np.asarray(fill).astype(picture.values.dtype), picture.values)


def fit_square(values: Shaped[np.ndarray, "..."], edge: int, fill: float) -> Shaped[np.ndarray, "..."]:
    """Scale the longer side to ``edge`` pixels (bilinear with antialiasing) and pad the shorter one with ``fill``.

    8-bit values stay 8 bits, all others become float32.
    """
    rows, columns = values.shape[:2]
    scale = edge / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    kind = values.dtype if values.dtype == np.uint8 else np.float32
    source = Image.fromarray(np.ascontiguousarray(values, kind))
    scaled = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))
    square = np.full((edge, edge, *values.shape[2:]), fill, kind)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = scaled
    return square


def _stored(
    picture: Picture, square: Shaped[np.ndarray, "..."], quantiles: Float[np.ndarray, " levels"]
) -> tuple[str, Shaped[np.ndarray, "..."], float, float]:
    """Choose the smallest layout that keeps the values: (layout, stored, scale, offset)."""
    if picture.meaning is Meaning.COLOUR:
        return "rgb8", square, 1.0, 0.0
    if square.dtype == np.uint8:
        return "grey8", square, 1.0, 0.0
    if picture.meaning is Meaning.HOUNSFIELD:
        return "grey16", _quantised(square + _HOUNSFIELD_ZERO, 65535), 1.0, -_HOUNSFIELD_ZERO
    if picture.meaning is Meaning.DISPLAY:
        top = 255 if picture.bits <= 8 else 65535
        return ("grey8" if top == 255 else "grey16"), _quantised(square * top, top), 1.0 / top, 0.0
    first, last = float(quantiles[1]), float(quantiles[-2])
    least = max(float(square.min()), first - _MARGIN * (last - first)) if last > first else float(square.min())
    most = min(float(square.max()), last + _MARGIN * (last - first)) if last > first else float(square.max())
    scale = (most - least) / 65535.0 or 1.0
    return "grey16", _quantised((square - least) / scale, 65535), scale, least


def _quantised(values: Float[np.ndarray, "..."], top: int) -> Shaped[np.ndarray, "..."]:
    return np.rint(values).clip(0, top).astype(np.uint8 if top == 255 else np.uint16)


def _grey(square: Shaped[np.ndarray, "..."], low: float, high: float) -> Float[np.ndarray, "edge edge"]:
    values = square.astype(np.float32)
    flat = values @ LUMA if values.ndim == 3 else values
    return np.clip((flat - low) / (high - low if high != low else 1.0), 0.0, 1.0)


def shrunk(grey: Float[np.ndarray, "rows columns"], edge: int) -> Float[np.ndarray, "edge edge"]:
    """Average a grey image down to ``edge`` pixels on a side."""
    image = Image.fromarray(np.ascontiguousarray(grey, np.float32))
    return np.asarray(image.resize((edge, edge), Image.Resampling.BOX))


def difference_hash(small: Float[np.ndarray, "edge edge"]) -> bytes:
    """Return 256 bits: is each pixel clearly brighter than its left neighbour? ``small`` is 17 x 17, from 0 to 1."""
    brighter = small[:HASH_EDGE, 1:] - small[:HASH_EDGE, :-1] > _LEAST_STEP / 255.0
    return np.packbits(brighter).tobytes()


def _digest(picture: Picture) -> bytes:
    values = np.ascontiguousarray(picture.values if picture.source is None else picture.source)
    return hashlib.blake2b(values.tobytes(), digest_size=16, person=str(values.shape).encode()[:16]).digest()


def _flags(
    picture: Picture, spread: _Spread, quantiles: Float[np.ndarray, " levels"], low: float, high: float
) -> list[str]:
    """Name what looks wrong: ``constant``, ``wrong-sign``, ``half-empty``.

    wrong-sign: the values span nearly all that the bits can hold and lie at both ends with nothing between, as signed
    values read as unsigned do. half-empty: what is shown uses less than half of black to white.
    """
    if spread.least == spread.most:
        return ["constant"]
    flags = []
    first, last = spread.share_below(0.25), spread.share_below(0.75)
    wide = picture.bits > 8 and spread.most - spread.least > 0.9 * 2**picture.bits
    if wide and last - first < 0.01 and min(first, 1.0 - last) > 0.1:
        flags.append("wrong-sign")
    seen = np.clip((quantiles[[2, -3]] - low) / (high - low if high != low else 1.0), 0.0, 1.0)
    if picture.meaning is not Meaning.COLOUR and abs(float(seen[1] - seen[0])) < 0.5:
        flags.append("half-empty")
    return flags
