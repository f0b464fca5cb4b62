"""One data set as many simulated sites: who goes where, and what a site's scanner does to the images."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import store_of

from fedssl.data.cache import HOUNSFIELD_SPAN, Pixels, Subset
from fedssl.data.partition import LEAST_PATIENTS, assign, by_modality, by_quantity, dirichlet, iid
from fedssl.data.scanner_shift import ScannerShift, ShiftedSubset
from fedssl.errors import ConfigError, DataError

KINDS = ("natural", "iid", "dirichlet", "modality", "quantity")
DRAWN = ("iid", "dirichlet", "quantity")
_any = settings(deadline=None, max_examples=60, derandomize=True)


def _set(patients=60, classes=4, seed=0, most_images=6):
    """Images of patients in a random order: a patient's images are of one class or two, of one modality or two."""
    rng = np.random.default_rng(seed)
    groups, labels, modalities = [], [], []
    for patient in range(patients):
        for image in range(rng.integers(1, most_images + 1)):
            groups.append(f"patient {patient}")
            labels.append(f"class {(patient + (image == 2)) % classes}")
            modalities.append("CT" if patient % 3 else "MR" if image != 1 else "CR")
    order = rng.permutation(len(groups))
    columns = {"groups": groups, "labels": labels, "modalities": modalities, "natural_sites": ["all"] * len(groups)}
    return {name: np.array(column)[order] for name, column in columns.items()}


def _mednist_like(images=3000, classes=6):
    """As MedNIST: every image is its own patient, all classes are equally frequent."""
    rows = np.arange(images)
    return np.array([f"file {row}" for row in rows]), np.array([f"class {row % classes}" for row in rows])


def _assigned(kind, data, sites=4, alpha=0.5, seed=0):
    return assign(kind, **data, sites=sites, alpha=alpha, seed=seed)


def _sites_of_patients(groups, sites):
    found = defaultdict(set)
    for group, site in zip(groups.tolist(), sites.tolist(), strict=True):
        found[group].add(site)
    return found


def _sizes(groups, sites):
    """Patients at each site."""
    return Counter(site for names in _sites_of_patients(groups, sites).values() for site in names)


def _counts(labels, sites):
    """[sites, classes] images, counted one by one."""
    names, classes = sorted(set(sites.tolist())), sorted(set(labels.tolist()))
    pairs = Counter(zip(sites.tolist(), labels.tolist(), strict=True))
    return np.array([[pairs[site, label] for label in classes] for site in names])


def _chi_square_of_a_degree(labels, sites):
    """About 1 where labels and sites know nothing of each other."""
    counts = _counts(labels, sites)
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    return ((counts - expected) ** 2 / expected).sum() / ((len(counts) - 1) * (len(counts[0]) - 1))


def _largest_share_of_a_class(labels, sites):
    """Mean over images of the share that the most frequent class has at the image's site."""
    counts = _counts(labels, sites)
    return counts.max(1).sum() / counts.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_is_at_one_site_and_no_patient_at_two(kind):
    data = _set()
    sites = _assigned(kind, data)
    assert sites.shape == data["groups"].shape
    assert sites.dtype.kind == "U"
    expected = {"natural": {"all"}, "modality": {"ct", "mr", "radiography"}}.get(
        kind, {f"site-{n}" for n in range(1, 5)}
    )
    assert set(sites.tolist()) == expected
    assert all(len(found) == 1 for found in _sites_of_patients(data["groups"], sites).values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_images_does_not_matter(kind):
    data = _set()
    order = np.random.default_rng(5).permutation(len(data["groups"]))
    moved = {name: column[order] for name, column in data.items()}
    np.testing.assert_array_equal(_assigned(kind, moved), _assigned(kind, data)[order])


@pytest.mark.parametrize("kind", DRAWN)
def test_equal_seeds_give_equal_sites_and_others_do_not(kind):
    data = _set()
    first, again, other = (_assigned(kind, data, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@_any
@given(st.sampled_from(DRAWN), st.integers(1, 12), st.integers(0, 40), st.floats(1e-3, 1e3), st.integers(0, 2**32))
@example("dirichlet", 12, 0, 1e-3, 0)
@example("quantity", 12, 0, 1e-300, 0)
@example("dirichlet", 5, 7, 1e9, 0)
def test_every_drawn_site_has_two_patients_and_none_is_torn_apart(kind, sites, further, alpha, seed):
    data = _set(max(2, LEAST_PATIENTS * sites + further), seed=seed, most_images=3)
    made = _assigned(kind, data, sites=sites, alpha=alpha, seed=seed)
    sizes = _sizes(data["groups"], made)
    assert len(sizes) == sites
    assert min(sizes.values()) >= LEAST_PATIENTS
    assert sum(sizes.values()) == len(set(data["groups"].tolist()))


def test_iid_sites_are_equally_large_and_have_the_labels_of_all():
    groups, labels = _mednist_like(3001)
    values = []
    for seed in range(20):
        sites = iid(groups, 5, seed)
        assert set(Counter(sites.tolist()).values()) == {600, 601}
        values.append(_chi_square_of_a_degree(labels, sites))
    assert max(values) < 2.5  # 20 degrees of freedom: exceeded once in 5,000 draws
    assert 0.8 < np.mean(values) < 1.2


def test_a_small_alpha_gives_sites_of_nearly_one_class_and_a_large_one_the_labels_of_all():
    groups, labels = _mednist_like(classes=10)
    share = {
        alpha: np.mean([_largest_share_of_a_class(labels, dirichlet(groups, labels, 10, alpha, s)) for s in range(10)])
        for alpha in (0.05, 1.0, 1e5)
    }
    assert share[0.05] > 0.6
    assert 0.2 < share[1.0] < 0.5
    assert share[1e5] < 0.11
    assert _chi_square_of_a_degree(labels, dirichlet(groups, labels, 10, 1e5, 0)) < 1.0


def test_labels_are_divided_in_the_drawn_shares():
    """One class holds nearly all patients: the sizes of the sites are its shares, Var(p_1) = (s - 1) / (s^2 (s a + 1)).

    Brute force, with so large an alpha that no draw is repeated.
    """
    groups = np.arange(2000)
    labels = np.where(groups < 1, "rare", "common")
    shares = [(dirichlet(groups, labels, 4, 2.0, seed) == "site-1").mean() for seed in range(400)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)
    assert np.var(shares) == pytest.approx(3 / (16 * 9), rel=0.25)


def test_a_draw_with_too_small_a_site_is_repeated_before_sites_are_filled_up():
    """Six classes at alpha 0.03 leave most first draws with an empty site, but not a hundred draws."""
    groups, labels = _mednist_like()
    smallest = [min(_sizes(groups, dirichlet(groups, labels, 5, 0.03, seed)).values()) for seed in range(40)]
    assert np.mean(np.array(smallest) > LEAST_PATIENTS) > 0.8


def test_a_patient_counts_by_the_label_of_most_labelled_images():
    groups = np.repeat([f"patient {number:02d}" for number in range(40)], 4)
    rare = np.arange(40) % 2 == 0
    labels = np.where(np.repeat(rare, 4), "a", "b")
    labels[1::4] = np.where(rare, "b", "a")  # one of four is of the other class
    labels[2::4] = ""  # one is not labelled
    whole = np.where(np.repeat(rare, 4), "a", "b")
    for seed in range(5):
        np.testing.assert_array_equal(dirichlet(groups, labels, 3, 0.2, seed), dirichlet(groups, whole, 3, 0.2, seed))


def test_a_modality_is_a_site_and_a_patient_with_several_goes_to_the_most_frequent():
    groups = np.array(["a", "a", "a", "b", "c", "d", "d"])
    sites = by_modality(groups, np.array(["CT", "MR", "MR", "DX", "CR", "SEG", "CT"]))
    assert sites.tolist() == ["mr", "mr", "mr", "radiography", "radiography", "ct", "ct"]


def test_sizes_are_the_more_unequal_the_smaller_alpha_is():
    groups = np.arange(500)

    def largest(alpha):
        return np.mean([max(_sizes(groups, by_quantity(groups, 5, alpha, seed)).values()) for seed in range(60)])

    sizes = [largest(alpha) for alpha in (0.05, 0.3, 1.0, 5.0, 100.0, 1e8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 400
    assert sizes[-1] == 100


def test_quantity_deals_the_labels_out_by_chance():
    groups, labels = _mednist_like()
    values = [_chi_square_of_a_degree(labels, by_quantity(groups, 5, 1.0, seed)) for seed in range(20)]
    assert 0.75 < np.mean(values) < 1.25


def test_ten_sites_and_more_sort_by_their_number():
    names = sorted(set(iid(np.arange(40), 12, 0).tolist()))
    assert (names[0], names[8:10], names[-1]) == ("site-01", ["site-09", "site-10"], "site-12")


def test_natural_sites_are_left_alone():
    data = _set()
    data["natural_sites"] = np.where(data["labels"] == "class 0", "EAST", "WEST")
    np.testing.assert_array_equal(_assigned("natural", data), data["natural_sites"])


@pytest.mark.parametrize("kind", DRAWN)
def test_more_sites_than_patients_allow_are_refused(kind):
    with pytest.raises(DataError, match=r"4 simulated sites need 8 patients or more, 2 each; there are 7 .* Lower"):
        _assigned(kind, _set(7), sites=4)


@pytest.mark.parametrize("kind", DRAWN)
def test_no_site_is_refused(kind):
    with pytest.raises(ConfigError, match=r"simulation\.sites .* at least 1, not 0"):
        _assigned(kind, _set(), sites=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_an_impossible_alpha_is_refused(kind, alpha):
    with pytest.raises(ConfigError, match=r"simulation\.alpha must be above 0"):
        _assigned(kind, _set(), alpha=alpha)


def test_patients_without_label_are_counted_and_refused():
    data = _set()
    data["labels"][np.isin(data["groups"], ["patient 3", "patient 4"])] = ""
    with pytest.raises(DataError, match=r"2 of 60 patients have none\. Complete data\.labels"):
        _assigned("dirichlet", data)


def test_a_single_label_is_refused():
    with pytest.raises(DataError, match=r"two labels or more; all 60 patients have the same"):
        _assigned("dirichlet", _set(classes=1))


def test_a_single_modality_is_refused():
    with pytest.raises(DataError, match=r"two modalities or more; found: ct\. Choose"):
        by_modality(np.arange(5), np.full(5, "CT"))


def test_an_unknown_partition_is_refused():
    with pytest.raises(ConfigError, match=r"no partition 'idd'\. Choose one of natural, iid, dirichlet, modality, qu"):
        _assigned("idd", _set())


def _pixels(values, hounsfield):
    ones = np.ones(len(values), np.float32)
    return Pixels(values.astype(np.float32), 0.2 * ones, 0.3 * ones, np.asarray(hounsfield))


def _random_pixels(batch=6, channels=1, edge=24, seed=0):
    values = np.random.default_rng(seed).random((batch, channels, edge, edge))
    return _pixels(values, np.arange(batch) % 2 == 1)


@pytest.fixture(scope="module")
def store(hospitals, tmp_path_factory):
    return store_of(hospitals, tmp_path_factory.mktemp("store")).open()


def test_a_shift_of_strength_zero_leaves_every_bit(store):
    rows = np.arange(0, len(store), 7)
    shifted = ShiftedSubset(store, rows, ScannerShift.draw("site-1", 0.0, 0))
    one, other = shifted.read(np.arange(len(rows))), store.read(rows)
    for name in ("values", "low", "high", "hounsfield"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def test_two_reads_of_an_image_are_equal_wherever_it_stands_in_the_batch(store):
    images = ShiftedSubset(store, np.arange(5, len(store), 3), ScannerShift.draw("site-1", 0.7, 0))
    before = store.read(images.rows).values.copy()
    positions = np.arange(len(images))
    order = np.random.default_rng(0).permutation(positions)
    whole, again, moved = images.read(positions), images.read(positions), images.read(order)
    np.testing.assert_array_equal(whole.values, again.values)
    np.testing.assert_array_equal(whole.values[order], moved.values)
    alone = ShiftedSubset(store, images.rows[4:5], images.shift).read(np.array([0]))
    np.testing.assert_array_equal(alone.values[0], whole.values[4])
    np.testing.assert_array_equal(store.read(images.rows).values, before)


def test_a_shifted_subset_is_a_subset_with_other_pixels(store):
    rows = np.arange(3, 40)
    plain, shifted = Subset(store, rows), ShiftedSubset(store, rows, ScannerShift.draw("site-1", 0.5, 0))
    assert isinstance(shifted, Subset)
    assert len(shifted) == len(plain)
    assert shifted.store is store
    np.testing.assert_array_equal(shifted.column("patient"), plain.column("patient"))
    one, other = shifted.read(np.arange(37)), plain.read(np.arange(37))
    assert one.values.dtype == other.values.dtype
    assert (one.values != other.values).any((1, 2, 3)).all()
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)
    assert len(shifted.read(np.arange(0)).values) == 0


@_any
@given(
    st.sampled_from(["EAST", "site-1", "site-2", "Üz/ü", ""]),
    st.floats(1e-6, 1.0),
    st.integers(-5, 2**40),
    st.sampled_from([1, 3]),
)
def test_shifted_images_are_finite_and_grey_values_stay_from_0_to_1(site, strength, seed, channels):
    pixels = _random_pixels(channels=channels, seed=abs(seed))
    pixels.values[0], pixels.values[2], pixels.values[4, :, :5] = 0.0, 1.0, 0.0
    seen = ScannerShift.draw(site, strength, seed).apply(pixels, np.arange(6))
    assert np.isfinite(seen.values).all()
    assert seen.values[::2].min() >= 0.0
    assert seen.values[::2].max() <= 1.0


def test_hounsfield_units_keep_their_mean_in_a_flat_region_and_grey_values_do_not():
    pixels = _pixels(np.full((2, 1, 128, 128), 0.25), [True, False])
    moved = []
    for site in ("site-1", "site-2", "site-3", "site-4"):
        shift = ScannerShift.draw(site, 1.0, 0)
        units, grey = shift.apply(pixels, np.array([8, 9])).values[:, 0]
        level = 30.0 * shift.noise / HOUNSFIELD_SPAN
        assert units.mean() == pytest.approx(0.25, abs=5 * level / 128)
        assert units.std() == pytest.approx(level, rel=0.05)
        moved.append(abs(grey.mean() - 0.25))
    assert max(moved) > 0.1


def test_hounsfield_units_beyond_the_stored_range_are_not_cut():
    pixels = _pixels(np.concatenate([np.full((1, 1, 32, 32), -0.4), np.full((1, 1, 32, 32), 1.5)]), [True, True])
    seen = ScannerShift.draw("site-1", 1.0, 0).apply(pixels, np.arange(2))
    np.testing.assert_allclose(seen.values.mean((1, 2, 3)), [-0.4, 1.5], atol=1e-3)


def test_each_image_has_noise_of_its_own():
    shift = ScannerShift.draw("site-1", 1.0, 0)
    seen = shift.apply(_pixels(np.full((3, 1, 64, 64), 0.25), [True] * 3), np.array([4, 5, 4])).values - 0.25
    np.testing.assert_array_equal(seen[0], seen[2])
    assert abs(np.corrcoef(seen[0].ravel(), seen[1].ravel())[0, 1]) < 0.08
    other = ScannerShift.draw("site-2", 1.0, 0).apply(_pixels(np.full((1, 1, 64, 64), 0.25), [True]), np.array([4]))
    assert abs(np.corrcoef(seen[0].ravel(), other.values.ravel())[0, 1]) < 0.08


def test_a_grey_image_in_three_channels_stays_grey():
    values = np.repeat(np.random.default_rng(0).random((2, 1, 16, 16)), 3, 1)
    seen = ScannerShift.draw("site-1", 1.0, 0).apply(_pixels(values, [False, True]), np.arange(2)).values
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    np.testing.assert_array_equal(seen[:, 0], seen[:, 2])


def test_sites_differ_and_so_do_seeds_but_a_site_keeps_its_scanner():
    names = [f"site-{number}" for number in range(1, 9)]
    shifts = [ScannerShift.draw(site, 0.5, seed) for site in names for seed in (0, 1)]
    assert shifts == [ScannerShift.draw(site, 0.5, seed) for site in names for seed in (0, 1)]
    pixels = _random_pixels()
    seen = [shift.apply(pixels, np.arange(6)).values for shift in shifts]
    for number, one in enumerate(seen):
        for other in seen[:number]:
            assert np.abs(one - other).mean((1, 2, 3)).min() > 1e-4


def test_a_weak_shift_is_a_weak_copy_of_a_strong_one():
    pixels = _random_pixels()
    for site in ("site-1", "site-2", "site-3"):
        change = [
            np.abs(ScannerShift.draw(site, strength, 0).apply(pixels, np.arange(6)).values - pixels.values).mean()
            for strength in (1e-4, 0.01, 0.1, 0.5, 1.0)
        ]
        assert change[0] < 1e-4
        assert change == sorted(change)


def test_the_change_is_the_formula_pixel_by_pixel():
    """On a ramp that no point spread changes but at its ends; a scanner without noise."""
    edge = 32
    ramp = np.linspace(0.2, 0.6, edge)
    pixels = _pixels(np.tile(ramp, (1, 1, edge, 1)), [False])
    shift = ScannerShift(1.0, 0.01, 0.0, (0.1, -0.05, 0.02, 0.03, -0.04), 1.3, 0.8, 0.05, 0.0, 1)
    seen = shift.apply(pixels, np.array([0])).values[0, 0]
    for row in range(edge):
        for column in range(4, edge - 4):
            x, y = 2 * column / (edge - 1) - 1, 2 * row / (edge - 1) - 1
            field = np.exp(0.1 * x - 0.05 * y + 0.02 * x * y + 0.03 * (x * x - 1 / 3) - 0.04 * (y * y - 1 / 3))
            expected = 0.8 * ((ramp[column] * field) ** 1.3 - 0.5) + 0.5 + 0.05
            assert seen[row, column] == pytest.approx(expected, abs=1e-5)


def test_a_negative_sharpness_blurs_and_a_positive_one_sharpens():
    values = _random_pixels().values
    pixels = _pixels(values, np.full(6, fill_value=True))
    neutral = {"strength": 1.0, "field": (0.0,) * 5, "gamma": 1.0, "contrast": 1.0, "brightness": 0.0, "noise": 0.0}
    blurred, sharpened = (
        ScannerShift(blur=blur, sharpening=sharpening, noise_seed=0, **neutral).apply(pixels, np.arange(6)).values
        for blur, sharpening in ((0.03, 0.0), (0.0, 1.0))
    )
    assert blurred.std() < 0.9 * values.std()
    assert sharpened.std() > values.std()
    upright = _pixels(values.transpose(0, 1, 3, 2), np.full(6, fill_value=True))
    turned = ScannerShift(blur=0.03, sharpening=0.0, noise_seed=0, **neutral).apply(upright, np.arange(6)).values
    np.testing.assert_allclose(turned.transpose(0, 1, 3, 2), blurred, atol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_an_impossible_strength_is_refused(strength):
    with pytest.raises(ConfigError, match=r"simulation\.scanner_shift must be a number from 0 to 1"):
        ScannerShift.draw("site-1", strength, 0)
