"""The weights of a logistic probe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from kvgeom.checks import number
from kvgeom.errors import InputError
from kvgeom.geometry.methods.registry import Floats, Method, register_method
from kvgeom.geometry.separation import folds_of


def logistic_weights(
    features: Floats, harmful: NDArray[np.bool_], *, strength: float | None = None, seed: int = 0
) -> tuple[Floats, float]:
    """Weights of an L2-regularised logistic probe, and the regularisation that cross-validation chose.

    Parameters
    ----------
    features : array [prompts, channels]
        Scaled by one number (their spread), not channel by channel: the direction rotates with the space.
    harmful : bool array [prompts]
    strength : float, optional
        Inverse regularisation (scikit-learn's ``C``); chosen by five-fold log-loss without it.
    seed : int
        Of the folds.

    Returns
    -------
    (array [channels], float)
    """
    centred = features - features.mean(0)
    # An L2 penalty never leaves the span of the data: in its coordinates the problem is the same and far smaller.
    u, s, basis = np.linalg.svd(centred, full_matrices=False)
    scores = u * (s / max(float(np.sqrt((s**2).mean() / len(s))), np.finfo(float).tiny))
    if strength is None:
        search = GridSearchCV(
            LogisticRegression(max_iter=2000),
            {"C": np.logspace(-4, 2, 4)},
            scoring="neg_log_loss",
            cv=PredefinedSplit(folds_of(harmful, 5, seed)),
        ).fit(scores, harmful)
        probe, strength = search.best_estimator_, float(search.best_params_["C"])
    else:
        probe = LogisticRegression(C=strength, max_iter=2000).fit(scores, harmful)
    weights: Floats = probe.coef_[0] @ basis
    return weights, strength


@dataclass(frozen=True)
class Logistic(Method):
    """Weights of a logistic probe with an L2 penalty.

    Attributes
    ----------
    strength : float, optional
        Inverse of the penalty (scikit-learn's ``C``, of features whose spread is 1); cross-validated by default.
    """

    name = "logistic"
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is None:
            return
        object.__setattr__(self, "strength", number("strength", self.strength, 0))
        if self.strength == 0:
            raise InputError("strength must be above 0, got 0, under which all weights are 0")

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        return logistic_weights(features, harmful, strength=self.strength)[0][:, None]

    def resampled(self, features: Floats, harmful: NDArray[np.bool_]) -> Logistic:
        if self.strength is not None:
            return self
        return replace(self, strength=logistic_weights(features, harmful)[1])


register_method(Logistic())
