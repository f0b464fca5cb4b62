"""DICOM files made by hand: the pixels and the attributes that a test names, nothing else of interest."""

import io
import warnings

import numpy as np
from oracle_dicom import decoded, judge, tolerance
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)


def made(pixels, syntax=ExplicitVRLittleEndian, *, frames=0, **facts):
    """Make a data set of ``pixels``: [rows, columns], [rows, columns, 3], or with frames in front if ``frames``."""
    pixels = np.asarray(pixels)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid(entropy_srcs=["fedssl"])
    dataset.Modality = "OT"
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    if frames:
        dataset.NumberOfFrames = frames
    colour = pixels.ndim == (4 if frames else 3)
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in facts.items():
        setattr(dataset, keyword, value)
    return dataset


def file_of(dataset):
    """Write a data set as the bytes of a Part 10 file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def compressed(dataset, syntax):
    """Compress in place with a named encoder: GDCM's RLE encoder ends the process on some odd sizes."""
    plugin = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}[syntax]
    dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)


def pictures_of(dataset):
    """Decode with fedssl; a refusal fails the test with its reason."""
    pictures, reason, _ = decoded(file_of(dataset), "made.dcm")
    assert pictures, reason
    return pictures


def values_of(dataset):
    """Return the values of the only picture."""
    (picture,) = pictures_of(dataset)
    return picture.values


def agrees(dataset):
    """Assert that every reference and the textbook chain see what fedssl sees."""
    verdict = judge(file_of(dataset), "made.dcm")
    assert verdict.pictures, verdict.reason
    assert verdict.differences
    assert max(verdict.differences.values()) <= tolerance(verdict), verdict.differences
    return verdict.pictures


def table(first, depth, entries, *, packed=""):
    """Make an item of a modality or VOI LUT sequence; ``packed`` is the byte order of words written as OW."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, depth])
    if packed:
        item.add_new("LUTData", "OW", np.asarray(entries).astype(f"{packed}u2").tobytes())
    else:
        item.add_new("LUTData", "US", [int(entry) for entry in entries])
    item.ModalityLUTType = "US"
    return item


def with_palette(dataset, entries, *, first=0, depth=8, packed="u1"):
    """Add a red palette of ``entries``, a green one of half of them and a blue one in reverse."""
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    entries = np.asarray(entries)
    for name, colour in (("Red", entries), ("Green", entries // 2), ("Blue", entries[::-1])):
        tag = f"{name}PaletteColorLookupTableDescriptor"
        dataset.add_new(tag, "SS" if first < 0 else "US", [len(entries), first, depth])
        data = colour.astype(packed).tobytes()
        dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", data + b"\0" * (len(data) % 2))
    return dataset
