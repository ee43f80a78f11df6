"""Which channels are outliers: the one definition that measures, figures and the explorer share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: A channel is an outlier if its root mean square is more than so many times that of the median channel.
OUTLIER_FACTOR = 5.0


def outlier_border(magnitude: ArrayLike, factor: float = OUTLIER_FACTOR) -> NDArray[np.float64]:
    """The root mean square above which channels are outliers, along the last axis, which is kept.

    Above ``factor`` times the median's, and not below the largest's by more than that factor.

    Examples
    --------
    >>> outlier_border([1.0, 1.0, 1.0, 100.0]).tolist()
    [20.0]
    """
    values = np.asarray(magnitude, dtype=float)
    median, largest = np.median(values, axis=-1, keepdims=True), values.max(-1, keepdims=True)
    border: NDArray[np.float64] = np.maximum(factor * median, largest / factor)
    return border
