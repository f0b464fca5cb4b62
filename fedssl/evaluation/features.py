"""Features of images: of a frozen encoder, and of baselines that have seen no training."""

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

from fedssl import progress
from fedssl.augment import centre_view
from fedssl.data.batches import as_images
from fedssl.data.cache import ImageStore

_CHUNK = 128
_PIXEL_EDGE = 32
_PIXEL_COMPONENTS = 64


@torch.no_grad()
def embed(encoder: nn.Module, store: ImageStore, rows: np.ndarray, *, edge: int) -> Float[np.ndarray, "images width"]:
    """Frozen features of whole images without augmentation.

    Args:
        encoder: in any mode; it is evaluated in inference mode.
        store: the images.
        rows: which ones, in which order.
        edge: pixels on a side of the encoder's input.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = []
    for start in range(0, len(rows), _CHUNK):
        images = as_images(store.pixels[rows[start : start + _CHUNK]]).to(device)
        parts.append(encoder(centre_view(images, edge=edge)).float().cpu())
        progress.publish(progress.Done("embedding images", min(start + _CHUNK, len(rows)), len(rows)))
    return torch.cat(parts).numpy()


def raw_pixels(store: ImageStore, rows: np.ndarray, fit_on: np.ndarray) -> Float[np.ndarray, "images width"]:
    """Principal components of the images at 32 x 32 pixels, fitted without labels on the rows ``fit_on``."""
    small = _small(store, rows)
    reference = _small(store, fit_on)
    components = min(_PIXEL_COMPONENTS, *reference.shape)
    return PCA(components, svd_solver="full").fit(reference).transform(small).astype(np.float32)


def _small(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images pixels"]:
    images = as_images(store.pixels[rows])
    return F.interpolate(images, size=_PIXEL_EDGE, mode="bilinear", antialias=True).flatten(1).numpy()


def intensity_statistics(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images width"]:
    """Mean, standard deviation, share of black and five percentiles of each image's grey values."""
    pixels = store.pixels[rows].reshape(len(rows), -1).astype(np.float32) / 65535.0
    moments = np.stack([pixels.mean(1), pixels.std(1), (pixels <= 0).mean(1)], 1)
    return np.concatenate([moments, np.percentile(pixels, [5, 25, 50, 75, 95], axis=1).T], 1).astype(np.float32)


def metadata(
    store: ImageStore, rows: np.ndarray, covariates: Float[np.ndarray, "images extra"]
) -> Float[np.ndarray, "images width"]:
    """What is known without looking at the image: site, modality, scanner, size, place in the series, covariates."""
    columns = [covariates]
    for name in ("site", "modality", "scanner"):
        values = store.column(name)[rows]
        columns.append((values[:, None] == np.unique(values)[None, :]).astype(np.float32))
    columns += [store.column(name)[rows, None].astype(np.float32) for name in ("rows", "columns")]
    columns.append(_place_in_series(store)[rows, None])
    return np.concatenate(columns, 1).astype(np.float32)


def _place_in_series(store: ImageStore) -> Float[np.ndarray, " images"]:
    """Rank of each image in its series by instance number and frame, from 0 to 1."""
    series = np.unique(store.column("series"), return_inverse=True)[1]
    order = np.lexsort([store.column("frame"), store.column("instance"), series])
    counts = np.bincount(series)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(series), np.float32)
    place[order] = (np.arange(len(series)) - starts) / np.maximum(np.repeat(counts, counts) - 1, 1)
    return place
