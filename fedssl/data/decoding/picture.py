"""One decoded image as the decoders hand it over: its values and what they mean."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Shaped

MAX_PIXELS = 2**27  # of one frame, samples counted: more is refused before anything is allocated
MAX_FRAMES = 100_000
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units: window 400, level 40


class Meaning(StrEnum):
    """What the values of a picture are.

    ``HOUNSFIELD``: Hounsfield units, kept as they are. ``RAW``: scanner units without a fixed scale (MR, ultrasound,
    nuclear medicine, volumes), shown between robust percentiles of their series. ``DISPLAY``: grey from 0 (black) to 1
    (white), the values of interest already chosen (radiographs, photographs). ``COLOUR``: 8-bit red, green, blue.
    """

    HOUNSFIELD = "hounsfield"
    RAW = "raw"
    DISPLAY = "display"
    COLOUR = "colour"


@dataclass(frozen=True)
class Picture:
    """One image at its native size.

    Attributes:
        values: [rows, columns], or [rows, columns, 3] for ``COLOUR``.
        meaning: what the values are.
        bits: stored bits of a sample.
        window: Hounsfield units shown as black and white; only for ``HOUNSFIELD``.
        inverted: small values are bright (MONOCHROME1); only for ``RAW``, the others are upright already.
        padding: pixels outside the patient (0028,0120), or None.
        position: millimetres along the normal of the slice, or None.
        plane: ``axial``, ``sagittal``, ``coronal`` or empty.
        source: the values as they were stored, by which equal images are known; None: ``values`` are these.
    """

    values: Shaped[np.ndarray, "..."]
    meaning: Meaning
    bits: int
    window: tuple[float, float] = SOFT_TISSUE
    inverted: bool = False
    padding: Bool[np.ndarray, "rows columns"] | None = None
    position: float | None = None
    plane: str = ""
    source: Shaped[np.ndarray, "..."] | None = None


def refuse_absurd(rows: int, columns: int, samples: int, frames: int) -> None:
    """Refuse sizes that no image has, before memory is taken for them.

    Raises:
        ValueError: says which.
    """
    if rows < 1 or columns < 1 or samples < 1:
        raise ValueError("is said to have no pixels")
    if rows * columns * samples > MAX_PIXELS:
        raise ValueError(f"is said to have more than {MAX_PIXELS} values a frame")
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"is said to hold no frame, or more than {MAX_FRAMES}")


def without_holes(
    values: Shaped[np.ndarray, "..."], padding: Bool[np.ndarray, "rows columns"] | None
) -> tuple[Shaped[np.ndarray, "..."], Bool[np.ndarray, "rows columns"] | None]:
    """Take not-a-number and infinity for padding, and put the least finite value there."""
    finite = np.isfinite(values)
    if finite.all():
        return values, padding
    least = values[finite].min() if finite.any() else 0
    return np.where(finite, values, least).astype(values.dtype), ~finite if padding is None else padding | ~finite


def shown(picture: Picture) -> Float[np.ndarray, "..."]:
    """Grey values from 0 (black) to 1 (white), or colour from 0 to 1, as a screen would show this picture alone."""
    values = picture.values.astype(np.float32)
    if picture.meaning is Meaning.COLOUR:
        return values / 255.0
    if picture.meaning is Meaning.DISPLAY:
        return values
    low, high = picture.window if picture.meaning is Meaning.HOUNSFIELD else robust_range(picture)
    grey = np.clip((values - low) / (high - low if high != low else 1.0), 0.0, 1.0)
    return grey if picture.padding is None else np.where(picture.padding, np.float32(0.0), grey)


def robust_range(picture: Picture) -> tuple[float, float]:
    """Return the 0.5 and 99.5 percentiles, swapped where small values are bright."""
    low, high = np.percentile(inside(picture), [0.5, 99.5])
    return (float(high), float(low)) if picture.inverted else (float(low), float(high))


def inside(picture: Picture) -> Shaped[np.ndarray, " pixels"]:
    """Return the values that are not padding; all of them if everything is padding."""
    if picture.padding is None or picture.padding.all():
        return picture.values.reshape(-1)
    return picture.values[~picture.padding]
