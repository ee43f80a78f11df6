"""Several directions: centres of clusters of paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from kvgeom.checks import as_seed
from kvgeom.geometry.methods.mean import paired_differences
from kvgeom.geometry.methods.registry import Floats, Method, register_method


@dataclass(frozen=True)
class Clusters(Method):
    """Means of k-means clusters of the paired differences, that of the largest cluster first.

    Requests that are harmful in different ways may differ from their harmless twins in different directions. With one
    cluster this is the difference of means.

    Attributes
    ----------
    seed : int
        Of the starts of k-means.
    """

    name = "clusters"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_seed(self.seed))

    def most(self, positions: int, pairs: int) -> int:
        return pairs

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        differences = paired_differences(features, harmful)
        # The starts that are drawn depend on the order of the rows: it is made one that prompts and rotations leave alone.
        differences = differences[np.argsort((differences**2).sum(1), kind="stable")]
        mean: Floats = differences.mean(0)
        if k == 1:
            return mean[:, None]
        k = min(k, len(np.unique(differences, axis=0)))
        found = KMeans(k, n_init=10, random_state=self.seed).fit(differences)
        centres, sizes = found.cluster_centers_, np.bincount(found.labels_, minlength=k)
        ordered: Floats = centres[np.lexsort((-(centres**2).sum(1), -sizes))].T
        return ordered


register_method(Clusters())
