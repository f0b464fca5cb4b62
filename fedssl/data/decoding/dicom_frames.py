"""What the stored values of one DICOM frame mean: modality and VOI transforms, colour, padding, place in the patient.

The chain of PS3.3, C.11 and PS3.4, N.2: stored values -> modality LUT or rescale -> VOI LUT or window -> polarity.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Shaped
from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut

from fedssl.data.decoding.picture import SOFT_TISSUE, Meaning, Picture, without_holes

_WITHOUT_SCALE = {"MR", "US", "IVUS", "NM", "PT", "OPT"}
_AIR = -1024.0
_PLANES = ("sagittal", "coronal", "axial")
_LEAST_COSINE = 0.8
_GROUPS = {  # functional group macro -> attributes (PS3.3, C.7.6.16.2)
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
}
_PLAIN = ("ModalityLUTSequence", "VOILUTSequence", *(name for names in _GROUPS.values() for name in names))


def frame_facts(dataset: Dataset, number: int) -> Dataset:
    """Collect the transforms and the place of one frame: its own functional groups, the shared ones, the top level."""
    if "SharedFunctionalGroupsSequence" not in dataset and "PerFrameFunctionalGroupsSequence" not in dataset:
        return dataset
    facts = Dataset()
    facts.file_meta = dataset.file_meta
    _take(facts, dataset, _PLAIN)
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    own = [per_frame[number]] if number < len(per_frame) else []
    for groups in [*(dataset.get("SharedFunctionalGroupsSequence") or []), *own]:
        for macro, names in _GROUPS.items():
            for item in groups.get(macro) or []:
                _take(facts, item, names)
    return facts


def _take(facts: Dataset, source: Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name in source:
            facts.add(source[name])


def picture_of(stored: Shaped[np.ndarray, "..."], dataset: Dataset, number: int) -> Picture:
    """Give the stored values of frame ``number`` their meaning.

    CT with a rescale becomes Hounsfield units (0028,1052/1053); MR, ultrasound and nuclear medicine stay in the
    scanner's units; all else goes through its VOI LUT (0028,3010) or window (0028,1050), or its full range. PALETTE
    COLOR (0028,1101-1203) and three samples become 8-bit RGB.
    """
    bits = int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 8)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if stored.ndim == 3:
        return Picture(_eight_bits(stored, bits), Meaning.COLOUR, 8)
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        return Picture(_coloured(stored, dataset), Meaning.COLOUR, 8)
    facts = frame_facts(dataset, number)
    source = stored
    stored, padding = without_holes(stored, _padding(stored, dataset))
    position, plane = _place(facts)
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    values = _modality(stored, facts)
    modality = str(dataset.get("Modality") or "")
    made = partial(Picture, bits=bits, position=position, plane=plane, source=source)
    if modality == "CT" and "RescaleSlope" in facts and str(facts.get("RescaleType") or "HU") in {"HU", "US"}:
        values = values if padding is None else np.where(padding, np.float32(_AIR), values)
        window = _window(facts)
        own = window[:2] if window and window[0] < window[1] else SOFT_TISSUE
        return made(values, Meaning.HOUNSFIELD, window=own)
    if modality in _WITHOUT_SCALE | {"CT"}:
        return made(values, Meaning.RAW, inverted=inverted, padding=padding)
    grey = _display(values, facts, bits, padding)
    grey = 1.0 - grey if inverted else grey
    grey = grey if padding is None else np.where(padding, np.float32(0.0), grey)
    return made(grey.astype(np.float32, copy=False), Meaning.DISPLAY, padding=padding)


def _eight_bits(colours: Shaped[np.ndarray, "..."], bits: int) -> Shaped[np.ndarray, "..."]:
    if bits == 8:
        return colours.astype(np.uint8)
    return np.rint(colours.astype(np.float64) * (255.0 / (2**bits - 1))).clip(0, 255).astype(np.uint8)


def _coloured(stored: Shaped[np.ndarray, "rows columns"], dataset: Dataset) -> Shaped[np.ndarray, "rows columns 3"]:
    """Look stored values up in the palettes (PS3.3, C.7.6.3.1.5 and .6); 8-bit entries may lie in 16 bits."""
    if "RedPaletteColorLookupTableData" not in dataset:  # segmented (C.7.9.2)
        colours = apply_color_lut(stored, dataset)[..., :3]
        return _eight_bits(colours, 8 * colours.dtype.itemsize)
    planes = []
    for name in ("Red", "Green", "Blue"):
        descriptor = dataset[f"{name}PaletteColorLookupTableDescriptor"].value
        data = dataset[f"{name}PaletteColorLookupTableData"].value
        planes.append(_looked_up(stored, descriptor, data, dataset))
    return _eight_bits(np.stack(planes, -1), int(descriptor[2]))


def _looked_up(
    values: Shaped[np.ndarray, "rows columns"], descriptor: Sequence[int], data: object, dataset: Dataset
) -> Shaped[np.ndarray, "rows columns"]:
    """Look values up in a table; values beyond its ends take its first or last entry (PS3.3, C.11.1.1)."""
    count, first = int(descriptor[0]) or 65536, int(descriptor[1])
    if isinstance(data, bytes):
        order = "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
        data = np.frombuffer(data, order if len(data) >= 2 * count else np.uint8)
    place = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return np.asarray(data, np.uint16)[place]


def _padding(stored: Shaped[np.ndarray, "..."], dataset: Dataset) -> Shaped[np.ndarray, "..."] | None:
    """Mark PixelPaddingValue (0028,0120), up to PixelPaddingRangeLimit (0028,0121) where given (PS3.3, C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    if first is None or not np.issubdtype(stored.dtype, np.integer):
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    ends = [int(first), int(first if last is None else last)]
    low, high = sorted(np.array(ends).astype(stored.dtype).tolist())  # files may call a negative value unsigned
    mask = (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _modality(stored: Shaped[np.ndarray, "..."], facts: Dataset) -> Shaped[np.ndarray, "..."]:
    """Modality LUT (0028,3000), or slope (0028,1053) and intercept (0028,1052); integers stay as they are without."""
    if facts.get("ModalityLUTSequence"):
        item = facts.ModalityLUTSequence[0]
        return _looked_up(stored, item.LUTDescriptor, item.LUTData, facts)
    slope, intercept = _first(facts, "RescaleSlope"), _first(facts, "RescaleIntercept")
    if slope in (None, 1.0) and intercept in (None, 0.0):
        return stored if stored.dtype.itemsize <= 2 else stored.astype(np.float32)
    return stored.astype(np.float32) * np.float32(1.0 if slope is None else slope) + np.float32(intercept or 0.0)


def _display(
    values: Shaped[np.ndarray, "..."], facts: Dataset, bits: int, padding: np.ndarray | None
) -> Float[np.ndarray, "rows columns"]:
    """Grey from 0 to 1: VOI LUT, else window, else the range of 8 bits or less, else robust percentiles."""
    if facts.get("VOILUTSequence"):
        item = facts.VOILUTSequence[0]
        top = 2 ** int(item.LUTDescriptor[2]) - 1
        return (_looked_up(values, item.LUTDescriptor, item.LUTData, facts) / top).clip(0.0, 1.0).astype(np.float32)
    window = _window(facts)
    if window:
        return windowed(values.astype(np.float32), *window)
    if facts.get("ModalityLUTSequence"):
        bits = int(facts.ModalityLUTSequence[0].LUTDescriptor[2])
    if bits <= 8 and np.issubdtype(values.dtype, np.integer):
        least = -(2 ** (bits - 1)) if np.issubdtype(values.dtype, np.signedinteger) else 0
        return ((values.astype(np.float32) - least) / float(2**bits - 1)).clip(0.0, 1.0).astype(np.float32)
    low, high = _robust(values, padding)
    return ((values - low) / (high - low if high > low else 1.0)).clip(0.0, 1.0).astype(np.float32)


def _robust(values: Shaped[np.ndarray, "..."], padding: np.ndarray | None) -> tuple[np.float32, np.float32]:
    """The 0.5 and 99.5 percentiles inside the patient, on a grid of at least 512 pixels a side."""
    step = max(1, min(values.shape) // 512)
    thin, hidden = values[::step, ::step], None if padding is None else padding[::step, ::step]
    kept = thin if hidden is None or hidden.all() else thin[~hidden]
    low, high = np.percentile(kept, [0.5, 99.5])
    return np.float32(low), np.float32(high)


def windowed(
    values: Float[np.ndarray, "rows columns"], low: float, high: float, function: str
) -> Float[np.ndarray, "rows columns"]:
    """Apply a window between ``low`` and ``high``; SIGMOID as in PS3.3, C.11.2.1.3.1, else linear."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - (low + high) / 2.0) / (high - low), -80.0, 80.0)))
    if high <= low:  # a LINEAR window of width 1
        return (values > low).astype(np.float32)
    return ((values - low) / (high - low)).clip(0.0, 1.0)


def _window(facts: Dataset) -> tuple[float, float, str] | None:
    """Return the values shown as black and white and the function: C.11.2.1.2.1 (LINEAR) or C.11.2.1.3.2 (exact)."""
    centre, width = _first(facts, "WindowCenter"), _first(facts, "WindowWidth")
    function = str(facts.get("VOILUTFunction") or "LINEAR")
    if (
        centre is None
        or width is None
        or not math.isfinite(centre + width)
        or width <= 0
        or (width < 1 and function == "LINEAR")
    ):
        return None
    if function == "LINEAR":
        return centre - width / 2.0, centre + width / 2.0 - 1.0, function
    return centre - width / 2.0, centre + width / 2.0, function


def _place(facts: Dataset) -> tuple[float | None, str]:
    """Millimetres along the slice's normal and the nearest plane, from (0020,0032) and (0020,0037) (C.7.6.2.1.1)."""
    where, cosines = facts.get("ImagePositionPatient"), facts.get("ImageOrientationPatient")
    if not where or not cosines or len(where) != 3 or len(cosines) != 6:
        return None, ""
    direction = np.array([float(number) for number in cosines])
    normal = np.cross(direction[:3], direction[3:])
    axis = int(np.abs(normal).argmax())
    plane = _PLANES[axis] if abs(normal[axis]) >= _LEAST_COSINE else ""
    return float(np.array([float(number) for number in where]) @ normal), plane


def _first(facts: Dataset, keyword: str) -> float | None:
    value = facts.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return None if value is None or value == "" else float(value)
