"""Which images share a row: two views of one, two of a patient (MICLe), two neighbouring slices."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from fedssl.data.batches import Batches
from fedssl.data.cache import ImageStore, Subset, select
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.pairing import image_rows, patient_rows, series_rows
from fedssl.data.store import Source, Store


class _Columns(ImageStore):
    """A store without pixels."""

    def __init__(self, columns):
        self.columns = columns

    def column(self, name):
        return self.columns[name]


def _images(**columns):
    return Subset(_Columns(columns), np.arange(len(next(iter(columns.values())))))


def _patients(counts, seed=0):
    """Images of patients in random order, ``counts`` of each; the fifth is a copy of the first."""
    rng = np.random.default_rng(seed)
    patient = rng.permutation(np.repeat([f"p{number:03d}" for number in range(len(counts))], counts))
    copies, seen = np.arange(len(patient)), defaultdict(list)
    for row, name in enumerate(patient.tolist()):
        seen[name].append(row)
        if len(seen[name]) == 5:
            copies[row] = seen[name][0]
    return _images(patient=patient, group=patient, copies=copies)


def test_over_1000_batches_no_patient_is_twice_in_a_batch_and_images_differ_where_there_are_two():
    images = _patients([1, 2, 3, 5, 40] * 8)
    patient, copies = images.column("patient"), images.column("copies")
    distinct = {name: len(set(copies[patient == name].tolist())) for name in set(patient.tolist())}
    rows = patient_rows(images, 16, np.random.default_rng(0))
    seen = Counter()
    for _ in range(1000):
        first, second = next(rows)
        names = patient[first].tolist()
        assert len(set(names)) == 16
        assert names == patient[second].tolist()
        for name, one, other in zip(names, first.tolist(), second.tolist(), strict=True):
            assert (one == other) == (distinct[name] == 1)
            assert (copies[one] == copies[other]) == (distinct[name] == 1)
        seen.update(names)
    assert max(seen.values()) - min(seen.values()) <= 2  # patients take turns


def test_patients_that_share_images_are_never_in_one_batch_but_pairs_come_from_one_of_them():
    patient = np.array(["a", "a", "b", "b", "c", "c", "d"])
    images = _images(patient=patient, group=np.array([0, 0, 0, 0, 1, 1, 2]), copies=np.arange(7))
    rows = patient_rows(images, 3, np.random.default_rng(0))
    seen = set()
    for _ in range(200):
        first, second = next(rows)
        assert len(set(images.column("group")[first].tolist())) == 3
        assert (patient[first] == patient[second]).all()
        seen |= set(patient[first].tolist())
    assert seen == set("abcd")


def test_every_pair_of_images_of_a_patient_comes_up_about_equally_often():
    images = _patients([4, 1, 1])
    rows = patient_rows(images, 3, np.random.default_rng(1))
    pairs = Counter()
    for _ in range(3000):
        first, second = next(rows)
        place = int(np.flatnonzero(first != second)[0])
        pairs[int(first[place]), int(second[place])] += 1
    assert len(pairs) == 12
    assert min(pairs.values()) > 180
    assert max(pairs.values()) < 330


def test_a_neighbour_is_the_slice_before_or_after_in_the_same_series():
    series = np.array(["a"] * 5 + ["b"] * 1 + ["c"] * 2)[[7, 2, 0, 5, 3, 1, 6, 4]]
    order = np.array([0, 2, 5, 7, 9, 3, 1, 4])[[7, 2, 0, 5, 3, 1, 6, 4]]  # gaps: slices that test, or are unreadable
    images = _images(patient=np.where(series == "b", "p", "q"), series=series, order=order)
    partners = defaultdict(set)
    rows = series_rows(images, 4, np.random.default_rng(0))
    for _ in range(200):
        for one, other in zip(*next(rows), strict=True):
            partners[int(one)].add(int(other))
    for one, found in partners.items():
        own = sorted((row for row in range(8) if series[row] == series[one]), key=lambda row: order[row])
        place = own.index(one)
        expected = {own[step] for step in (place - 1, place + 1) if 0 <= step < len(own)} or {one}
        assert found == expected


def test_equal_series_names_of_two_patients_are_two_series():
    images = _images(patient=np.array(list("ababab")), series=np.array(["s"] * 6), order=np.array([0, 0, 1, 1, 2, 2]))
    rows = series_rows(images, 4, np.random.default_rng(0))
    for _ in range(100):
        first, second = next(rows)
        assert (images.column("patient")[first] == images.column("patient")[second]).all()
        assert (first != second).all()


def test_rows_of_single_images_are_their_own_partners_and_cover_an_epoch():
    images = _images(patient=np.array(list("aabbbccccd")))
    rows = image_rows(images, 5, np.random.default_rng(0))
    batches = [next(rows) for _ in range(2)]
    assert all((first == second).all() for first, second in batches)
    assert sorted(np.concatenate([first for first, _ in batches]).tolist()) == list(range(10))


@pytest.fixture(scope="module")
def east(hospitals, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"), Source(hospitals), Decoding(16)).open()
    return select(store, store.column("site") == "EAST")


@pytest.mark.parametrize("pairing", ["image", "patient", "series"])
def test_a_batch_holds_the_pixels_of_both_images_of_each_row(east, pairing):
    batches = Batches(east, 8, 1.0, seed=3, pairing=pairing)
    for (first, second), batch in zip(batches.positions(), batches, strict=True):
        np.testing.assert_array_equal(batch.values.numpy(), east.read(first).values)
        if pairing == "image":
            assert batch.partner is None
        else:
            np.testing.assert_array_equal(batch.partner.values.numpy(), east.read(second).values)


def test_a_site_with_fewer_patients_than_the_batch_size_has_batches_of_all_its_patients(east):
    patients = len(set(east.column("group").tolist()))
    batches = Batches(east, 10_000, 1.0, seed=0, pairing="patient")
    assert batches.size == patients
    assert len(batches) == len(east) // patients
    for first, _ in batches.positions():
        assert len(set(east.column("patient")[first].tolist())) == patients


def test_labels_and_modalities_come_with_the_images_and_unknown_labels_are_minus_one(east):
    names = np.array(["normal", "", "nodule", "other"])[np.arange(len(east)) % 4]
    batches = Batches(east, 8, 1.0, seed=0, labels=names, classes=("nodule", "normal"))
    expected = {"nodule": 0, "normal": 1, "": -1, "other": -1}
    for (rows, _), batch in zip(batches.positions(), batches, strict=True):
        assert batch.label.tolist() == [expected[name] for name in names[rows]]
        assert (batch.modality == 3).all()  # EAST is an ultrasound clinic
