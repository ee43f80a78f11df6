"""Intervals, all of them 95 % by default."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """Wilson interval of a proportion; ``(nan, nan)`` without trials."""
    if trials == 0:
        return float("nan"), float("nan")
    found = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def bootstrap_means(values: ArrayLike, *, samples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Percentile bootstrap of column means, resampling rows.

    Parameters
    ----------
    values : array [prompts, ...]

    Returns
    -------
    array [2, ...]
        Lower and upper end of the interval of the mean of each column.
    """
    rows = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    # Resampling rows is weighting them by multinomial counts: one matrix product instead of many gathers.
    counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=samples)
    means = np.tensordot(counts / len(rows), rows, axes=1)
    return np.quantile(means, [0.025, 0.975], axis=0)


def reduction_bootstrap(
    before: ArrayLike, after: ArrayLike, *, samples: int = 4000, seed: int = 0
) -> tuple[NDArray[np.float64], float]:
    """Paired bootstrap of ``1 - sum(after) / sum(before)`` over prompts.

    Parameters
    ----------
    before, after : bool array [prompts]
        Whether each prompt flips under the one and under the other recipe.

    Returns
    -------
    (array, float)
        The defined bootstrap values, and the share of samples in which ``before`` has no flip, so that the
        reduction is undefined.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(old), np.full(len(old), 1 / len(old)), size=samples)
    flips_before, flips_after = counts @ old, counts @ new
    defined = flips_before > 0
    return 1 - flips_after[defined] / flips_before[defined], float(1 - defined.mean())
