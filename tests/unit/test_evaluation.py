"""The label-efficiency protocol and the report."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pydicom import dcmread
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from fedssl import cli
from fedssl.data.hospitals import LABEL, UNSEEN_SITE, write_hospitals
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.indexing.scan import read_table
from fedssl.data.splits import test_mask as mask_of_test_patients
from fedssl.data.store import Source, Store
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation.calibration import prior_of
from fedssl.evaluation.features import intensity_statistics, metadata, raw_pixels
from fedssl.evaluation.metrics import METRICS
from fedssl.evaluation.probe import linear_probe, nearest_neighbours
from fedssl.evaluation.protocol import Cell, compare, probe_encoders, score_cells
from fedssl.evaluation.statistics import combine_seeds
from fedssl.evaluation.subsets import distinct_fractions, held_back, nested_label_subsets, rehearsal
from fedssl.evaluation.targets import Targets, classes_of, findings_of
from fedssl.evaluation.task import IN_DOMAIN, UNSEEN, Labelled, Question, Task, label_images, make_task, require_both
from fedssl.label_efficiency import evaluate_run
from simulations.run import simulate

SITES = ["EAST", "HARBOUR", "SOUTH", "WEST"]


def _task(root, folder, table=None, **changed):
    store = Store(folder, Source(root), Decoding(32)).open()
    held_out = mask_of_test_patients(store, test_fraction=0.3, unseen_sites=[UNSEEN_SITE])
    question = Question(**({"label": LABEL, "where": {}, "covariates": []} | changed))
    table = read_table(root / "labels.csv") if table is None else table
    return store, make_task(store, table, question, held_out=held_out, sites=SITES, unseen_sites=[UNSEEN_SITE])


def _drawn_task(values, *, patients, tested, exclusive=True, domain=IN_DOMAIN):
    """A task without a store: the last ``tested`` patients test, images of one patient follow each other."""
    values = np.asarray(values, np.float32)
    names = [f"output {number}" for number in range(values.shape[1])]
    owner = np.repeat(np.arange(patients), len(values) // patients)
    test = owner >= patients - tested
    sites = np.where(test, "THERE", "HERE")
    images = Labelled(
        np.arange(len(values)), Targets(values, names, exclusive), owner, sites, np.zeros((len(values), 0), np.float32)
    )
    return Task(images, ~test, {domain: test})


def _auroc(features, task, domain, fraction=1.0):
    cells = probe_encoders({"x": features}, task, probes={"x": ["linear"]}, fractions=[fraction], seeds=1)
    scores, _ = score_cells(list(cells), task, resamples=10)
    return next(score.value for score in scores if score.domain == domain)


def test_the_lesion_of_the_synthetic_hospitals_cannot_be_told_from_pixels_statistics_or_metadata(tmp_path):
    root = write_hospitals(tmp_path, seed=0)
    store, task = _task(root, tmp_path / "store")
    baselines = {
        "pixels": raw_pixels(store, task.rows, task.rows[task.train]),
        "statistics": intensity_statistics(store, task.rows),
        "metadata": metadata(store, task.rows, task.images.covariates),
    }
    for name, features in baselines.items():
        for domain in task.tests:
            assert _auroc(features, task, domain) < 0.7, (name, domain)


def test_a_feature_that_is_the_label_scores_one_and_noise_scores_a_half(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    rng = np.random.default_rng(0)
    perfect = np.stack([task.targets.classes, rng.random(len(task.rows))], 1).astype(np.float32)
    assert _auroc(perfect, task, "in domain") == pytest.approx(1.0)
    noise = [_auroc(np.random.default_rng(s).random((len(task.rows), 3)), task, "unseen site") for s in range(20)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.06)


def test_label_subsets_are_nested_hold_whole_patients_and_every_class(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    fractions = [0.01, 0.1, 0.5, 1.0]
    subsets = nested_label_subsets(task, fractions, seeds=4)
    for seed in range(4):
        for small, large in itertools.pairwise(fractions):
            assert set(subsets[small, seed]) <= set(subsets[large, seed])
        for fraction in fractions:
            rows = subsets[fraction, seed]
            chosen = set(task.patients[rows])
            assert set(rows) == set(np.flatnonzero(task.train & np.isin(task.patients, list(chosen))))
            assert set(task.targets.classes[rows]) == {0, 1}
    assert len({tuple(subsets[0.1, seed]) for seed in range(4)}) > 1
    assert set(subsets[1.0, 0]) == set(np.flatnonzero(task.train))


_FRACTIONS = [0.01, 0.03, 0.1, 0.3, 1.0]


def _rare_classes(seed=0):
    """63 training patients of two images; six classes, so that some patients must be labelled first."""
    numbers = np.random.default_rng(seed).permutation(np.arange(166) % 6)
    return _drawn_task(np.eye(6)[numbers], patients=83, tested=20)


def test_of_fractions_with_the_same_patients_only_the_largest_stays():
    task = _rare_classes()
    for seeds in (1, 3):
        subsets = nested_label_subsets(task, _FRACTIONS, seeds=seeds)
        expected = []
        for place, fraction in enumerate(_FRACTIONS):
            own = [subsets[fraction, seed].tolist() for seed in range(seeds)]
            larger = [[subsets[other, seed].tolist() for seed in range(seeds)] for other in _FRACTIONS[place + 1 :]]
            if own not in larger:
                expected.append(fraction)
        assert distinct_fractions(task, _FRACTIONS, seeds=seeds) == expected
        assert distinct_fractions(task, [1.0, 1.0, *_FRACTIONS[::-1]], seeds=seeds) == expected
        assert len(expected) < len(_FRACTIONS)
        assert expected[-1] == 1.0
    assert distinct_fractions(task, [1.0], seeds=2) == [1.0]
    assert distinct_fractions(task, [0.999, 1.0], seeds=2) == [1.0]
    assert distinct_fractions(task, [], seeds=2) == []


def test_probes_are_fitted_with_distinct_shares_and_scores_tell_the_true_ones():
    task, seeds = _rare_classes(), 4
    features = np.random.default_rng(0).normal(size=(len(task.rows), 3)).astype(np.float32)
    cells = list(probe_encoders({"x": features}, task, probes={"x": ["linear"]}, fractions=_FRACTIONS, seeds=seeds))
    used = [cell.fraction for cell in cells]
    assert used == distinct_fractions(task, _FRACTIONS, seeds=seeds)
    scores, _ = score_cells(cells, task, resamples=10)
    subsets = nested_label_subsets(task, used, seeds=seeds)
    for score, fraction in zip(scores, used, strict=True):
        labelled = [set(task.patients[subsets[fraction, seed]]) for seed in range(seeds)]
        assert score.fraction == fraction
        assert score.labelled_patients == max(map(len, labelled))
        assert score.share == score.labelled_patients / 63 >= fraction - 1e-9
        assert score.labelled_images == max(len(subsets[fraction, seed]) for seed in range(seeds))
    assert scores[-1].share == 1.0


def test_the_seeds_of_a_cell_are_as_many_as_its_predictions():
    task = _rare_classes()
    predicted = {IN_DOMAIN: np.full((40, 6), 1 / 6, np.float32)}
    cells = [Cell("x", "linear", 0.01, [predicted] * seeds) for seeds in (1, 5)]
    scores, _ = score_cells(cells, task, resamples=10)
    for score, seeds in zip(scores, (1, 5), strict=True):
        subsets = nested_label_subsets(task, [0.01], seeds=seeds).values()
        assert score.labelled_patients == max(len(set(task.patients[rows])) for rows in subsets)
    assert scores[0].labelled_patients < scores[1].labelled_patients
    assert scores[0].share < scores[1].share
    assert score_cells([], task, resamples=10) == ([], {})


@pytest.mark.parametrize("exclusive", [True, False])
def test_calibration_is_that_of_the_true_frequencies_not_of_balanced_training(exclusive):
    """5 % prevalence and nothing to see: balanced probabilities say a half."""
    sick = np.arange(800) % 20 == 0
    values = np.stack([~sick, sick], 1) if exclusive else sick[:, None]
    task = _drawn_task(values, patients=800, tested=400, exclusive=exclusive)
    features = np.random.default_rng(0).normal(size=(800, 2)).astype(np.float32)
    cells = list(probe_encoders({"x": features}, task, probes={"x": ["linear", "knn"]}, fractions=[1.0], seeds=1))
    assert [cell.priors is None for cell in cells] == [False, True]
    np.testing.assert_array_equal(cells[0].priors[0], prior_of(task.targets.take(task.train)))
    linear, votes = cells
    plain = Cell("x", "plain", 1.0, linear.predicted)
    scores, _ = score_cells([linear, votes, plain], task, resamples=20, metrics=tuple(METRICS))
    found = {(score.probe, score.metric): score.value for score in scores}
    assert found["linear", "calibration_error"] < 0.03
    assert found["knn", "calibration_error"] < 0.1
    assert found["plain", "calibration_error"] > 0.35
    for metric in set(METRICS) - {"calibration_error"}:
        assert found["linear", metric] == found["plain", metric]


def test_every_seed_has_its_own_prior():
    task = _drawn_task(np.eye(2)[np.arange(40) % 2], patients=40, tested=20)
    half = {IN_DOMAIN: np.full((20, 2), 0.5, np.float32)}
    other = {IN_DOMAIN: np.full((20, 2), 0.5, np.float32)}
    priors = [np.log([0.5, 0.5]), np.log([0.1, 0.9])]
    scores, _ = score_cells(
        [Cell("x", "linear", 1.0, [half, other], priors)], task, resamples=10, metrics=["calibration_error"]
    )
    assert scores[0].value == pytest.approx((0.0 + 0.4) / 2)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_all_figures_use_all_draws(metric, monkeypatch):
    from fedssl.evaluation import protocol

    drawn, plain = [], METRICS[metric]
    watched = {**METRICS, metric: lambda scores, targets, draws: drawn.append(draws) or plain(scores, targets, draws)}
    monkeypatch.setattr(protocol, "METRICS", watched)
    task = _drawn_task(np.eye(2)[np.arange(40) % 2], patients=40, tested=20)
    cell = Cell("x", "linear", 1.0, [{IN_DOMAIN: np.full((20, 2), 0.5, np.float32)}])
    score_cells([cell], task, resamples=1500, metrics=[metric])
    assert [draws.counts.shape for draws in drawn] == [(20, 1501)]


def test_no_labelled_training_patient_is_tested(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    for mask in task.tests.values():
        assert not set(task.patients[mask]) & set(task.patients[task.train])


def test_a_range_keeps_only_the_rows_inside_it(hospitals, tmp_path):
    _, whole = _task(hospitals, tmp_path)
    store, part = _task(hospitals, tmp_path, where={"position": [2, 5]})
    rows = read_table(hospitals / "labels.csv").to_pylist()
    table = dict(zip(store.names_of([row["file"] for row in rows]), (row["position"] for row in rows), strict=True))
    assert 0 < len(part.rows) < len(whole.rows)
    assert all(2 <= table[image] <= 5 for image in store.column("image")[part.rows].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["file"]), "lacks the column file"),
        (lambda t: t.rename_columns({LABEL: "x"}), "lacks the column lesion"),
        (lambda t: t.set_column(t.column_names.index("file"), "file", pa.array(["no"] * t.num_rows)), "None of the"),
        (lambda t: t.set_column(t.column_names.index(LABEL), LABEL, pa.array([1] * t.num_rows)), "only one class"),
    ],
)
def test_labels_that_do_not_fit_are_explained(hospitals, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        _task(hospitals, tmp_path, change(read_table(hospitals / "labels.csv")))


def _with_column(table, **changed):
    """Add a column of numbers with other cells at some rows."""
    cells = [changed.get(f"row{number}", str(number / 10)) for number in range(table.num_rows)]
    return table.append_column("depth", pa.array(cells, pa.string()))


def test_text_in_a_column_of_numbers_names_the_column_and_counts_the_cells_but_never_shows_them(hospitals, tmp_path):
    table = read_table(hospitals / "labels.csv")
    spoilt = _with_column(table, row1="Mrs Smith", row2="1,5", row3="inf", row4="1e300", row5="")
    for change in ({"covariates": ["depth"]}, {"where": {"depth": [0, 1000]}}):
        with pytest.raises(DataError, match=rf"4 of {table.num_rows} cells of the column depth hold no number") as told:
            _task(hospitals, tmp_path, spoilt, **change)
        assert "Smith" not in str(told.value)
        assert told.value.__cause__ is None


@pytest.mark.parametrize("empty", ["", "  ", None, "nan"])
def test_an_empty_cell_of_a_covariate_is_refused_and_one_of_a_range_leaves_its_row_out(hospitals, tmp_path, empty):
    table = read_table(hospitals / "labels.csv")
    spoilt = _with_column(table, row1=empty, row7=empty)
    with pytest.raises(DataError, match=rf"2 of {table.num_rows} cells of the column depth are empty"):
        _task(hospitals, tmp_path, spoilt, covariates=["depth"])
    store, ranged = _task(hospitals, tmp_path, spoilt, where={"depth": [0, 1e6]}, covariates=["depth"])
    files = [table["file"][number].as_py() for number in range(table.num_rows) if number not in (1, 7)]
    assert set(store.column("image")[ranged.rows]) == set(store.names_of(files))
    assert np.isfinite(ranged.images.covariates).all()
    both = label_images(store, spoilt, Question(LABEL, {"depth": [0.25, 0.65]}, ["depth"]))
    assert sorted(both.covariates[:, 0].tolist()) == pytest.approx([0.3, 0.4, 0.5, 0.6])


def test_numbers_and_booleans_are_read_as_they_are(hospitals, tmp_path):
    table = read_table(hospitals / "labels.csv")
    table = table.append_column("old", pa.array([number % 2 == 0 for number in range(table.num_rows)]))
    table = table.append_column("age", pa.array([number % 90 for number in range(table.num_rows)]))
    store, task = _task(hospitals, tmp_path, table, covariates=["old", "age"])
    given = [table[name].to_pylist() for name in ("old", "age")]
    known = dict(zip(store.names_of(table["file"].to_pylist()), zip(*given, strict=True), strict=True))
    for row, given_ in zip(task.rows, task.images.covariates.tolist(), strict=True):
        assert given_ == [float(value) for value in known[store.column("image")[row]]]


def test_a_finding_with_one_value_in_a_domain_does_not_refuse_the_task():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (40, 2)).astype(np.float32)
    values[30:, 1] = 0.0
    task = _drawn_task(values, patients=40, tested=10, exclusive=False)
    require_both(task)
    features = rng.normal(size=(40, 2)).astype(np.float32)
    cells = list(probe_encoders({"x": features}, task, probes={"x": ["linear"]}, fractions=[1.0], seeds=1))
    scores, _ = score_cells(cells, task, resamples=20, metrics=tuple(METRICS))
    assert not any(math.isnan(score.value) for score in scores)
    values[30:, 0] = 0.0
    with pytest.raises(DataError, match="in domain show no finding both as 1 and as 0"):
        require_both(_drawn_task(values, patients=40, tested=10, exclusive=False))
    with pytest.raises(DataError, match="in domain show fewer than two classes"):
        require_both(_drawn_task(np.eye(2)[values[:, 0].astype(int)], patients=40, tested=10))


def test_labels_of_unknown_files_are_left_out_and_counted(hospitals, tmp_path):
    from fedssl import progress

    heard = []
    stop = progress.listen(heard.append)
    table = read_table(hospitals / "labels.csv")
    stranger = table.slice(0, 1).set_column(0, "file", pa.array(["gone/away.dcm"]))
    _, task = _task(hospitals, tmp_path, pa.concat_tables([table, stranger]))
    stop()
    assert len(task.rows) == table.num_rows
    assert any(isinstance(event, progress.Note) and event.text.startswith("1 of ") for event in heard)


def test_the_linear_probe_is_scikit_learns_on_standardised_features():
    rng = np.random.default_rng(0)
    train, labels, test = rng.normal(3, 2, (40, 5)), np.arange(40) % 2, rng.normal(3, 2, (10, 5))
    mean, deviation = train.mean(0), train.std(0)
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000).fit((train - mean) / deviation, labels)
    expected = model.predict_proba((test - mean) / deviation)
    np.testing.assert_allclose(linear_probe(train, classes_of(labels.tolist()), test), expected, atol=1e-9)


def test_nearest_neighbours_equal_a_loop_over_all_pairs():
    rng = np.random.default_rng(1)
    train, labels, test = rng.normal(size=(60, 4)), np.arange(60) % 3, rng.normal(size=(7, 4))
    votes = nearest_neighbours(train, classes_of(labels.tolist()), test)
    for row, point in zip(votes, test, strict=True):
        cosines = [float(point @ other / np.linalg.norm(point) / np.linalg.norm(other)) for other in train]
        nearest = sorted(range(60), key=lambda i: -cosines[i])[:20]
        expected = [sum(np.exp(cosines[i] / 0.07) for i in nearest if labels[i] == k) for k in range(3)]
        np.testing.assert_allclose(row, np.array(expected) / sum(expected), atol=1e-9)


def test_a_class_without_labelled_images_gets_probability_zero():
    train, two = np.random.default_rng(0).normal(size=(10, 2)), np.eye(3)[np.arange(10) % 2]
    assert linear_probe(train, Targets(two, ["a", "b", "c"], exclusive=True), train)[:, 2].tolist() == [0.0] * 10


def test_findings_are_probed_one_by_one_on_the_images_where_they_are_known():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 3)), rng.normal(size=(5, 3))
    values = np.where(rng.random((40, 2)) < 0.3, np.nan, rng.integers(0, 2, (40, 2))).astype(float)
    found = Targets(values, ["a", "b"], exclusive=False)
    for number in range(2):
        known = ~np.isnan(values[:, number])
        alone = linear_probe(train[known], classes_of(values[known, number].tolist()), test)[:, 1]
        np.testing.assert_allclose(linear_probe(train, found, test)[:, number], alone, atol=1e-9)
        votes = [
            sum(w * v for w, v in near) / sum(w for w, _ in near)
            for near in (_known_neighbours(train, values[:, number], point) for point in test)
        ]
        np.testing.assert_allclose(nearest_neighbours(train, found, test)[:, number], votes, atol=1e-9)


def _known_neighbours(train, values, point):
    cosines = [float(point @ other / np.linalg.norm(point) / np.linalg.norm(other)) for other in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:20]
    return [(np.exp(cosines[i] / 0.07), values[i]) for i in nearest if not np.isnan(values[i])]


def test_a_finding_that_was_never_seen_both_ways_gets_what_was_seen():
    values = np.array([[1.0, np.nan], [1.0, np.nan], [1.0, np.nan]])
    found = Targets(values, ["a", "b"], exclusive=False)
    assert linear_probe(np.eye(3), found, np.eye(3)).tolist() == [[1.0, 0.5]] * 3


def test_findings_are_read_from_columns_of_ones_zeros_and_nothing():
    found = findings_of([[1, "0", None], ["True", "", -1]], ["a", "b"])
    np.testing.assert_array_equal(found.values, [[1, 1], [0, np.nan], [np.nan, np.nan]])
    with pytest.raises(DataError, match="column b"):
        findings_of([[1], ["maybe"]], ["a", "b"])


def test_several_columns_make_a_task_of_findings(hospitals, tmp_path):
    table = read_table(hospitals / "labels.csv")
    other = pa.array([None if number % 5 == 0 else number % 2 for number in range(table.num_rows)])
    _, task = _task(hospitals, tmp_path, table.append_column("other", other), label=[LABEL, "other"])
    assert (task.targets.names, task.targets.exclusive) == ([LABEL, "other"], False)
    assert task.targets.scored == [0, 1]
    for rows in nested_label_subsets(task, [0.01], seeds=3).values():
        assert task.targets.take(rows).complete


def test_an_unseen_site_is_divided_by_patient_to_train_with_its_own_labels(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    own = held_back(task, 0.5)
    here = task.tests[UNSEEN]
    assert list(own.tests) == [UNSEEN]
    assert not set(task.patients[own.train]) & set(task.patients[own.tests[UNSEEN]])
    assert (own.train | own.tests[UNSEEN]).tolist() == here.tolist()


def test_a_division_that_fails_by_chance_is_drawn_again_and_no_patient_is_on_both_sides():
    """Two of six patients are sick: the first shuffle puts both on one side in some of the orders."""
    first = []
    for pair in itertools.combinations(range(6), 2):
        sick = np.repeat(np.isin(np.arange(10), [0, *(4 + number for number in pair)]), 2).astype(int)
        task = _drawn_task(np.eye(2)[sick], patients=10, tested=6, domain=UNSEEN)
        own = held_back(task, 0.5)
        assert own is not None
        trained, tested = (set(task.patients[mask]) for mask in (own.train, own.tests[UNSEEN]))
        assert not trained & tested
        assert trained | tested == set(range(4, 10))
        assert set(task.targets.classes[own.train]) == set(task.targets.classes[own.tests[UNSEEN]]) == {0, 1}
        half = set(np.random.default_rng(0).permutation(np.arange(4, 10))[:3])
        first.append(tested == half)
        assert first[-1] == (len({4 + number for number in pair} & half) == 1)
    assert {True, False} == set(first)


def test_one_sick_patient_cannot_be_divided():
    sick = np.repeat(np.arange(10) == 5, 2).astype(int)
    task = _drawn_task(np.eye(2)[sick], patients=10, tested=6, domain=UNSEEN)
    assert held_back(task, 0.5) is None
    assert held_back(task, 0.5, of="nowhere") is None


def test_a_rehearsal_leaves_the_test_patients_out_altogether(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    tried = rehearsal(task, 0.25)
    tested = np.any(list(task.tests.values()), axis=0)
    assert list(tried.tests) == ["in domain"]
    assert not (tried.train & tested).any()
    assert not (tried.tests["in domain"] & tested).any()
    assert not set(task.patients[tried.train]) & set(task.patients[tried.tests["in domain"]])


def test_seeds_are_averaged_in_the_estimate_and_drawn_in_the_resamples():
    values = np.tile(np.array([[0.2], [0.4], [0.9]]), (1, 1001))
    combined = combine_seeds(values, seed=0)
    assert combined[0] == pytest.approx(0.5)
    assert combined[1:].std() > 0.05
    assert combined[1:].mean() == pytest.approx(0.5, abs=0.02)


def test_a_difference_is_paired_so_equal_encoders_tie_exactly(hospitals, tmp_path):
    _, task = _task(hospitals, tmp_path)
    features = np.random.default_rng(0).normal(size=(len(task.rows), 4)).astype(np.float32)
    probes = {"federated": ["linear"], "twin": ["linear"]}
    both = {"federated": features, "twin": features}
    cells = list(probe_encoders(both, task, probes=probes, fractions=[0.5], seeds=2))
    _, values = score_cells(cells, task, resamples=50)
    for gap in compare(values, "federated", ["twin"], {"in domain": 9, "unseen site": 9}):
        assert (gap.difference, gap.low, gap.high, gap.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def evaluated(tiny, tmp_path):
    run = tmp_path / "run"
    simulate([*tiny, f"run_dir={run}", "simulation.arms=[federated,single_site]"])
    return run, evaluate_run(run)


def test_an_evaluation_names_the_weights_and_holds_every_encoder_share_and_domain(evaluated):
    run, results = evaluated
    encoders = {"federated", "single site", "random encoder"}
    assert set(results["encoders"]) == encoders
    assert results["encoders"]["federated"]["images_seen"] > 0
    assert len(results["encoders"]["federated"]["sha256"]) == 64
    cells = {(s["encoder"], s["probe"], s["fraction"], s["domain"]) for s in results["scores"]}
    assert len(cells) == (3 * 2 + 3) * 5 * 2  # of six shares: 1 % is the same two patients as 3 %
    assert all(
        s["low"] <= s["value"] + 1e-9 and s["value"] <= s["high"] + 1e-9
        for s in results["scores"]
        if s["fraction"] == 1
    )
    assert json.loads((run / "evaluation.json").read_text()) == results
    assert len((run / "evaluation.csv").read_text().splitlines()) == len(cells) + 1


def test_the_report_is_one_page_that_needs_nothing_beside_it_and_says_synthetic(evaluated):
    run, _ = evaluated
    cli._write_report(run)
    page = (run / "report.html").read_text()
    assert "Synthetic images." in page
    assert page.count("<svg") == 4
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "Against random encoder" in page
    for name in ("federated", "single site", "raw pixels (PCA)", "metadata only"):
        assert name in page


def test_an_encoder_that_never_trained_is_not_evaluated(evaluated):
    from dataclasses import replace

    from fedssl.checkpoint import load_checkpoint, save_checkpoint
    from fedssl.run_folder import RunFolder

    folder = RunFolder(evaluated[0])
    save_checkpoint(folder.last, replace(load_checkpoint(folder.last), round=0))
    with pytest.raises(ConfigError, match="never trained"):
        evaluate_run(folder.path)


def test_the_exported_encoder_gives_the_same_features_in_another_program(evaluated):
    import onnxruntime
    import torch

    from fedssl.weights import trained_method

    run, _ = evaluated
    assert CliRunner().invoke(cli.app, ["export", str(run)]).exit_code == 0
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(run / "exported" / "encoder.onnx")
    features = session.run(None, {"images": images.numpy()})[0]
    _, method = trained_method(run)
    np.testing.assert_allclose(features, method.encoder.eval()(images).detach().numpy(), atol=1e-4)


def test_a_run_is_not_evaluated_on_a_split_that_it_was_not_trained_with(tiny, hospitals, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(hospitals, root)
    settings = [text for text in tiny if not text.startswith("data.root")]
    simulate([*settings, f"data.root={root}", f"run_dir={tmp_path / 'run'}"])
    evaluate_run(tmp_path / "run")
    for number, patient in enumerate(sorted((root / "EAST").iterdir())[:4]):
        shutil.copytree(patient, root / "EAST" / f"NEW-{number}")
        for path in (root / "EAST" / f"NEW-{number}").iterdir():
            dataset = dcmread(path)
            dataset.PatientID = f"NEW-{number}"
            dataset.save_as(path)
    assert CliRunner().invoke(cli.app, ["index", str(root), "data.edge=40"]).exit_code == 0
    with pytest.raises(ConfigError, match="not those that it was trained on"):
        evaluate_run(tmp_path / "run")


def test_a_damaged_checkpoint_is_explained(evaluated):
    path = evaluated[0] / "checkpoints" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        evaluate_run(evaluated[0])
