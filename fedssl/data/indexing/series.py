"""Facts that need a whole series: the order of its images and the range in which it is shown."""

import numpy as np
from jaxtyping import Float, Int

from fedssl.data.decoding.record import LEVELS


def series_order(
    series: np.ndarray, position: Float[np.ndarray, " images"], instance: Int[np.ndarray, " images"]
) -> tuple[Int[np.ndarray, " images"], Int[np.ndarray, " images"]]:
    """Rank the images of each series and count them.

    By position along the slice's normal (from ImagePositionPatient, (0020,0032)) where all images of the series have
    one, else by InstanceNumber (0020,0013); ties keep the order of the rows.

    Returns:
        (rank from 0, images in the series), each [images].
    """
    codes = np.unique(series, return_inverse=True)[1]
    counts = np.bincount(codes)
    placed = np.bincount(codes, weights=~np.isnan(position)) == counts
    key = np.where(placed[codes], position, instance.astype(np.float64))
    order = np.lexsort([np.arange(len(codes)), key, codes])
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(starts, counts)
    return rank, counts[codes]


def series_range(
    series: np.ndarray, quantiles: Float[np.ndarray, "images levels"], pixels: Int[np.ndarray, " images"]
) -> tuple[Float[np.ndarray, " images"], Float[np.ndarray, " images"]]:
    """The 0.5 and 99.5 percentiles of all pixels of each series, from the percentiles of its images.

    The distribution functions of the images are averaged, weighted by their pixels, on the union of their quantiles.
    """
    low, high = np.empty(len(series)), np.empty(len(series))
    codes = np.unique(series, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        low[rows], high[rows] = _pooled(quantiles[rows], pixels[rows])
    return low, high


def _pooled(quantiles: Float[np.ndarray, "images levels"], pixels: Int[np.ndarray, " images"]) -> tuple[float, float]:
    if len(quantiles) == 1:
        return float(quantiles[0, LEVELS.index(0.005)]), float(quantiles[0, LEVELS.index(0.995)])
    grid = np.unique(np.quantile(quantiles, np.linspace(0, 1, 257)))
    weights = pixels / pixels.sum()
    share = sum(
        weight * np.interp(grid, *_rising(row), left=0.0, right=1.0)
        for weight, row in zip(weights, quantiles, strict=True)
    )
    return float(np.interp(0.005, share, grid)), float(np.interp(0.995, share, grid))


def _rising(row: Float[np.ndarray, " levels"]) -> tuple[np.ndarray, np.ndarray]:
    """A distribution function as rising points: at a step (many equal values) the upper share counts."""
    values, last = np.unique(row[::-1], return_index=True)
    return values, np.asarray(LEVELS)[::-1][last]
