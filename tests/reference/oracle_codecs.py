"""Stored values of DICOM frames by other hands: plain numpy, pydicom's plugins one by one, Debian's dcmtk, SimpleITK.

Every reader answers ``[(photometric interpretation of what it returns, values), ...]``, one pair for each frame asked.
"""

import contextlib
import io
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

_DCMTK = {
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), "dcmdjpeg"),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "dcmdjpls"),
    RLELossless: "dcmdrle",
}
LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEG2000}  # near-lossless JPEG-LS decodes to the same bits everywhere


def read(data):
    """Parse without a word of warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(io.BytesIO(data), force=True)


def syntax_of(dataset):
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and "TransferSyntaxUID" in meta:
        return meta.TransferSyntaxUID
    implicit, _little = dataset.original_encoding
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def frames_of(dataset):
    return int(dataset.get("NumberOfFrames") or 1)


def numbers(dataset):
    """All frames of a short file; the first, the middle and the last of a long one."""
    count = frames_of(dataset)
    return list(range(count)) if count <= 10 else [0, count // 2, count - 1]


def by_numpy(dataset):
    """Read uncompressed values as PS3.5, 8.1 and PS3.3, C.7.6.3.1 describe them."""
    values = _cells(dataset)
    rows, columns, samples = dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1)
    photometric, count = dataset.PhotometricInterpretation, frames_of(dataset)
    if photometric == "YBR_FULL_422" and values.size < count * rows * columns * 3:
        pairs = values[: count * rows * columns * 2].reshape(count, rows, columns // 2, 4)  # Y1 Y2 CB CR
        full = np.empty((count, rows, columns, 3), values.dtype)
        full[:, :, 0::2, 0], full[:, :, 1::2, 0] = pairs[..., 0], pairs[..., 1]
        full[:, :, 0::2, 1:] = full[:, :, 1::2, 1:] = pairs[..., 2:]
        return [(photometric, full[number]) for number in numbers(dataset)]
    values = values[: count * rows * columns * samples]
    if samples == 1:
        frames = values.reshape(count, rows, columns)
    elif dataset.get("PlanarConfiguration", 0) == 0:
        frames = values.reshape(count, rows, columns, samples)
    else:
        frames = values.reshape(count, samples, rows, columns).transpose(0, 2, 3, 1)
    return [(photometric, frames[number]) for number in numbers(dataset)]


def _cells(dataset):
    """Bytes -> numbers, the bits above BitsStored cleared and the sign extended."""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        floats = np.float32 if "FloatPixelData" in dataset else np.float64
        return np.frombuffer(dataset.get("FloatPixelData", dataset.get("DoubleFloatPixelData")), floats)
    data, allocated, stored = dataset.PixelData, dataset.BitsAllocated, dataset.BitsStored
    big = not syntax_of(dataset).is_little_endian
    if allocated == 1:
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if allocated == 8 and big and dataset["PixelData"].VR == "OW":
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()  # words, not bytes, are stored big end first
    whole = np.frombuffer(data[: len(data) // (allocated // 8) * (allocated // 8)], f"{'<>'[big]}u{allocated // 8}")
    whole = whole.astype(np.int64) & ((1 << stored) - 1)
    if dataset.PixelRepresentation == 1:
        whole = np.where(whole >= 1 << (stored - 1), whole - (1 << stored), whole)
    return whole


def by_plugin(dataset, plugin):
    """Decode with one named plugin of pydicom, colours left as they are."""
    decoder, answers = get_decoder(syntax_of(dataset)), []
    for number in numbers(dataset):
        values, said = decoder.as_array(dataset, index=number, raw=True, decoding_plugin=plugin)
        answers.append((said["photometric_interpretation"], values))
    return answers


def by_dcmtk(data, dataset):
    """Decompress with dcmtk's command line and read the result in plain numpy."""
    tool = shutil.which(_DCMTK.get(syntax_of(dataset), "no tool"))
    if tool is None:
        raise LookupError("no tool of dcmtk for this transfer syntax")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.dcm"), Path(folder, "out.dcm")
        source.write_bytes(data)
        done = subprocess.run([tool, str(source), str(target)], capture_output=True, check=False, timeout=60)
        if done.returncode != 0 or not target.exists():
            raise LookupError("dcmtk refuses it")
        return by_numpy(read(target.read_bytes()))


def by_simpleitk(data):
    """Read with SimpleITK (GDCM inside): values after the rescale, [frames, rows, columns] or with colours."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder, _muted():
        source = Path(folder, "in.dcm")
        source.write_bytes(data)
        image = SimpleITK.ReadImage(str(source))
    values = SimpleITK.GetArrayFromImage(image)
    return values if image.GetDimension() == 3 else values[None]


class _muted:  # noqa: N801 - reads as a verb
    """GDCM writes to the file descriptor of stderr, past Python."""

    def __enter__(self):
        self.kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, 2)
        os.close(void)

    def __exit__(self, *_):
        os.dup2(self.kept, 2)
        os.close(self.kept)


def references(data):
    """Ask every reader that is not the chain's own first choice: name -> frames; and the name of the chain's own."""
    dataset = read(data)
    if not syntax_of(dataset).is_encapsulated:
        return {"numpy": by_numpy(dataset)}, "native"
    found, own = {}, ""
    for plugin in get_decoder(syntax_of(dataset)).available_plugins:
        try:
            with warnings.catch_warnings(), _muted():
                warnings.simplefilter("ignore")
                answer = by_plugin(dataset, plugin)
        except Exception:  # noqa: BLE001 - a plugin that cannot is no reference
            continue
        own, found[plugin] = own or plugin, answer
    with contextlib.suppress(LookupError):
        found["dcmtk"] = by_dcmtk(data, dataset)
    return {name: answer for name, answer in found.items() if name != own}, own
