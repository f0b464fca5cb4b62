"""DICOM Part 10 files: the facts of the header, and the pictures of its frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from fedssl.data.decoding.burned_in import Policy, masked, refuse_by_policy, risk, scan_regions
from fedssl.data.decoding.codestream import refuse_bomb, refuse_other_size
from fedssl.data.decoding.dicom_frames import picture_of
from fedssl.data.decoding.picture import Picture, refuse_absurd

_NO_PICTURES_OF_PATIENTS = {
    "SEG": "a segmentation", "RTDOSE": "a dose map", "RTSTRUCT": "contours", "RTPLAN": "a treatment plan",
    "PR": "a presentation state", "KO": "a key object note", "SR": "a report", "REG": "a registration",
}  # fmt: skip
_MOST_INFLATED = 2**30
_MOST_LETTERS = 64  # of a CS, SH or LO value (PS3.5, table 6.2-1)
_FASTEST = {JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls"}  # half of GDCM's time
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


@dataclass(frozen=True)
class Header:
    """Facts of one file. ``patient``, ``study`` and ``series`` are raw: pseudonymise before storing. No date is read.

    ``risk`` says why the pixels may show text, see ``fedssl.data.decoding.burned_in``.
    """

    patient: str
    study: str
    series: str
    modality: str
    scanner: str
    description: str
    instance: int
    risk: str


def is_dicom(start: bytes) -> bool:
    """Tell whether bytes start with the 128-byte preamble and ``DICM`` (PS3.10, section 7.1)."""
    return start[128:132] == b"DICM"


def parse(data: bytes) -> Dataset:
    """Parse the bytes of a file; without file meta information (old archives) the encoding is guessed by pydicom.

    Raises:
        ValueError: no DICOM, no picture of a patient, or deflated beyond all measure.
    """
    if is_dicom(data):
        _refuse_bombs(data)
    dataset = dcmread(BytesIO(data), force=True)
    if not is_dicom(data) and ("SOPClassUID" not in dataset or "Rows" not in dataset):
        raise ValueError("is no DICOM file (the DICM mark is missing)")
    kind = _NO_PICTURES_OF_PATIENTS.get(str(dataset.get("Modality") or ""))
    if kind:
        raise ValueError(f"holds {kind}, which is no image of a patient")
    return with_transfer_syntax(dataset)


def with_transfer_syntax(dataset: Dataset) -> Dataset:
    """Give a data set without file meta information the transfer syntax that it was read with."""
    meta = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta = meta if meta is not None else FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _refuse_bombs(data: bytes) -> None:
    """Of deflated files only the group 0002 is plain (PS3.10, 7.1)."""
    if DeflatedExplicitVRLittleEndian.encode() not in data:
        return
    stream = BytesIO(data)
    stream.seek(132)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)  # noqa: FBT003
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        refuse_bomb(data[stream.tell() :], _MOST_INFLATED)


def header(dataset: Dataset, policy: Policy = Policy.ALLOW) -> Header:
    """Read the facts of a parsed file.

    Raises:
        ValueError: it holds no image, or the policy for burned-in text refuses it.
    """
    if "Rows" not in dataset or "Columns" not in dataset or not any(name in dataset for name in _PIXELS):
        raise ValueError("holds no image (no Rows, Columns or PixelData)")
    return Header(
        patient=str(dataset.get("PatientID") or "").strip(),
        study=str(dataset.get("StudyInstanceUID") or ""),
        series=str(dataset.get("SeriesInstanceUID") or ""),
        modality=str(dataset.get("Modality") or "unknown")[:_MOST_LETTERS],
        scanner=_scanner(dataset),
        description=str(dataset.get("SeriesDescription") or "").strip()[:_MOST_LETTERS],
        instance=_instance(dataset),
        risk=refuse_by_policy(dataset, policy),
    )


def _scanner(dataset: Dataset) -> str:
    words = (str(dataset.get(tag) or "") for tag in ("Manufacturer", "ManufacturerModelName"))
    return " ".join(words).strip()[: 2 * _MOST_LETTERS]


def _instance(dataset: Dataset) -> int:
    """InstanceNumber (0020,0013), or 0 where it is no number that an IS can hold (PS3.5, table 6.2-1)."""
    try:
        number = int(dataset.get("InstanceNumber") or 0)
    except (TypeError, ValueError, OverflowError):
        return 0
    return number if abs(number) < 2**31 else 0


def pictures(dataset: Dataset, policy: Policy = Policy.ALLOW) -> Iterator[Picture]:
    """Decode frame by frame, so that a long cine never lies in memory at once.

    YBR becomes RGB and signed, packed, planar and unused bits are put right by pydicom's decoders (PS3.3, C.7.6.3;
    PS3.5, 8.1). What the values mean is decided by ``fedssl.data.decoding.dicom_frames.picture_of``.

    Raises:
        ValueError: the sizes are absurd, or the pixel data are shorter than the header says.
        Exception: whatever a decoder raises; the caller records its type.
    """
    size = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    refuse_absurd(*size, frames)
    _refuse_short(dataset, size, frames)
    regions = scan_regions(dataset) if policy is Policy.MASK and risk(dataset) else []
    for number, stored in enumerate(_stored(dataset, frames)):
        yield picture_of(masked(stored, regions) if regions else stored, dataset, number)


def _stored(dataset: Dataset, frames: int) -> Iterator[np.ndarray]:
    """Decode with the decoder that was measured to be the fastest, and where that fails with all others in turn."""
    fastest = _FASTEST.get(dataset.file_meta.TransferSyntaxUID)
    if fastest is None:
        yield from iter_pixels(dataset, indices=range(frames))
        return
    for number in range(frames):
        try:
            yield next(iter_pixels(dataset, indices=[number], decoding_plugin=fastest))
        except Exception:  # noqa: BLE001 - decoders raise anything
            yield next(iter_pixels(dataset, indices=[number]))


def _refuse_short(dataset: Dataset, size: tuple[int, int, int], frames: int) -> None:
    syntax = dataset.file_meta.TransferSyntaxUID
    get_decoder(syntax)  # raises for what is no image transfer syntax
    data = next(dataset[name].value for name in _PIXELS if name in dataset)
    if syntax.is_encapsulated:
        offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
        table = offsets if None not in offsets else None
        for codestream in generate_frames(data, number_of_frames=frames, extended_offsets=table):
            refuse_other_size(codestream, *size[:2])
        return
    bits = frames * size[0] * size[1] * size[2] * int(dataset.get("BitsAllocated") or 8)
    expected = (bits * 2 // 3 if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" else bits + 7) // 8
    if len(data) < expected:
        raise ValueError("holds fewer pixels than its header says: it is cut off, or its header is wrong")
