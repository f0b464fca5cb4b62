"""Classifiers on frozen features: a linear probe and nearest neighbours."""

import warnings

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_INVERSE_PENALTY = 0.01
_NEIGHBOURS = 20
_TEMPERATURE = 0.07


def linear_probe(
    train: Float[np.ndarray, "labelled width"],
    labels: Int[np.ndarray, " labelled"],
    test: Float[np.ndarray, "images width"],
    *,
    classes: int,
) -> Float[np.ndarray, "images classes"]:
    """Class probabilities by logistic regression with an L2 penalty on standardised features."""
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000, class_weight="balanced")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels)
    return _all_classes(model.predict_proba(test), model.classes_, classes)


def nearest_neighbours(
    train: Float[np.ndarray, "labelled width"],
    labels: Int[np.ndarray, " labelled"],
    test: Float[np.ndarray, "images width"],
    *,
    classes: int,
) -> Float[np.ndarray, "images classes"]:
    """Class shares among the 20 most similar labelled images, weighted by exp(cosine / 0.07) (Wu 2018, eq. 7)."""
    similarity = _unit(test) @ _unit(train).T
    count = min(_NEIGHBOURS, train.shape[0])
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    weight = np.exp(np.take_along_axis(similarity, nearest, axis=1) / _TEMPERATURE)
    votes = np.stack([(weight * (labels[nearest] == number)).sum(1) for number in range(classes)], 1)
    return votes / votes.sum(1, keepdims=True)


def _unit(features: Float[np.ndarray, "images width"]) -> Float[np.ndarray, "images width"]:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def _all_classes(
    probabilities: Float[np.ndarray, "images present"], present: Int[np.ndarray, " present"], classes: int
) -> Float[np.ndarray, "images classes"]:
    """Put a column of zeros where the labelled images lack a class."""
    full = np.zeros((len(probabilities), classes), probabilities.dtype)
    full[:, present] = probabilities
    return full


PROBES = {"linear": linear_probe, "knn": nearest_neighbours}
