"""Features of images: of a frozen encoder, and of baselines that have seen no training."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from fedssl import progress
from fedssl.augment import centre_view
from fedssl.data.batches import image_batch
from fedssl.data.cache import ImageStore

PIXELS, STATISTICS, METADATA = BASELINES = ("raw pixels (PCA)", "grey-value statistics", "metadata only")
_CHUNK = 128
_PIXEL_EDGE = 32
_PIXEL_COMPONENTS = 64


@torch.no_grad()
def embed(
    encoder: nn.Module,
    store: ImageStore,
    rows: np.ndarray,
    *,
    edge: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Float[np.ndarray, "images width"]:
    """Frozen features of whole images without augmentation.

    Args:
        encoder: in any mode; it is evaluated in inference mode.
        store: the images.
        rows: which ones, in which order.
        edge: pixels on a side of the encoder's input.
        change: of the images, [batch, channels, edge, edge] from 0 to 1, before they are shown to the encoder.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    parts = []
    for start in range(0, len(rows), _CHUNK):
        images = image_batch(store.read(rows[start : start + _CHUNK])).shown().to(device)
        seen = images if change is None else change(images)
        parts.append(encoder(centre_view(seen, edge=edge)).float().cpu())
        progress.publish(progress.Done("embedding images", min(start + _CHUNK, len(rows)), len(rows)))
    return torch.cat(parts).numpy()


def raw_pixels(store: ImageStore, rows: np.ndarray, fit_on: np.ndarray) -> Float[np.ndarray, "images width"]:
    """Principal components of the images at 32 x 32 pixels, fitted without labels on the rows ``fit_on``."""
    small = _small(store, rows)
    reference = _small(store, fit_on)
    components = min(_PIXEL_COMPONENTS, *reference.shape)
    return PCA(components, svd_solver="full").fit(reference).transform(small).astype(np.float32)


def _small(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images pixels"]:
    """Chunk by chunk, so that a large set is never whole in memory at its full size."""
    return np.concatenate([_shrunk(store, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)])


def _shrunk(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images pixels"]:
    images = image_batch(store.read(rows)).shown()
    return F.interpolate(images, size=_PIXEL_EDGE, mode="bilinear", antialias=True).flatten(1).numpy()


def intensity_statistics(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images width"]:
    """Mean, standard deviation, share of black and five percentiles of each image's grey values."""
    return np.concatenate([_statistics(store, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)])


def _statistics(store: ImageStore, rows: np.ndarray) -> Float[np.ndarray, "images width"]:
    pixels = store.read(rows).shown().reshape(len(rows), -1)
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
    length = np.maximum(store.column("series_length")[rows] - 1, 1)
    columns.append((store.column("order")[rows] / length)[:, None].astype(np.float32))
    return np.concatenate(columns, 1).astype(np.float32)


def baselines(
    store: ImageStore,
    rows: np.ndarray,
    train: Bool[np.ndarray, " images"],
    covariates: Float[np.ndarray, "images extra"],
) -> dict[str, Float[np.ndarray, "images _width"]]:
    """Features that have seen no training, by name: what every encoder must beat.

    Args:
        store: the images.
        rows: [images] which ones.
        train: [images] those that the components of the pixels are fitted on.
        covariates: see ``metadata``.
    """
    return {
        PIXELS: raw_pixels(store, rows, rows[train]),
        STATISTICS: intensity_statistics(store, rows),
        METADATA: metadata(store, rows, covariates),
    }
