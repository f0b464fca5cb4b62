"""A sheet of the images nearest to some prototypes. It shows images: for simulations only, never sent anywhere."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from fedssl.data.cache import ImageStore
from fedssl.methods.base import Method
from fedssl.storage import atomic_file

_PROTOTYPES, _IMAGES, _GAP = 12, 8, 4


@torch.no_grad()
def write_sheet(
    path: Path,
    method: Method,
    store: ImageStore,
    rows: Int[np.ndarray, " images"],
    features: Float[np.ndarray, "images width"],
) -> None:
    """Write a PNG with a row for each of the most used prototypes: the nearest images, each of another patient.

    Args:
        path: the PNG.
        method: trained, with prototypes.
        store: the images.
        rows: rows of the store that ``features`` belong to.
        features: of the method's encoder.
    """
    device = next(method.parameters()).device
    method.eval()
    scores = method.prototype_scores(torch.from_numpy(features).to(device)).float().cpu().numpy()
    used = np.bincount(scores.argmax(1), minlength=scores.shape[1])
    patients = store.column("patient")[rows]
    edge = store.shards.edge
    strips = []
    for prototype in np.argsort(-used, kind="stable")[: min(_PROTOTYPES, int((used > 0).sum()))]:
        nearest = np.argsort(-scores[:, prototype], kind="stable")
        first = np.sort(np.unique(patients[nearest], return_index=True)[1])[:_IMAGES]
        strip = np.full((edge, _IMAGES * (edge + _GAP)), 255, np.uint8)
        for column, row in enumerate(rows[nearest[first]]):
            strip[:, column * (edge + _GAP) : column * (edge + _GAP) + edge] = _shown(store, int(row))
        strips += [strip, np.full((_GAP, strip.shape[1]), 255, np.uint8)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(strips)).save(buffer, "PNG", optimize=True)
    with atomic_file(path, "the sheet of prototypes") as stream:
        stream.write(buffer.getvalue())


def _shown(store: ImageStore, row: int) -> UInt8[np.ndarray, "edge edge"]:
    return np.rint(store.read(np.array([row])).shown()[0].mean(0) * 255.0).astype(np.uint8)
