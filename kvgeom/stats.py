"""Intervals, all of them 95 % by default."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, rankdata
from scipy.stats import t as student

from kvgeom.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

Interval = tuple[float, float]
_Name = TypeVar("_Name", bound=Hashable)
#: How often a family of tests may be wrong.
WRONG = 0.05


def wilson(successes: int, trials: int) -> Interval:
    """Wilson interval of a proportion; ``(nan, nan)`` without trials."""
    if trials == 0:
        return float("nan"), float("nan")
    found = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted for being several (Holm): one at most 0.05 is wrong in no more than 5 % of families.

    Parameters
    ----------
    p : array [tests]

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    bounded: NDArray[np.float64] = np.minimum(adjusted, 1.0)
    return bounded


def shares_above(successes: Sequence[int], trials: int, border: float) -> list[Literal["above", "below", "open"]]:
    """On which side of a border each of several proportions lies, wrong about any of them in no more than 5 % of cases a side.

    Exact binomial tests against the border, one-sided, adjusted by :func:`holm`.

    Parameters
    ----------
    successes : sequence of int
        One for each proportion, all of the same number of trials.
    trials : int
    border : float

    Examples
    --------
    >>> shares_above([0, 3, 40], 60, 0.1)
    ['below', 'open', 'above']
    """
    if trials == 0 or not successes:
        return ["open"] * len(successes)
    above, below = (
        holm([binomtest(k, trials, border, alternative=side).pvalue for k in successes]) <= WRONG
        for side in ("greater", "less")
    )
    return ["above" if a else "below" if b else "open" for a, b in zip(above, below, strict=True)]


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

    @property
    def open(self) -> bool:
        """Whether, as a reduction, it may be anything: from twice the loss and more to some of it taken away."""
        return self.low < -1 and self.high > 0

    @property
    def interval(self) -> str:
        """The interval in words."""
        return f"{percent(self.low)} to {percent(self.high)}"

    def __str__(self) -> str:
        if self.open:
            return f"an undetermined share (95 % interval {self.interval})"
        if self.low < self.high:
            return f"{percent(self.value)} [{percent(self.low)}, {percent(self.high)}]"
        return percent(self.value)


def percent(share: float) -> str:
    """A share as text; of a reduction that more than doubles the loss no more than that."""
    return "below -100%" if share < -1 else f"{share:.0%}"


def reduction_estimate(before: ArrayLike, after: ArrayLike, *, seed: int = 0) -> Estimate | None:
    """``1 - flips after / flips before`` with the interval of :func:`reduction_posterior`; None if nothing flips before."""
    old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if not old.any():
        return None
    value = 1 - int(new.sum()) / int(old.sum())
    low, high = (float(q) for q in np.quantile(reduction_posterior(old, new, seed=seed), [0.025, 0.975]))
    return Estimate(value, min(low, value), max(high, value))


def mean_of_blocks(sums: ArrayLike, counts: ArrayLike, passages: ArrayLike | None = None) -> Estimate:
    """Mean of a series whose neighbours depend on each other, with an interval from the means of its blocks.

    Blocks that are long against the dependence are nearly independent, whatever happens inside them. The spread of their
    sums around what their lengths let expect gives the standard error (method of batch means, for a ratio), Student's t
    with one degree of freedom less than there are blocks the interval.

    Blocks of one passage may have more in common than their neighbourhood: its subject. Where passages are given, the same is
    done with the sums of whole passages, of which there are few, and the wider of the two intervals is the one.

    Parameters
    ----------
    sums : array [blocks]
        Of the values of each block.
    counts : array [blocks]
        How many values that is.
    passages : array [blocks], optional
        The number of the passage that each block is from.

    Returns
    -------
    Estimate
        The interval is NaN for a single block, unless its sum is 0: what does not differ at all is known.

    References
    ----------
    Conway, "Some tactical problems in digital simulation", 1963. Cochran, "Sampling techniques", 1977, chapter 6.

    Examples
    --------
    >>> found = mean_of_blocks([2.0, 4.0, 3.0], [10, 10, 10])
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
    (0.3, 0.052, 0.548)
    """
    totals, sizes = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if passages is not None:
        _, member = np.unique(np.asarray(passages), return_inverse=True)
        whole = mean_of_blocks(*(np.bincount(member, weights=values) for values in (totals, sizes)))
        found = mean_of_blocks(totals, sizes)
        return whole if whole.high - whole.low > found.high - found.low else found  # NaN of one passage is not wider
    blocks, mean = len(totals), float(totals.sum() / sizes.sum())
    if not totals.any():
        return Estimate(mean, mean, mean)
    if blocks == 1:
        return Estimate(mean, float("nan"), float("nan"))
    error = np.sqrt(blocks / (blocks - 1) * ((totals - mean * sizes) ** 2).sum()) / sizes.sum()
    reach = float(student.ppf(0.975, blocks - 1) * error)
    return Estimate(mean, mean - reach, mean + reach)


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


def against(flips: Mapping[_Name, ArrayLike], reference: _Name) -> NDArray[np.float64]:
    """Exact McNemar p-values of several recipes against one of them, adjusted by :func:`holm`; 1 for that one.

    Parameters
    ----------
    flips : mapping of name to bool array [prompts]
        Whether each prompt flips under each recipe.
    reference : name

    Examples
    --------
    >>> many, none = [True] * 8, [False] * 8
    >>> against({"all": many, "first": none, "last": many, "keys": many}, "all")
    array([1.        , 0.0234375, 1.        , 1.        ])
    """
    others = [name for name in flips if name != reference]
    adjusted = holm([mcnemar(flips[name], flips[reference]) for name in others])
    found = dict(zip(others, adjusted, strict=True))
    return np.array([found.get(name, 1.0) for name in flips])


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation over layers of what two measures would be over all prompts, with its 95 % interval.

    Few prompts blur the order of the layers, so that the correlation of two means is too small. It is divided by how well
    each measure agrees with itself from one half of the prompts to the other (Spearman, 1904).

    Attributes
    ----------
    value, low, high : float
        NaN where a measure does not vary, or its halves do not agree (their correlation below :data:`AGREEMENT`): then
        nothing is known of it.
    seen : float
        The plain correlation of the means, too small by what prompts add.
    reliability : (float, float)
        Correlation of either measure between halves of the prompts; 1 for one that has no prompts.
    layers, prompts : int
    """

    value: float
    low: float
    high: float
    seen: float
    reliability: tuple[float, float]
    layers: int
    prompts: int

    def __str__(self) -> str:
        of = f"{self.prompts} prompts"
        if not np.isfinite(self.seen):
            return f"rank correlation undetermined (one side does not vary; {of})"
        if not np.isfinite(self.value):
            halves = " and ".join(f"{each:.2f}" for each in self.reliability)
            return (
                f"rank correlation undetermined ({self.seen:.2f} as seen, but halves of {of} agree with each other at only "
                f"{halves})"
            )
        return f"rank correlation {self.value:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.layers} layers ({of})"


#: Halves of the prompts that agree less than this say nothing of the order of layers.
AGREEMENT = 0.1


def rank_correlation(a: xr.DataArray, b: xr.DataArray, *, samples: int = 500, seed: int = 0) -> RankCorrelation:
    """Do two measures rank the layers alike?

    Each sample deals the prompts into halves and resamples either. The measures are compared across halves, so that what a
    prompt does to both does not count, and divided by the root of the agreement of each with itself.

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
    seen = float(_spearman(*(x.mean(0) if x.ndim == 2 else x for x in (one, two))))
    nan = float("nan")
    if n < 4 or not np.isfinite(seen):
        return RankCorrelation(nan, nan, nan, seen, (nan, nan), one.shape[-1], n)
    rng = np.random.default_rng(seed)
    exact = _across_halves(one, two, [_halves(n, rng, resample=False) for _ in range(samples)])
    drawn = _across_halves(one, two, [_halves(n, rng, resample=True) for _ in range(samples)])
    across, *agreement = (float(np.nanmean(part)) if np.isfinite(part).any() else nan for part in exact)
    reliability = (agreement[0], agreement[1])
    if not min(reliability) >= AGREEMENT or np.isfinite(drawn).all(0).mean() < 0.5:  # NaN is no agreement
        return RankCorrelation(nan, nan, nan, seen, reliability, one.shape[-1], n)
    value = float(np.clip(across / np.sqrt(agreement[0] * agreement[1]), -1, 1))
    # Halves that agree by less than this in one sample would blow it up.
    floors = [np.maximum(part, AGREEMENT / 2) for part in drawn[1:]]
    low, high = np.nanquantile(np.clip(drawn[0] / np.sqrt(floors[0] * floors[1]), -1, 1), [0.025, 0.975])
    return RankCorrelation(value, min(float(low), value), max(float(high), value), seen, reliability, one.shape[-1], n)


Halves = tuple[NDArray[np.int64], NDArray[np.int64]]


def _halves(n: int, rng: np.random.Generator, resample: bool) -> Halves:
    """Prompts dealt into halves, which share none even where each is resampled."""
    dealt = rng.permutation(n)
    halves = dealt[: n // 2], dealt[n // 2 :]
    return tuple(rng.choice(half, len(half)) for half in halves) if resample else halves  # type: ignore[return-value]


def _across_halves(
    one: NDArray[np.float64], two: NDArray[np.float64], dealt: Sequence[Halves]
) -> list[NDArray[np.float64]]:
    """Correlation of one measure with the other across halves, and of each with itself; 1 for one without prompts."""
    means = [
        [np.stack([x[half[side]].mean(0) if x.ndim == 2 else x for half in dealt]) for side in (0, 1)]
        for x in (one, two)
    ]
    (a, b), (c, d) = means
    across = (_spearman(a, d) + _spearman(b, c)) / 2
    return [
        across,
        *(_spearman(*pair) if x.ndim == 2 else np.ones(len(dealt)) for x, pair in zip((one, two), means, strict=True)),
    ]


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation along the last dimension; NaN where one side does not vary."""
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(part, axis=-1) for part in (a, b)))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    found: NDArray[np.float64] = np.where(size > 0, (x * y).sum(-1) / np.where(size > 0, size, 1), np.nan)
    return found
