"""What the ratio would be for subspaces that have nothing to do with safety."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_bases(channels: int, k: int, count: int, seed: int = 0) -> NDArray[np.float64]:
    """Orthonormal bases of uniformly random subspaces (null a).

    Parameters
    ----------
    channels, k, count : int
    seed : int

    Returns
    -------
    array [count, channels, k]
    """
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((count, channels, k)))[0]
