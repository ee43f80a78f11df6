"""Leading singular vectors of paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.errors import InputError, brief
from kvgeom.geometry.methods.mean import paired_differences
from kvgeom.geometry.methods.registry import Floats, Method, register_method


def principal_differences(features: Floats, harmful: NDArray[np.bool_], k: int = 1) -> Floats:
    """Leading right singular vectors of the differences between paired requests.

    The differences are not centred: what they have in common is what is looked for. Further vectors are what varies
    most from pair to pair.

    Parameters
    ----------
    features : array [prompts, channels]
        The n-th harmful row is paired with the n-th harmless row.
    harmful : bool array [prompts]
    k : int
        At most the number of pairs.

    Returns
    -------
    array [channels, k]
        Orthonormal columns.
    """
    differences = paired_differences(features, harmful)
    most = min(differences.shape)
    if not 1 <= k <= most:
        raise InputError(
            f"k must be 1 to {most} for {len(differences)} pairs of {features.shape[1]} channels, got {brief(k)}"
        )
    basis: Floats = np.linalg.svd(differences, full_matrices=False)[2][:k].T
    return basis


@dataclass(frozen=True)
class PCA(Method):
    """Leading right singular vectors of the paired differences, which are not centred."""

    name = "pca"

    def most(self, positions: int, pairs: int) -> int:
        return pairs

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        return principal_differences(features, harmful, k)


register_method(PCA())
