"""Which studies to label next."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedssl.evaluation.next_studies import next_studies


def _site(rng, *, clusters=4, studies=40, images=3, patients=25):
    """Images of studies that lie near one of several directions, and their similarity to these."""
    centres = np.eye(clusters, 8)
    of_study = rng.integers(clusters, size=studies)
    owner = rng.integers(patients, size=studies)
    study = rng.permutation(np.repeat(np.arange(studies), images))
    features = (centres[of_study[study]] + 0.15 * rng.normal(size=(len(study), 8))).astype(np.float32)
    return features, (features @ centres.T).astype(np.float32), study, owner[study], of_study


def _greedy(scores, study, patient, labelled, number):
    """The rule in loops: (study, cluster) in order."""
    names = list(dict.fromkeys(study.tolist()))
    rows = {name: [row for row, s in enumerate(study) if s == name] for name in names}
    near = {
        name: [np.mean([scores[row, c] for row in rows[name]], dtype=float) for c in range(scores.shape[1])]
        for name in names
    }
    home = {name: max(range(scores.shape[1]), key=lambda c: near[name][c]) for name in names}
    who = {name: patient[rows[name][0]] for name in names}
    taken = [name for name in names if any(labelled[row] for row in rows[name])]
    order = []
    while len(order) < number and len(taken) < len(names):
        left = [name for name in names if name not in taken]
        fresh = [name for name in left if who[name] not in {who[other] for other in taken}]
        pool = fresh or left

        def worth(cluster, pool=pool, taken=tuple(taken)):
            return sum(home[n] == cluster for n in pool) / (1 + sum(home[n] == cluster for n in taken))

        best = max(range(scores.shape[1]), key=worth)
        order.append((max((n for n in pool if home[n] == best), key=lambda n: near[n][best]), best))
        taken.append(order[-1][0])
    return order


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 50), share=st.floats(0, 0.6))
def test_the_order_is_that_of_the_rule_in_loops(seed, number, share):
    rng = np.random.default_rng(seed)
    features, scores, study, patient, _ = _site(rng, studies=20, patients=14)
    labelled = rng.random(len(study)) < share / 3
    found = next_studies(features, scores, study, patient, labelled, number)
    assert [(study[one.row], one.cluster) for one in found] == _greedy(scores, study, patient, labelled, number)


def test_the_row_is_the_image_of_the_study_nearest_to_the_cluster():
    features, scores, study, patient, _ = _site(np.random.default_rng(1))
    for one in next_studies(features, scores, study, patient, np.zeros(len(study), bool)):
        assert one.row == max(np.flatnonzero(study == study[one.row]), key=lambda row: scores[row, one.cluster])


@pytest.mark.parametrize("prototypes", [True, False])
def test_all_clusters_are_covered_before_any_study_more_than_needed(prototypes):
    features, scores, study, patient, of_study = _site(np.random.default_rng(2), clusters=4, studies=48, patients=48)
    none = np.zeros(len(study), bool)
    found = next_studies(features, scores if prototypes else None, study, patient, none, 8)
    assert set(of_study[study[[one.row for one in found]]]) == {0, 1, 2, 3}


@pytest.mark.parametrize("prototypes", [True, False])
def test_a_cluster_without_labels_comes_first(prototypes):
    features, scores, study, patient, of_study = _site(np.random.default_rng(3), studies=40, patients=40)
    labelled = np.isin(study, np.flatnonzero(of_study != 2))  # of all but one cluster
    labelled[np.isin(study, [np.flatnonzero(of_study == cluster)[0] for cluster in (0, 1, 3)])] = False
    first = next_studies(features, scores if prototypes else None, study, patient, labelled, 1)[0]
    assert of_study[study[first.row]] == 2


@pytest.mark.parametrize("prototypes", [True, False])
def test_no_labelled_study_is_suggested_though_only_one_of_its_images_is_labelled(prototypes):
    features, scores, study, patient, _ = _site(np.random.default_rng(4))
    labelled = np.zeros(len(study), bool)
    labelled[[np.flatnonzero(study == name)[0] for name in range(0, 40, 2)]] = True
    found = next_studies(features, scores if prototypes else None, study, patient, labelled, 100)
    assert sorted(study[one.row] for one in found) == list(range(1, 40, 2))


def test_nobody_is_suggested_twice_while_others_remain():
    features, scores, study, patient, _ = _site(np.random.default_rng(5), studies=40, patients=12)
    found = next_studies(features, scores, study, patient, np.zeros(len(study), bool), 40)
    people = [patient[one.row] for one in found]
    everybody = len(set(patient))
    assert len(set(people[:everybody])) == everybody
    assert len({study[one.row] for one in found}) == 40


@pytest.mark.parametrize("prototypes", [True, False])
def test_names_and_a_second_call_change_nothing(prototypes):
    features, scores, study, patient, _ = _site(np.random.default_rng(6))
    none = np.zeros(len(study), bool)
    given_ = scores if prototypes else None
    first = next_studies(features, given_, study, patient, none)
    renamed = np.array([f"{(7 * name) % 41:02d}" for name in study])
    assert (
        first
        == next_studies(features, given_, study, patient, none)
        == next_studies(features, given_, renamed, patient, none)
    )
    assert len(first) == 20


def test_without_anything_to_label_nothing_is_suggested():
    features, scores, study, patient, _ = _site(np.random.default_rng(7))
    assert next_studies(features, scores, study, patient, np.ones(len(study), bool)) == []


def test_the_reason_counts_the_studies_of_the_cluster_that_are_there_labelled_and_proposed():
    scores = np.array([[1, 0], [0.9, 0], [0.8, 0], [0.7, 0], [0, 1]], np.float32)
    study = patient = np.arange(5)
    found = next_studies(scores, scores, study, patient, study == 3, 9)
    assert [one.why for one in found] == [
        "cluster 0: 4 studies, 1 labelled",
        "cluster 1: 1 study, none labelled",
        "cluster 0: 4 studies, 1 labelled, 1 proposed above",
        "cluster 0: 4 studies, 1 labelled, 2 proposed above",
    ]
    again = next_studies(scores[:2], scores[:2], study[:2], np.zeros(2, int), study[:2] == 0, 9)
    assert [one.why for one in again] == ["cluster 0: 2 studies, 1 labelled; a further study of a patient"]
