"""One file of any kind -> its facts and its pictures."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fedssl.data.decoding import dicom, raster
from fedssl.data.decoding.burned_in import Policy
from fedssl.data.decoding.dicom import Header
from fedssl.data.decoding.picture import Picture, shown

VOLUME_SUFFIXES = (".nii", ".nii.gz")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


def open_file(
    data: bytes, name: str, *, modality: str = "", policy: Policy = Policy.ALLOW
) -> tuple[Header, Iterator[Picture]] | None:
    """Tell what a file is and decode it lazily.

    Args:
        data: its bytes.
        name: its name; decides for files that do not say what they are.
        modality: what the site says it is, or empty.
        policy: what to do with images that may show burned-in text.

    Returns:
        Facts and pictures, or None for a file that is no image.

    Raises:
        ValueError: it is an image that cannot be used; the message says why.
        Exception: whatever a parser raises for a damaged file.
    """
    lower = name.lower()
    if not data and recognised(lower):
        raise ValueError("is empty (0 bytes)")
    if dicom.is_dicom(data) or lower.endswith(_DICOM_SUFFIXES):
        dataset = dicom.parse(data)
        return dicom.header(dataset, policy), dicom.pictures(dataset, policy)
    if lower.endswith(VOLUME_SUFFIXES):
        from fedssl.data.decoding import nifti  # nibabel takes a while to import and most sites have no volume

        compressed = lower.endswith(".gz")
        return _plain(modality), nifti.pictures(data, compressed=compressed, modality=modality)
    if Path(lower).suffix in raster.SUFFIXES:
        return _plain(modality), raster.pictures(data)
    return None


def recognised(lower_name: str) -> bool:
    """Tell whether a name alone says that the file should be an image."""
    return lower_name.endswith((*_DICOM_SUFFIXES, *VOLUME_SUFFIXES, *raster.SUFFIXES))


def _plain(modality: str) -> Header:
    return Header("", "", "", modality or "unknown", "", "", 0, "")


def read_frames(path: Path, modality: str = "") -> list[Float[np.ndarray, "..."]]:
    """Decode every frame of a file to grey (or colour) values from 0 to 1, each scaled by itself.

    Raises:
        Exception: whatever ``open_file`` raises.
    """
    opened = open_file(path.read_bytes(), path.name, modality=modality)
    if opened is None:
        raise ValueError("is no image file that fedssl knows (DICOM, NIfTI, PNG, JPEG, TIFF)")
    return [shown(picture) for picture in opened[1]]
