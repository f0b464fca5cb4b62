"""Groups of modalities: what is clustered apart, and what has views of its own."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

RADIOGRAPHY, CT, MR, ULTRASOUND, OTHER = range(5)
MODALITIES = ("radiography", "ct", "mr", "ultrasound", "other")
_GROUP_OF = {
    **dict.fromkeys(("CR", "DX", "DR", "RG", "MG", "PX", "IO", "RF", "XA"), RADIOGRAPHY),
    "CT": CT,
    "MR": MR,
    **dict.fromkeys(("US", "IVUS", "BDUS"), ULTRASOUND),
}


def modality_groups(modalities: Iterable[str]) -> Int[np.ndarray, " images"]:
    """Return the group of each image, a position in ``MODALITIES``, from Modality (0008,0060) or a manifest's column.

    Projections with X-rays are one group, whatever made them; what is not known is ``other``.
    """
    return np.array([_GROUP_OF.get(name.strip().upper(), OTHER) for name in modalities], np.int64)
