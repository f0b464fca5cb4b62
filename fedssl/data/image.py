"""One image file of any kind -> grey values from 0 to 1, and their fit into a square."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt16
from PIL import Image

from fedssl.data import dicom

RASTER_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
_MAX_PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = _MAX_PIXELS


def read_raster_size(path: Path) -> tuple[int, int, int]:
    """Read (frames, rows, columns) of a PNG, JPEG or TIFF from its header."""
    with Image.open(path) as image:
        return int(getattr(image, "n_frames", 1)), image.height, image.width


def read_frames(path: Path) -> list[Float[np.ndarray, "rows columns"]]:
    """Decode every frame of a DICOM, PNG, JPEG or TIFF file to grey values from 0 to 1.

    Raises:
        Exception: whatever the decoder raises for a damaged file; the caller records it.
    """
    if dicom.is_dicom(path):
        return dicom.read_frames(path)
    frames = []
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(_grey(image))
    return frames


def _grey(image: Image.Image) -> Float[np.ndarray, "rows columns"]:
    """8 bits are shown in their full range; 16 bits and floats between their 0.5 and 99.5 percentiles."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)
        low, high = np.percentile(values, [0.5, 99.5])
        return np.clip((values - low) / max(float(high - low), 1e-6), 0.0, 1.0).astype(np.float32)
    return np.asarray(image.convert("L"), np.float32) / 255.0


def fit_square(grey: Float[np.ndarray, "rows columns"], edge: int) -> UInt16[np.ndarray, "edge edge"]:
    """Scale the longer side to ``edge`` pixels, keep the aspect ratio, pad with black and store as 16 bits."""
    rows, columns = grey.shape
    scale = edge / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    scaled = Image.fromarray(np.ascontiguousarray(grey, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    square = np.zeros((edge, edge), np.uint16)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = np.rint(np.asarray(scaled) * 65535.0).clip(0, 65535)
    return square
