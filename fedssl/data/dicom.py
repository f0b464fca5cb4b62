"""DICOM Part 10 files: header facts for the index and display-ready grey images for the cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydicom import Dataset, dcmread
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

_HEADER_TAGS = [
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "InstanceNumber", "Manufacturer",
    "ManufacturerModelName", "Rows", "Columns", "NumberOfFrames", "BitsStored", "SOPClassUID",
    "PhotometricInterpretation",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What the index keeps of one file. ``patient``, ``study`` and ``series`` are raw: pseudonymise before storing."""

    patient: str
    study: str
    series: str
    modality: str
    scanner: str
    instance: int
    frames: int
    rows: int
    columns: int


def is_dicom(path: Path) -> bool:
    """Tell whether a file starts with the 128-byte preamble and ``DICM`` (PS3.10, section 7.1)."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_header(path: Path) -> Header:
    """Read the header without its pixels.

    Raises:
        ValueError: the file holds no image, or no patient (0010,0020).
    """
    dataset = dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
    if "Rows" not in dataset or "Columns" not in dataset:
        raise ValueError("holds no image (no Rows or Columns)")
    return Header(
        patient=str(dataset.get("PatientID") or "").strip(),
        study=str(dataset.get("StudyInstanceUID", "")),
        series=str(dataset.get("SeriesInstanceUID", "")),
        modality=str(dataset.get("Modality") or "unknown"),
        scanner=" ".join(str(dataset.get(tag) or "") for tag in ("Manufacturer", "ManufacturerModelName")).strip(),
        instance=int(dataset.get("InstanceNumber") or 0),
        frames=int(dataset.get("NumberOfFrames") or 1),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
    )


def read_frames(path: Path) -> list[Float[np.ndarray, "rows columns"]]:
    """Decode every frame to grey values from 0 (black) to 1 (white) as a radiologist's screen would show them.

    Modality LUT (0028,3000) or rescale (0028,1052/1053), then the first VOI LUT or window (0028,3010 / 0028,1050) where
    there is one, else a robust range; MONOCHROME1 (0028,0004) is inverted; colour becomes luma (PS3.3, C.7.6.3).
    """
    dataset = dcmread(path)
    pixels = pixel_array(dataset)  # YCbCr becomes RGB
    frames = pixels if int(dataset.get("NumberOfFrames") or 1) > 1 else pixels[None]
    if int(dataset.get("SamplesPerPixel", 1)) == 3:
        return [_luma(frame, dataset) for frame in frames]
    return [_display(frame, dataset) for frame in frames]


def _luma(frame: np.ndarray, dataset: Dataset) -> Float[np.ndarray, "rows columns"]:
    scale = float(2 ** int(dataset.BitsStored) - 1)
    return (frame.astype(np.float32) / scale) @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _display(frame: np.ndarray, dataset: Dataset) -> Float[np.ndarray, "rows columns"]:
    values = apply_modality_lut(frame, dataset)
    windowed = _has_window(dataset)
    if windowed:
        values = apply_voi_lut(values, dataset)
    values = np.asarray(values, np.float32)
    low, high = _range(values, dataset, windowed=windowed)
    grey = np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0)
    return 1.0 - grey if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else grey


def _has_window(dataset: Dataset) -> bool:
    return bool(dataset.get("VOILUTSequence")) or dataset.get("WindowCenter") not in (None, "")


def _range(values: np.ndarray, dataset: Dataset, *, windowed: bool) -> tuple[float, float]:
    """The values shown as black and white: the window's own, all of 8 bits, or the 0.5 and 99.5 percentiles."""
    if windowed and dataset.get("VOILUTSequence"):
        return float(values.min()), float(values.max())
    if windowed:
        return _window_output_range(dataset)
    if int(dataset.get("BitsStored", 16)) <= 8 and "RescaleSlope" not in dataset:
        return 0.0, float(2 ** int(dataset.BitsStored) - 1)
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low), float(high)


def _window_output_range(dataset: Dataset) -> tuple[float, float]:
    """Black and white of pydicom's windowed output: the full stored range after the modality transform (C.11.2.1.2)."""
    bits, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0)) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = _first(dataset, "RescaleSlope", 1.0), _first(dataset, "RescaleIntercept", 0.0)
    return low * slope + intercept, high * slope + intercept


def _first(dataset: Dataset, keyword: str, default: float) -> float:
    value = dataset.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return default if value is None else float(value)
