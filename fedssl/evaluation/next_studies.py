"""Which studies to label next: typical ones of clusters that have few labels (cf. TypiClust, Hacohen et al. 2022)."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from fedssl.data.cache import ImageStore
from fedssl.data.pseudonym import numbered
from fedssl.evaluation.features import embed
from fedssl.methods.base import Method

_MOST_CLUSTERS = 256
_IMAGES_OF_A_STUDY = 8  # that stand for it


@dataclass(frozen=True)
class Suggestion:
    """A study to label: the row of its most typical image, the number of its cluster, and in words why it is chosen."""

    row: int
    cluster: int
    why: str = ""


@torch.no_grad()
def suggest(
    method: Method,
    store: ImageStore,
    here: Bool[np.ndarray, " stored"],
    labelled: Int[np.ndarray, " labelled"],
    *,
    edge: int,
    number: int = 20,
) -> list[Suggestion]:
    """Choose studies of a store, by a few images of each, evenly spaced; patients who share images count as one.

    Args:
        method: trained; its prototypes are the clusters if it has some.
        store: the images.
        here: which of them may be suggested.
        labelled: rows of images with a label.
        edge: pixels on a side of the encoder's input.
        number: of studies wanted.
    """
    studies = store.column("study")
    known = np.isin(studies, np.unique(studies[labelled]))
    if not number or known[here].all():
        return []
    rows = _some_of_each(studies, store.column("order"), np.flatnonzero(here))
    features = embed(method.encoder, store, rows, edge=edge)
    scores = None
    if method.num_prototypes:
        on_device = torch.from_numpy(features).to(next(method.parameters()).device)
        scores = method.eval().prototype_scores(on_device).float().cpu().numpy()
    found = next_studies(features, scores, studies[rows], store.column("group")[rows], known[rows], number)
    return [replace(one, row=int(rows[one.row])) for one in found]


def _some_of_each(
    studies: np.ndarray, order: Int[np.ndarray, " stored"], rows: Int[np.ndarray, " here"]
) -> Int[np.ndarray, " chosen"]:
    rows = rows[np.lexsort([order[rows], studies[rows]])]
    starts = np.unique(studies[rows], return_index=True)[1][1:]
    few = [
        part[np.unique(np.linspace(0, len(part) - 1, _IMAGES_OF_A_STUDY).astype(int))]
        for part in np.split(rows, starts)
    ]
    return np.sort(np.concatenate(few))


@dataclass(frozen=True)
class _Studies:
    """Each study's patient, whether it is labelled, and how near it is to each cluster (larger: nearer)."""

    patients: Int[np.ndarray, " studies"]
    labelled: Bool[np.ndarray, " studies"]
    nearness: Float[np.ndarray, "studies clusters"]


def next_studies(
    features: Float[np.ndarray, "images width"],
    prototype_scores: Float[np.ndarray, "images prototypes"] | None,
    studies: np.ndarray,
    patients: np.ndarray,
    labelled: Bool[np.ndarray, " images"],
    number: int = 20,
) -> list[Suggestion]:
    """Choose studies one by one, the most useful first; the same input gives the same list.

    A study belongs to the prototype that it is nearest to. Each time the cluster is taken whose unlabelled studies are
    most for each that is labelled or chosen (plus one), and in it the study nearest to the prototype. Only when no
    other is left comes a study of a patient who has a labelled or chosen one.

    Args:
        features: of images; each study counts with the mean of its images.
        prototype_scores: similarity of each image to each prototype; None: clusters are found by k-means.
        studies: [images] names.
        patients: [images] names.
        labelled: images with a label; a study with one of them is labelled.
        number: of studies wanted.
    """
    study = numbered(studies)
    count = np.bincount(study)
    owner = numbered(patients)[np.unique(study, return_index=True)[1]]
    known = np.bincount(study, labelled) > 0
    each = prototype_scores if prototype_scores is not None else _kmeans(features, study, known, number)
    nearness = np.zeros((len(count), each.shape[1]))
    np.add.at(nearness, study, each)
    nearness /= count[:, None]
    chosen = _chosen(_Studies(owner, known, nearness), number)
    return [Suggestion(_typical(study == one, each[:, cluster]), cluster, why) for one, cluster, why in chosen]


def _typical(here: Bool[np.ndarray, " images"], nearness: Float[np.ndarray, " images"]) -> int:
    rows = np.flatnonzero(here)
    return int(rows[nearness[rows].argmax()])


def _chosen(of: _Studies, number: int) -> list[tuple[int, int, str]]:
    """Choose studies greedily; ties go to the lower number. Returns study, cluster and reason of each."""
    clusters = of.nearness.shape[1]
    cluster = of.nearness.argmax(1)
    left = ~of.labelled
    sizes, labelled = (np.bincount(cluster[x], minlength=clusters) for x in (slice(None), of.labelled))
    done = labelled.copy()
    met = set(of.patients[of.labelled].tolist())
    chosen: list[tuple[int, int, str]] = []
    while left.any() and len(chosen) < number:
        fresh = left & ~np.isin(of.patients, list(met))
        pool = fresh if fresh.any() else left
        best = int((np.bincount(cluster[pool], minlength=clusters) / (1 + done)).argmax())
        inside = np.flatnonzero(pool & (cluster == best))
        study = int(inside[of.nearness[inside, best].argmax()])
        why = _why(best, int(sizes[best]), int(labelled[best]), int(done[best] - labelled[best]))
        chosen.append((study, best, why if fresh.any() else f"{why}; a further study of a patient"))
        left[study] = False
        done[best] += 1
        met.add(int(of.patients[study]))
    return chosen


def _why(cluster: int, studies: int, labelled: int, proposed: int) -> str:
    """Say in words what a cluster holds when one of its studies is chosen."""
    text = f"cluster {cluster}: {studies} {'study' if studies == 1 else 'studies'}, {labelled or 'none'} labelled"
    return f"{text}, {proposed} proposed above" if proposed else text


def _kmeans(
    features: Float[np.ndarray, "images width"],
    study: Int[np.ndarray, " images"],
    labelled: Bool[np.ndarray, " studies"],
    number: int,
) -> Float[np.ndarray, "images clusters"]:
    """Cluster the studies' mean directions, as many clusters as are labelled or wanted; nearness of images to each."""
    unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    means = np.zeros((len(labelled), unit.shape[1]))
    np.add.at(means, study, unit)
    means /= np.bincount(study)[:, None]
    clusters = min(len(means), int(labelled.sum()) + max(number, 1), _MOST_CLUSTERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different studies than clusters
        model = KMeans(clusters, random_state=0, n_init=4).fit(means)
    return 2 * unit @ model.cluster_centers_.T - (model.cluster_centers_**2).sum(1)  # 1 - squared distance
