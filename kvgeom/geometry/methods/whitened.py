"""The difference of means, whitened: Fisher's linear discriminant with a shrunk covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import Floats, Method, register_method


def shrinkage_of(within: Floats) -> tuple[float, float]:
    """Ledoit and Wolf's shrinkage of a covariance, and the variance that it is shrunk to.

    The same as ``sklearn.covariance.LedoitWolf(assume_centered=True)``, from inner products alone: there are mostly far fewer
    rows than channels.

    Parameters
    ----------
    within : array [rows, channels]
        Centred.

    Returns
    -------
    shrinkage : float
        From 0 to 1.
    variance : float
        Mean over the channels.

    References
    ----------
    Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, J. Multivar. Anal. 88 (2004).
    """
    rows, channels = within.shape
    squares = (within**2).sum(1)
    gram = within @ within.T if rows < channels else within.T @ within  # of the same sum of squares
    variance = float(squares.sum()) / rows / channels
    squared = float((gram**2).sum()) / rows**2  # of the covariance's entries
    distance = squared / channels - variance**2  # of the covariance from its target
    error = (float((squares**2).sum()) / rows - squared) / rows / channels
    if distance <= 0 or error <= 0:
        return (0.0 if error <= 0 < distance else 1.0), variance
    return min(1.0, error / distance), variance


def discriminant(features: Floats, harmful: NDArray[np.bool_]) -> Floats:
    """The inverse of the shrunk within-class covariance times the difference of means, ``[channels]``.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    """
    gap = difference_of_means(features, harmful)
    within = features - np.where(harmful[:, None], features[harmful].mean(0), features[~harmful].mean(0))
    shrinkage, variance = shrinkage_of(within)
    _, s, basis = np.linalg.svd(within, full_matrices=False)
    floor = max(shrinkage * variance, np.finfo(float).eps * float(s[0] ** 2) / len(within))
    if floor == 0:  # no spread at all
        return gap
    along = basis @ gap
    # Outside of the span of the rows the covariance is the floor; within, the floor and what was seen.
    seen = (1 - shrinkage) * s**2 / len(within)
    whitened: Floats = gap / floor + basis.T @ (along / (seen + floor) - along / floor)
    return whitened


@dataclass(frozen=True)
class Whitened(Method):
    """Fisher's discriminant: the inverse covariance within classes, shrunk after Ledoit and Wolf, times the difference of means.

    Where classes differ by a shift, this is the direction along which a request is told best from the other class. It turns
    away from channels and directions of large spread, as the logistic probe does, without a penalty to choose.
    """

    name = "whitened"
    in_span = False  # a covariance is shrunk towards the same variance in all channels, whose number counts

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        return discriminant(features, harmful)[:, None]


register_method(Whitened())
