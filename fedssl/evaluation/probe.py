"""Classifiers on frozen features: a linear probe and nearest neighbours."""

import warnings

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedssl.evaluation.targets import Targets

_INVERSE_PENALTY = 0.01
_NEIGHBOURS = 20
_TEMPERATURE = 0.07


def linear_probe(
    train: Float[np.ndarray, "labelled width"], targets: Targets, test: Float[np.ndarray, "images width"]
) -> Float[np.ndarray, "images outputs"]:
    """Probabilities by logistic regression with an L2 penalty on standardised features; findings one by one."""
    if targets.exclusive:
        return _all_classes(*_logistic(train, targets.classes, test), len(targets.names))
    columns = []
    for values in targets.values.T:
        known = ~np.isnan(values)
        if len(np.unique(values[known])) < 2:
            columns.append(np.full(len(test), values[known].mean() if known.any() else 0.5))
        else:
            columns.append(_logistic(train[known], values[known].astype(int), test)[0][:, 1])
    return np.stack(columns, 1)


def _logistic(
    train: Float[np.ndarray, "labelled width"],
    labels: Int[np.ndarray, " labelled"],
    test: Float[np.ndarray, "images width"],
) -> tuple[Float[np.ndarray, "images present"], Int[np.ndarray, " present"]]:
    """Fit and predict; returns the probabilities of the classes that the labels show, and these classes."""
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000, class_weight="balanced")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels)
    return model.predict_proba(test), model.classes_


def nearest_neighbours(
    train: Float[np.ndarray, "labelled width"], targets: Targets, test: Float[np.ndarray, "images width"]
) -> Float[np.ndarray, "images outputs"]:
    """Shares among the 20 most similar labelled images, weighted by exp(cosine / 0.07) (Wu 2018, eq. 7).

    A finding counts only the neighbours of which it is known; without any it is 0.5.
    """
    similarity = _unit(test) @ _unit(train).T
    count = min(_NEIGHBOURS, train.shape[0])
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    weight = np.exp(np.take_along_axis(similarity, nearest, axis=1) / _TEMPERATURE)[:, :, None]
    values = targets.values[nearest]
    known = ~np.isnan(values)
    total = (weight * known).sum(1)
    votes = (weight * np.where(known, values, 0.0)).sum(1)
    return np.divide(votes, total, out=np.full(votes.shape, 0.5), where=total > 0)


def _unit(features: Float[np.ndarray, "images width"]) -> Float[np.ndarray, "images width"]:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def _all_classes(
    probabilities: Float[np.ndarray, "images present"], present: Int[np.ndarray, " present"], classes: int
) -> Float[np.ndarray, "images classes"]:
    """Put a column of zeros where the labelled images lack a class."""
    full = np.zeros((len(probabilities), classes), probabilities.dtype)
    full[:, present] = probabilities
    return full


LINEAR, KNN = "linear", "knn"
PROBES = {LINEAR: linear_probe, KNN: nearest_neighbours}
