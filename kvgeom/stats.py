"""Intervals, all of them 95 % by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, spearmanr

from kvgeom.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

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


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; all three are equal where it is taken as known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]" if self.low < self.high else f"{self.value:.0%}"


def reduction_estimate(before: ArrayLike, after: ArrayLike, *, seed: int = 0) -> Estimate | None:
    """``1 - flips after / flips before`` with the interval of :func:`reduction_posterior`; None if nothing flips before."""
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if not old.any():
        return None
    value = 1 - int(new.sum()) / int(old.sum())
    low, high = (float(q) for q in np.quantile(reduction_posterior(old, new, seed=seed), [0.025, 0.975]))
    return Estimate(value, min(low, value), max(high, value))


def bootstrap_reduction(
    before: ArrayLike, after: ArrayLike, *, samples: int = 2000, seed: int = 0
) -> tuple[Interval, float]:
    """Percentile interval of ``1 - mean(after) / mean(before)``, prompts resampled in pairs.

    Parameters
    ----------
    before, after : array [prompts]
        Flips (0, 1) or margins lost, of the same prompts.

    Returns
    -------
    interval : (float, float)
        NaN where no sample has damage that could be reduced.
    share : float
        Share of the samples with such damage (a positive mean before).
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(old), np.full(len(old), 1 / len(old)), size=samples) / len(old)
    b, a = weights @ old, weights @ new
    usable = b > 0
    if not usable.any():
        return (float("nan"), float("nan")), 0.0
    low, high = np.quantile(1 - a[usable] / b[usable], [0.025, 0.975])
    return (float(low), float(high)), float(usable.mean())


def mcnemar(one: ArrayLike, other: ArrayLike) -> float:
    """Exact two-sided McNemar p-value: do two recipes flip different numbers of the same prompts?

    Parameters
    ----------
    one, other : bool array [prompts]
        Whether each prompt flips under either recipe.
    """
    a, b = np.asarray(one, dtype=bool), np.asarray(other, dtype=bool)
    only_one, only_other = int((a & ~b).sum()), int((~a & b).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation over layers, with its bootstrap 95 % interval over prompts.

    Attributes
    ----------
    value, low, high : float
        NaN where one side does not vary. The interval alone is NaN where one side does not vary in more than a twentieth
        of the resamples, as with a single flip: so few prompts decide nothing.
    layers, prompts : int
    """

    value: float
    low: float
    high: float
    layers: int
    prompts: int

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "rank correlation undetermined (one side does not vary)"
        if not np.isfinite(self.low):
            return (
                f"rank correlation {self.value:.2f}, undetermined (one side does not vary in many resamples of "
                f"{self.prompts} prompts)"
            )
        return (
            f"rank correlation {self.value:.2f} [{self.low:.2f}, {self.high:.2f}] "
            f"over {self.layers} layers ({self.prompts} prompts)"
        )


def rank_correlation(a: xr.DataArray, b: xr.DataArray, *, samples: int = 1000, seed: int = 0) -> RankCorrelation:
    """Do two measures rank the layers alike? Means over prompts are compared, prompts are resampled together.

    Parameters
    ----------
    a, b : DataArray (prompt, layer), or (layer) for a measure that has no prompts
        For instance ``first_order(...).by_layer`` and ``patch_layers(...).margin_drop.sel(scheme=...)``.

    Raises
    ------
    InputError
        If they are not about the same layers or prompts, or neither has prompts.
    """
    if list(a.layer.values) != list(b.layer.values):
        raise InputError(
            f"layers {list(a.layer.values)} and {list(b.layer.values)} cannot be compared; measure the same"
        )
    sizes = {x.sizes["prompt"] for x in (a, b) if "prompt" in x.dims}
    if len(sizes) != 1:
        raise InputError(
            f"measures over {sorted(sizes) or 'no'} prompts cannot be compared; use the same prompts for both"
        )
    n = sizes.pop()
    one, two = (np.asarray(x.transpose(..., "layer").values, dtype=float) for x in (a, b))
    rng = np.random.default_rng(seed)
    draws = [_spearman(one, two, rng.integers(0, n, n)) for _ in range(samples)]
    finite = [d for d in draws if np.isfinite(d)]
    value = _spearman(one, two, np.arange(n))
    decided = np.isfinite(value) and len(finite) >= 0.95 * samples
    low, high = np.quantile(finite, [0.025, 0.975]) if decided else (np.nan, np.nan)
    return RankCorrelation(value, float(low), float(high), one.shape[-1], n)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
    one, two = (x[rows].mean(0) if x.ndim == 2 else x for x in (a, b))
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return float("nan")
    return float(spearmanr(one, two).statistic)
