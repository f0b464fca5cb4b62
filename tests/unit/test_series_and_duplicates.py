"""Facts that need more than one image: order and range of a series, duplicates, and what looks wrong."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread

from fedssl.data.decoding.picture import Meaning, Picture
from fedssl.data.decoding.record import LEVELS, fit_square, record
from fedssl.data.indexing.duplicates import MOST_BITS, find_duplicates, joined
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.indexing.series import series_order, series_range
from fedssl.data.indexing.walk import order_of, walk
from fedssl.data.store import Source, Store

EDGE = 96


def test_slices_are_ordered_by_position_and_without_it_by_number():
    series = np.array(["a", "a", "a", "b", "b", "b"])
    position = np.array([5.0, -2.0, 1.0, 1.0, np.nan, 0.0])
    instance = np.array([1, 2, 3, 9, 7, 8])
    rank, length = series_order(series, position, instance)
    assert rank.tolist() == [2, 0, 1, 2, 0, 1]
    assert length.tolist() == [3] * 6


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_the_range_of_a_series_is_that_of_all_its_pixels_together(seed, count):
    rng = np.random.default_rng(seed)
    images = [rng.gamma(2.0, rng.uniform(1, 50), (80, 90)).astype(np.float32) for _ in range(count)]
    records = [record(Picture(image, Meaning.RAW, 16), 16) for image in images]
    quantiles = np.array([one.quantiles for one in records])
    low, high = series_range(np.array(["s"] * count), quantiles, np.full(count, 7200))
    pooled = np.concatenate([image.ravel() for image in images])
    below = [(pooled <= low[0]).mean(), (pooled <= high[0]).mean()]
    np.testing.assert_allclose(below, [0.005, 0.995], atol=0.004)


def test_every_series_has_its_own_range_in_the_order_of_the_rows():
    series = np.array(["b", "a", "b"])
    quantiles = np.array([np.linspace(0, 1, len(LEVELS)) * scale for scale in (10.0, 100.0, 10.0)])
    _, high = series_range(series, quantiles, np.array([1, 1, 1]))
    assert high[0] == high[2] < 11
    assert high[1] > 80


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([np.uint8, np.int16, np.uint16, np.float32]))
def test_percentiles_from_a_histogram_are_those_from_sorting(seed, kind):
    rng = np.random.default_rng(seed)
    values = (rng.normal(60, 25, (100, 120)).clip(0, 255) * (1 if kind == np.uint8 else 7)).astype(kind)
    found = record(Picture(values, Meaning.RAW, 16), 16).quantiles
    expected = np.quantile(values, LEVELS, method="inverted_cdf")
    np.testing.assert_allclose(found, expected, atol=float(values.max() - values.min()) / 2**16 + 1e-6)


def _records(images):
    return [record(Picture(image, Meaning.RAW, 8), EDGE) for image in images]


def _find(images):
    records = _records(images)
    digests, hashes, turned = (
        np.array([np.frombuffer(getattr(one, name), np.uint8) for one in records])
        for name in ("digest", "hash", "hash_turned")
    )
    constant = np.array(["constant" in one.flags for one in records])
    small = [fit_square(image, EDGE, 0).astype(np.float32) for image in images]
    return find_duplicates(digests, hashes, turned, constant, np.arange(len(images)), lambda row: small[row])


@pytest.fixture(scope="module")
def brains(brain_mr):
    """One slice of each of 60 patients."""
    patients = sorted(path for site in ("DU", "HT") for path in (brain_mr / site).iterdir())[:60]
    return [dcmread(sorted(path.iterdir())[len(list(path.iterdir())) // 2]).pixel_array for path in patients]


def _jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def test_equal_images_are_found_and_constant_ones_are_not_compared(brains):
    found = _find([*brains[:10], brains[3], np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.uint8)])
    assert found.exact.tolist() == [[3, 10]]
    assert len(found.near) == 0


def test_recompressed_copies_are_found_and_other_patients_are_not(brains):
    copies = [_jpeg(image) for image in brains]
    found = _find([*brains, *copies])
    pairs = {tuple(sorted(pair)) for pair in found.near.tolist()}
    true = {(number, number + len(brains)) for number in range(len(brains))}
    assert not pairs - true
    assert len(pairs) >= 0.8 * len(true)


def test_a_copy_turned_by_90_degrees_is_found_either_way(brains):
    for turns in (1, 3):
        found = _find([*brains[:20], np.ascontiguousarray(np.rot90(brains[5], turns))])
        assert [sorted(pair) for pair in found.turned.tolist()] == [[5, 20]]
        assert len(found.near) == 0


def test_near_duplicates_by_bands_are_those_of_a_loop_over_all_pairs(brains):
    records = _records([*brains, *[_jpeg(image) for image in brains]])
    bits = np.unpackbits(np.array([np.frombuffer(one.hash, np.uint8) for one in records]), axis=1).astype(int)
    close = sum(
        (bits[i] != bits[j]).sum() <= MOST_BITS // 2 and bits[i].sum() >= 32 <= bits[j].sum()
        for i in range(len(bits))
        for j in range(i)
    )
    found = _find([*brains, *[_jpeg(image) for image in brains]])
    assert len(found.near) >= 0.9 * close > 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_joined_sets_are_those_of_a_walk_along_the_pairs(pairs):
    sets = [{item} for item in range(10)]
    for a, b in pairs:
        merged = sets[a] | sets[b]
        for item in merged:
            sets[item] = merged
    numbers = joined(10, np.array(pairs, np.int64).reshape(-1, 2))
    for a in range(10):
        for b in range(10):
            assert (numbers[a] == numbers[b]) == (b in sets[a])


def test_the_flags_name_what_looks_wrong():
    rng = np.random.default_rng(0)
    tissue = rng.normal(0, 900, (64, 64)).astype(np.int16)
    cases = {
        "": Picture(rng.integers(0, 255, (64, 64), dtype=np.uint8), Meaning.RAW, 8),
        "constant": Picture(np.full((64, 64), 7, np.uint8), Meaning.RAW, 8),
        "wrong-sign": Picture(tissue.view(np.uint16), Meaning.RAW, 16),
        "half-empty": Picture(np.float32(0.1) * rng.random((64, 64), np.float32), Meaning.DISPLAY, 8),
    }
    assert {record(picture, 16).flags: name for name, picture in cases.items()} == {name: name for name in cases}
    assert record(Picture(tissue, Meaning.RAW, 16), 16).flags == ""


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "a b", "a.b", "é", "a-"]), min_size=1, max_size=3), max_size=15))
def test_the_walk_gives_every_file_once_in_the_order_of_its_keys(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("walk")
    made = set()
    for parts in names:
        path = root.joinpath(*[f"{part}.d" for part in parts[:-1]], parts[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        made.add(str(path.relative_to(root)))
    files = [entry.file for entry in walk(root)]
    assert files == sorted(made, key=order_of)
    assert files == sorted(made, key=lambda file: file.split("/"))


def test_ct_keeps_hounsfield_units_and_mr_one_range_for_its_series(hospitals, tmp_path):
    images = Store(tmp_path, Source(hospitals), Decoding(64)).open()
    modality, series = images.column("modality"), images.column("series")
    low, high = images.column("low"), images.column("high")
    ct = np.flatnonzero(modality == "CT")
    pixels = images.read(ct)
    assert pixels.hounsfield.all()
    units = pixels.values * 4096 - 1024
    assert units.min() == pytest.approx(-160, abs=2)
    assert set(low[ct].tolist()) == {-160.0}
    assert set(high[ct].tolist()) == {239.0}
    mr = modality == "MR"
    for name in set(series[mr].tolist()):
        assert len(set(low[series == name].tolist())) == 1
    assert len(set(high[mr].tolist())) > 3
