"""The textbook chain of PS3.3, C.11 in plain numpy, and the verdict on one file: what came out, confirmed by whom."""

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import data_store
import numpy as np
import pydicom
from oracle_codecs import LOSSY, by_simpleitk, frames_of, numbers, read, references, syntax_of

from fedssl.data.decoding.image import open_file
from fedssl.data.decoding.worker import reason_of

FOLDERS = (Path(pydicom.__file__).parent / "data", Path(data_store.__file__).parent / "data")


@dataclass
class Verdict:
    """What fedssl made of a file, and by how much each reference differs (values, or levels of 255 where shown)."""

    syntax: str
    photometric: str
    frames: int = 0
    pictures: list = field(default_factory=list)
    reason: str = ""
    foreign: bool = False
    own: str = ""
    lossy: bool = False
    differences: dict = field(default_factory=dict)


def every_file():
    """Name -> path of each file below pydicom's data folder and in pydicom-data."""
    return {
        path.relative_to(folder).as_posix(): path
        for folder in FOLDERS
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }


def decoded(data, name):
    """Return (pictures, reason, foreign); a decoder that raises anything but an Exception would end the test."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = open_file(data, name)
            return ([], "", True) if opened is None else (list(opened[1]), "", False)
        except Exception as error:  # noqa: BLE001 - as the worker does
            return [], reason_of(error), False


def judge(data, name):
    """Decode one file and compare it with every reference."""
    pictures, reason, foreign = decoded(data, name)
    dataset = None if foreign else read(data)
    if dataset is None or "PhotometricInterpretation" not in dataset:
        return Verdict("none" if foreign else _name(dataset), "none", 0, pictures, reason, foreign)
    verdict = Verdict(_name(dataset), dataset.PhotometricInterpretation, 0, pictures, reason, foreign)
    if pictures:
        verdict.frames = frames_of(dataset)
        verdict.lossy = syntax_of(dataset) in LOSSY
        answers, verdict.own = references(data)
        for codec, frames in answers.items():
            verdict.differences[codec] = max(
                difference(pictures[number], *textbook(values, photometric, dataset, number))
                for number, (photometric, values) in zip(numbers(dataset), frames, strict=True)
            )
    return verdict


def _name(dataset):
    syntax = syntax_of(dataset)
    return syntax.name.split(" (")[0] if "Lossless Only" not in syntax.name else syntax.name


def tolerance(verdict):
    """Lossless values are the same but for the rounding of float32; lossy codecs may differ by some levels.

    JPEG decoders differ in their cosine transforms, colour conversions and in how they interpolate halved chroma.
    """
    if verdict.lossy:
        return 6.0
    return 1.0 if verdict.photometric.startswith("YBR_FULL") else 1e-3


def difference(picture, kind, values, outside):
    """Largest difference of a picture from (kind, values, padding); infinite where kind, shape or padding differ."""
    if picture.meaning != kind or picture.values.shape != values.shape:
        return np.inf
    if kind == "raw" and not np.array_equal(picture.padding if picture.padding is not None else outside * 0, outside):
        return np.inf
    scale = 255.0 if kind == "display" else 1.0
    return float(np.abs(picture.values.astype(np.float64) - values).max() * scale)


def textbook(stored, photometric, dataset, number):
    """Give stored values their meaning, step by step: (kind, values, padding)."""
    bits = int(dataset.get("BitsStored", dataset.BitsAllocated))
    nowhere = np.zeros(stored.shape[:2], bool)
    if stored.ndim == 3:
        colour = rgb_of(stored, 2.0**bits - 1) if photometric.startswith("YBR_FULL") else stored
        return "colour", np.rint(colour.astype(np.float64) * 255 / (2**bits - 1)), nowhere
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return "colour", palette(stored, dataset), nowhere
    facts, modality = FrameFacts(dataset, number), dataset.get("Modality", "")
    outside = padding(stored, dataset)
    values = modality_values(stored, dataset, facts)
    if modality == "CT" and facts.first("RescaleSlope") is not None and facts.text("RescaleType") in {"", "HU", "US"}:
        return "hounsfield", np.where(outside, -1024.0, values), outside
    if modality in {"CT", "MR", "US", "IVUS", "NM", "PT", "OPT"}:
        return "raw", values, outside
    grey = displayed(values, dataset, facts, outside, bits)
    grey = 1 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey
    return "display", np.where(outside, 0.0, grey), outside


def rgb_of(ybr, top):
    """PS3.3, C.7.6.3.1.2: the inverse of the matrix of YBR_FULL, with CB and CR around the middle."""
    matrix = [[0.2990, 0.5870, 0.1140], [-0.1687, -0.3313, 0.5000], [0.5000, -0.4187, -0.0813]]
    shifted = ybr.astype(np.float64) - np.array([0, (top + 1) / 2, (top + 1) / 2])
    return np.clip(np.rint(shifted @ np.linalg.inv(matrix).T), 0, top)


class FrameFacts:
    """Where an attribute of a frame is found: its own functional groups, the shared ones, the top level."""

    def __init__(self, dataset, number):
        own = dataset.get("PerFrameFunctionalGroupsSequence", [])
        groups = [own[number]] if len(own) > number else []
        groups += list(dataset.get("SharedFunctionalGroupsSequence", []))
        macros = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
        self.places = [item for group in groups for macro in macros for item in group.get(macro, [])] + [dataset]

    def first(self, keyword):
        """Return the first value as a float, or None."""
        for place in self.places:
            value = place.get(keyword)
            if value not in (None, ""):
                value = value[0] if isinstance(value, (list, pydicom.multival.MultiValue)) else value
                return float(value)
        return None

    def text(self, keyword):
        return next((str(place.get(keyword)) for place in self.places if place.get(keyword)), "")


def padding(stored, dataset):
    """PS3.3, C.7.5.1.1.2: one value, or a range of values, that is not part of the image."""
    low = dataset.get("PixelPaddingValue")
    if low is None:
        return np.zeros(stored.shape, bool)
    high = dataset.get("PixelPaddingRangeLimit", low)
    return (stored >= min(low, high)) & (stored <= max(low, high))


def modality_values(stored, dataset, facts):
    """PS3.3, C.11.1: the modality LUT, else stored x slope + intercept."""
    if dataset.get("ModalityLUTSequence"):
        return looked_up(stored, dataset.ModalityLUTSequence[0], dataset)[0]
    slope, intercept = facts.first("RescaleSlope"), facts.first("RescaleIntercept")
    return stored.astype(np.float64) * (1 if slope is None else slope) + (intercept or 0)


def looked_up(values, item, dataset):
    """PS3.3, C.11.1.1 and C.11.2.1.1, value by value: (entries, the largest that an entry can be)."""
    count, first, depth = (int(number) for number in item.LUTDescriptor)
    count, entries = count or 65536, item.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if syntax_of(dataset).is_little_endian else ">u2").tolist()
    table = {value: entries[min(max(int(value) - first, 0), count - 1)] for value in np.unique(values)}
    return np.vectorize(table.get, otypes=[np.float64])(values), 2.0**depth - 1


def palette(stored, dataset):
    """PS3.3, C.7.6.3.1.5 and .6, segments of PS3.3, C.7.9.2 expanded: 8-bit colours."""
    colours = []
    for name in ("Red", "Green", "Blue"):
        count, first, depth = dataset[f"{name}PaletteColorLookupTableDescriptor"].value
        data = dataset.get(f"{name}PaletteColorLookupTableData")
        packed = data if data is not None else dataset[f"Segmented{name}PaletteColorLookupTableData"].value
        wide = depth == 16 if data is None else len(packed) >= 2 * (count or 65536)
        order = "<u2" if syntax_of(dataset).is_little_endian else ">u2"
        entries = np.frombuffer(packed, order if wide else np.uint8).astype(int).tolist()
        entries = expanded(entries) if data is None else entries
        table = {value: entries[min(max(int(value) - first, 0), (count or 65536) - 1)] for value in np.unique(stored)}
        colours.append(np.vectorize(table.get, otypes=[np.float64])(stored) * 255 / (2**depth - 1))
    return np.rint(np.stack(colours, -1))


def expanded(words):
    """PS3.3, C.7.9.2.1 and .2: discrete segments (0) are copied, linear ones (1) go in a line to their end."""
    entries, place = [], 0
    while place + 1 < len(words):
        kind, length = words[place], words[place + 1]
        if kind == 0:
            entries += words[place + 2 : place + 2 + length]
            place += 2 + length
        elif kind == 1:
            start, end = entries[-1], words[place + 2]
            entries += [int(np.rint(start + (end - start) * (step + 1) / length)) for step in range(length)]
            place += 3
        else:
            raise NotImplementedError("indirect segments")
    return entries


def displayed(values, dataset, facts, outside, bits):
    """PS3.3, C.11.2: VOI LUT, else window, else all of 8 bits, else the 0.5 and 99.5 percentiles."""
    if dataset.get("VOILUTSequence"):
        entries, top = looked_up(values, dataset.VOILUTSequence[0], dataset)
        return entries / top
    centre, width = facts.first("WindowCenter"), facts.first("WindowWidth")
    if centre is not None and width is not None:
        return windowed(values, centre, width, facts.text("VOILUTFunction") or "LINEAR")
    if bits <= 8 and not dataset.get("ModalityLUTSequence") and facts.first("RescaleSlope") in (None, 1.0):
        least = -(2.0 ** (bits - 1)) if dataset.PixelRepresentation == 1 else 0.0
        return (values - least) / (2.0**bits - 1)
    low, high = np.percentile(values[~outside], [0.5, 99.5])
    return np.clip((values - low) / (high - low), 0, 1)


def windowed(values, centre, width, function):
    """PS3.3, C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT), each as printed there."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        inner = (values - centre) / width + 0.5
        return np.where(values <= centre - width / 2, 0, np.where(values > centre + width / 2, 1, inner))
    inner = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    below, above = values <= centre - 0.5 - (width - 1) / 2, values > centre - 0.5 + (width - 1) / 2
    return np.where(below, 0.0, np.where(above, 1.0, inner))


def simpleitk_difference(data, pictures):
    """Largest difference of grey scanner values from SimpleITK's; None where it reads another kind of picture."""
    theirs = by_simpleitk(data)
    ours = np.stack([picture.values for picture in pictures]).astype(np.float64)
    return float(np.abs(theirs - ours).max()) if theirs.shape == ours.shape else None
