"""The difference of means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.geometry.methods.registry import Floats, Method, register_method


def difference_of_means(features: Floats, harmful: NDArray[np.bool_]) -> Floats:
    """Mean of the harmful rows minus mean of the harmless rows.

    Parameters
    ----------
    features : array [prompts, ..., channels]
    harmful : bool array [prompts]

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.3.
    """
    gap: Floats = features[harmful].mean(0) - features[~harmful].mean(0)
    return gap


def paired_differences(features: Floats, harmful: NDArray[np.bool_]) -> Floats:
    """The n-th harmful row minus the n-th harmless row, ``[pairs, channels]``; rows without a partner are left out.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    """
    bad, good = features[harmful], features[~harmful]
    pairs = min(len(bad), len(good))
    differences: Floats = bad[:pairs] - good[:pairs]
    return differences


@dataclass(frozen=True)
class Mean(Method):
    """The difference of class means; of more dimensions, the leading singular vectors of the differences at all positions."""

    name = "mean"

    def most(self, positions: int, pairs: int) -> int:
        return positions

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        return difference_of_means(features, harmful)[:, None]

    def subspace(self, x: Floats, harmful: NDArray[np.bool_], best: int, defined: NDArray[np.bool_], k: int) -> Floats:
        if k == 1:
            return self.directions(x[:, best], harmful, k)
        gaps = difference_of_means(x, harmful)[defined]
        found: Floats = np.linalg.svd(gaps, full_matrices=False)[2][:k].T
        return found


register_method(Mean())
