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


def reduction_posterior(
    before: ArrayLike, after: ArrayLike, *, samples: int = 20_000, seed: int = 0
) -> NDArray[np.float64]:
    """Draws of ``1 - P(flips after) / P(flips before)``, paired by prompt.

    A prompt flips under both recipes, under one, or under none; the four probabilities have a Dirichlet posterior
    from the counts and Jeffreys' prior of 1/2 each. Unlike a bootstrap, which knows only what was seen, this
    does not take "3 of 3 were rescued" for certainty.

    Parameters
    ----------
    before, after : bool array [prompts]
        Whether each prompt flips under the one and under the other recipe.

    Returns
    -------
    array [samples]
    """
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    counts = np.array([(old & new).sum(), (old & ~new).sum(), (~old & new).sum(), (~old & ~new).sum()])
    both, rescued, lost, _ = np.random.default_rng(seed).dirichlet(counts + 0.5, size=samples).T
    reduction: NDArray[np.float64] = 1 - (both + lost) / (both + rescued)
    return reduction
