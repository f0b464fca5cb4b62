"""PNG, JPEG and TIFF files."""

from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from fedssl.data.decoding.picture import MAX_PIXELS, Meaning, Picture, refuse_absurd, without_holes

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def pictures(data: bytes) -> Iterator[Picture]:
    """Decode every page: 8 bits in their full range, 16 bits and floats between percentiles, colour as RGB.

    Raises:
        ValueError: the size is absurd.
        Exception: whatever Pillow raises for a damaged file; the caller records its type.
    """
    with Image.open(BytesIO(data)) as image:
        frames = int(getattr(image, "n_frames", 1))
        refuse_absurd(image.height, image.width, len(image.getbands()), frames)
        for number in range(frames):
            image.seek(number)
            refuse_absurd(image.height, image.width, len(image.getbands()), frames)
            yield _picture(ImageOps.exif_transpose(image))


def _picture(image: Image.Image) -> Picture:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        values, _ = without_holes(np.asarray(image).astype(np.float32), None)
        low, high = np.percentile(values, [0.5, 99.5])
        grey = np.clip((values - low) / max(float(high - low), 1e-6), 0.0, 1.0)
        return Picture(grey.astype(np.float32), Meaning.DISPLAY, 16)
    if image.mode in {"L", "LA", "1"}:
        return Picture(np.asarray(image.convert("L"), np.float32) / 255.0, Meaning.DISPLAY, 8)
    return Picture(np.asarray(image.convert("RGB")), Meaning.COLOUR, 8)
