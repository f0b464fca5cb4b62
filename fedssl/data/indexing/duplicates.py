"""Images that are there twice: the same pixels, nearly the same, or the same turned by 90 degrees.

Near duplicates share one of eight 32-bit bands of their 256-bit difference hash, differ in at most ``MOST_BITS`` of
it, and their fine structure (what a Gaussian of 1.5 pixels at 96 pixels a side takes away) correlates. Anatomy makes
patients alike; noise and texture do not repeat. Measured at 96 pixels: copies at half size .92, JPEG of quality 40 .97
(medians); the most alike of unrelated patients .62 in brain MR, .78 in the synthetic hospitals (docs/experiments.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt32
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fedssl import progress
from fedssl.data.decoding.record import shrunk

MOST_BITS = 16
LEAST_EDGES = 32  # set bits: below, an image has too little structure to be told from others
LEAST_CORRELATION = 0.88
LEAST_EDGE = 64  # pixels on a side: smaller records do not keep enough fine structure, and only exact copies are found
_FINE_EDGE, _FINE_SIGMA = 96, 1.5
_CHUNK = 2**16
_NOTICE_EVERY = 1000
_NEIGHBOURS = 4
_POPULATION = np.array([value.bit_count() for value in range(256)], np.uint8)
_MIXED = np.random.default_rng(0).permutation(256)  # spreads flat regions of images over all bands

Pairs = Int[np.ndarray, "_ 2"]
Reader = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Duplicates:
    """Pairs of row numbers."""

    exact: Pairs
    near: Pairs
    turned: Pairs

    def every(self) -> Pairs:
        """All pairs."""
        return np.concatenate([self.exact, self.near, self.turned])


def find_duplicates(
    digests: UInt8[np.ndarray, "images 16"],
    hashes: UInt8[np.ndarray, "images 32"],
    turned: UInt8[np.ndarray, "images 32"],
    constant: Bool[np.ndarray, " images"],
    series: Int[np.ndarray, " images"],
    read: Reader | None,
) -> Duplicates:
    """Find duplicates among images; a set of n equal ones gives n - 1 pairs.

    Args:
        digests: of the native pixels.
        hashes: difference hashes.
        turned: difference hashes of the turned images.
        constant: images without content, which are never duplicates.
        series: number of each image's series; neighbours of one series are alike and are no near duplicates.
        read: gives the grey values [edge, edge] of an image, to confirm near duplicates; None: exact ones only.
    """
    exact = _exact(digests, constant)
    if read is None:
        return Duplicates(exact, exact[:0], exact[:0])
    busy = _POPULATION[hashes].sum(1) >= LEAST_EDGES
    near = _without(_candidates(hashes, hashes, busy, series), exact)
    near = _confirmed(near, read, turns=0)
    sideways = _without(_candidates(turned, hashes, busy, series), np.concatenate([exact, near]))
    return Duplicates(exact, near, _confirmed(sideways, read, turns=1))


def _exact(digests: UInt8[np.ndarray, "images 16"], constant: Bool[np.ndarray, " images"]) -> Pairs:
    keys = np.ascontiguousarray(digests).view("V16").reshape(-1)
    order = np.argsort(keys, kind="stable")
    order = order[~constant[order]]
    same = keys[order[1:]] == keys[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]], 1)


def _candidates(
    first: UInt8[np.ndarray, "images 32"],
    second: UInt8[np.ndarray, "images 32"],
    busy: Bool[np.ndarray, " images"],
    series: Int[np.ndarray, " images"],
) -> Pairs:
    """Pairs (i, j) whose hashes first[i] and second[j] are close, found by sorting each band of both lists together."""
    rows = np.flatnonzero(busy)
    count = len(rows)
    both = np.concatenate([first[rows], second[rows]])
    owner = np.concatenate([rows, rows])
    left = np.arange(2 * count) < count
    bands = _bands(both)
    found: set[tuple[int, int]] = set()
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for step in range(1, 2 * _NEIGHBOURS + 1):
            a, b = order[:-step], order[step:]
            match = (band[a] == band[b]) & (left[a] != left[b]) & (series[owner[a]] != series[owner[b]])
            a, b = a[match], b[match]
            distance = _POPULATION[both[a] ^ both[b]].sum(1) if len(a) else np.empty(0)
            a, b = a[distance <= MOST_BITS], b[distance <= MOST_BITS]
            i, j = np.where(left[a], owner[a], owner[b]), np.where(left[a], owner[b], owner[a])
            found.update(zip(i.tolist(), j.tolist(), strict=True))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _bands(hashes: UInt8[np.ndarray, "images 32"]) -> UInt32[np.ndarray, "images 8"]:
    mixed = np.empty_like(hashes)
    for start in range(0, len(hashes), _CHUNK):  # unpacked bits take eight times the memory
        piece = slice(start, start + _CHUNK)
        mixed[piece] = np.packbits(np.unpackbits(hashes[piece], axis=1)[:, _MIXED], axis=1)
    return mixed.view(">u4").astype(np.uint32)


def _without(pairs: Pairs, others: Pairs) -> Pairs:
    """Drop pairs that are known, and keep one of (i, j) and (j, i)."""
    known = {(min(i, j), max(i, j)) for i, j in others.tolist()}
    kept = []
    for i, j in pairs.tolist():
        key = (min(i, j), max(i, j))
        if key not in known:
            known.add(key)
            kept.append((i, j))
    return np.array(kept, np.int64).reshape(-1, 2)


def _confirmed(pairs: Pairs, read: Reader, *, turns: int) -> Pairs:
    """Keep the pairs whose fine structure correlates; the first of each pair is turned before."""
    kept = []
    for done, (i, j) in enumerate(pairs.tolist()):
        if _alike(np.rot90(read(i), turns), read(j)):
            kept.append((i, j))
        if (done + 1) % _NOTICE_EVERY == 0:
            progress.publish(progress.Done("comparing images that look alike", done + 1, len(pairs)))
    return np.array(kept, np.int64).reshape(-1, 2)


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    a, b = _fine_structure(first), _fine_structure(second)
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return norm > 0 and float((a * b).sum()) >= LEAST_CORRELATION * norm


def _fine_structure(grey: np.ndarray) -> np.ndarray:
    small = shrunk(grey, _FINE_EDGE) if len(grey) > _FINE_EDGE else grey
    fine = small - gaussian_filter(small, _FINE_SIGMA)
    return fine - fine.mean()


def joined(count: int, pairs: Pairs) -> Int[np.ndarray, " items"]:
    """Number the sets of items that pairs connect; [count] set numbers."""
    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
