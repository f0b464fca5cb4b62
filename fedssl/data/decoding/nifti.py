"""NIfTI volumes as series of axial slices, turned the way a radiologist looks at them."""

import gzip
import math
from collections.abc import Iterator
from io import BufferedIOBase, BytesIO

import nibabel as nib
import numpy as np

from fedssl.data.decoding.picture import Meaning, Picture, refuse_absurd, without_holes

_MOST_BYTES = 2**31
_MOST_EXTENSION = 2**24
_MOST_DEFLATED = 1032  # bytes that one byte of a deflate stream can become


def pictures(data: bytes, *, compressed: bool, modality: str = "") -> Iterator[Picture]:
    """Cut a volume into slices from the feet to the head.

    The volume is first brought to the axes R, A, S (nearest axes, no resampling); a slice then shows the patient's
    right on the left and the front on top, as DICOM shows an axial slice. A fourth axis is walked through.

    Args:
        data: bytes of the file.
        compressed: it is gzip.
        modality: ``CT`` keeps the values as Hounsfield units; else they have no fixed scale.

    Raises:
        ValueError: no volume of numbers, or larger than any scan.
        Exception: whatever nibabel raises for a damaged file; the caller records its type.
    """
    volume = _load(data, compressed=compressed)
    shape = volume.shape
    if len(shape) not in (3, 4) or volume.get_data_dtype().kind not in "iuf":
        raise ValueError(f"holds {len(shape)} axes of {volume.get_data_dtype().kind} values; 3 or 4 axes of numbers do")
    frames = shape[2] * (shape[3] if len(shape) == 4 else 1)
    refuse_absurd(shape[1], shape[0], 1, frames)
    if int(np.prod(shape, dtype=np.int64)) * 8 > _MOST_BYTES:
        raise ValueError("is said to hold more values than any scan")
    canonical = nib.as_closest_canonical(volume)
    values = np.asanyarray(canonical.dataobj).reshape(*canonical.shape[:3], -1)
    spacing = float(canonical.header.get_zooms()[2])
    bits = 8 * volume.get_data_dtype().itemsize
    for time in range(values.shape[3]):
        for place in range(values.shape[2]):
            shown = values[::-1, ::-1, place, time].T
            yield _picture(shown, bits, place * spacing, modality)


def _load(data: bytes, *, compressed: bool) -> nib.Nifti1Image:
    stream: BufferedIOBase = gzip.GzipFile(fileobj=BytesIO(data)) if compressed else BytesIO(data)
    size = int.from_bytes(stream.read(4), "little")  # of the header
    stream.seek(0)
    kind = nib.Nifti2Image if size in (540, 0x1C020000) else nib.Nifti1Image
    header = kind.header_class(stream.read(kind.header_class.sizeof_hdr), check=False)
    _refuse_short(header, len(data), compressed=compressed)
    stream.seek(0)
    holder = nib.FileHolder(fileobj=stream)
    return kind.from_file_map({"header": holder, "image": holder})


def _refuse_short(header: nib.Nifti1Header, size: int, *, compressed: bool) -> None:
    """Refuse what the file cannot hold before memory is taken for it."""
    start = max(0, int(header["vox_offset"]))
    if start > _MOST_EXTENSION:
        raise ValueError("holds its values too far behind its header")
    shape = header.get_data_shape()
    needed = start + math.prod(shape) * header.get_data_dtype().itemsize
    if needed > size * (_MOST_DEFLATED if compressed else 1):
        raise ValueError("holds fewer values than its header says: it is cut off, or its header is wrong")


def _picture(values: np.ndarray, bits: int, position: float, modality: str) -> Picture:
    values, padding = without_holes(values.astype(values.dtype.newbyteorder("="), copy=False), None)
    if modality == "CT":
        return Picture(values.astype(np.float32), Meaning.HOUNSFIELD, bits, position=position, plane="axial")
    kept = values if values.dtype.itemsize <= 2 and values.dtype.kind in "iu" else values.astype(np.float32)
    return Picture(np.ascontiguousarray(kept), Meaning.RAW, bits, padding=padding, position=position, plane="axial")
