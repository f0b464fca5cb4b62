"""Text in the pixels: which DICOM images may show a patient's name, and what can be done about it."""

from enum import StrEnum

import numpy as np
from jaxtyping import Shaped
from pydicom import Dataset

_ULTRASOUND = {"US", "IVUS"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame children .1 to .4 (PS3.4, table B.5-1)
_SCREEN_WORDS = {"SCREENSAVE", "SCREEN SAVE", "SCREENSHOT", "SCREEN_CAPTURE", "SCREEN CAPTURE"}


class Policy(StrEnum):
    """What to do with an image that may show text: ``refuse`` it, ``mask`` all but the scan itself, ``allow`` it."""

    REFUSE = "refuse"
    MASK = "mask"
    ALLOW = "allow"


def risk(dataset: Dataset) -> str:
    """Say why an image may show burned-in text, or return an empty string.

    Overlays (60xx,3000) and screenshots (ImageType (0008,0008)) are at risk whatever the header states; for the others
    BurnedInAnnotation (0028,0301) decides where it is given. Without it, ultrasound and secondary captures (by SOP
    class (0008,0016) or ConversionType (0008,0064)) are at risk.
    """
    stated = str(dataset.get("BurnedInAnnotation") or "").upper()
    if stated == "YES":
        return "said to have burned-in text"
    kind = dataset.get("ImageType") or ()
    if _SCREEN_WORDS & {str(word).upper() for word in ([kind] if isinstance(kind, str) else kind)}:
        return "screenshot"
    found = "" if stated == "NO" else _unstated(dataset)
    return found or ("overlay" if _has_overlay(dataset) else "")


def _unstated(dataset: Dataset) -> str:
    if str(dataset.get("Modality") or "") in _ULTRASOUND:
        return "ultrasound without a statement"
    if f"{dataset.get('SOPClassUID')}.".startswith(f"{_SECONDARY_CAPTURE}.") or dataset.get("ConversionType"):
        return "secondary capture without a statement"
    return ""


def _has_overlay(dataset: Dataset) -> bool:
    """Tell whether any repeating group 6000 to 60FE holds overlay data (PS3.3, C.9.2)."""
    return any(tag & 0xFF00FFFF == 0x60003000 for tag in dataset.keys())  # noqa: SIM118 - no element is decoded


def scan_regions(dataset: Dataset) -> list[tuple[int, int, int, int]]:
    """Return (top, bottom, left, right), ends included, of SequenceOfUltrasoundRegions (0018,6011)."""
    regions = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or ():
        corners = [item.get(f"RegionLocation{end}") for end in ("MinY0", "MaxY1", "MinX0", "MaxX1")]
        if None not in corners:
            top, bottom, left, right = (int(corner) for corner in corners)
            regions.append((top, bottom, left, right))
    return regions


def masked(values: Shaped[np.ndarray, "..."], regions: list[tuple[int, int, int, int]]) -> Shaped[np.ndarray, "..."]:
    """Blank everything outside the regions with the smallest value of the image."""
    blank = np.full_like(values, values.min())
    for top, bottom, left, right in regions:
        inside = slice(max(top, 0), bottom + 1), slice(max(left, 0), right + 1)
        blank[inside] = values[inside]
    return blank


def refuse_by_policy(dataset: Dataset, policy: Policy) -> str:
    """Return the risk of an image that is let through (empty: none).

    Raises:
        ValueError: the policy refuses it; or it asks for a mask and the place of the text is unknown.
    """
    found = risk(dataset)
    if not found or policy is Policy.ALLOW:
        return found
    if policy is Policy.REFUSE:
        raise ValueError(f"is refused: may show text in the pixels ({found})")
    if found != "overlay" and not scan_regions(dataset):
        raise ValueError(f"is refused: may show text in the pixels ({found}) and does not say where the scan is")
    return found
