"""The class difference without bias: products of the differences of requests that have nothing in common.

``|gap|^2`` is too large. Where differences of pairs have the mean ``mu`` and the covariance ``S``, the mean of ``n`` of them
has ``E|gap|^2 = |mu|^2 + tr S / n``. The mean of ``g_i'g_j`` over all ``i != j``, which is that of the products of the gaps
of two disjoint halves over all splits, has ``|mu|^2`` exactly. It may be negative; nothing is cut off.

All of it follows from Gram matrices of the units of a design: of their rows (``K = G G'``) and of what the rounding errors are
along them (``M = sum over tokens of (G e)(G e)'``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from kvgeom.geometry.separation import folds_of
from kvgeom.stats import Estimate

Floats = NDArray[np.floating]

#: More pairs than this are averaged in as many blocks: Gram matrices do not grow, and the estimate stays unbiased.
MOST_UNITS = 64
#: Labelings in which chance deals the labels of each pair.
DEALT = 999
#: An interval holds so much.
COVERAGE = 0.95


@dataclass(frozen=True)
class Design:
    """Which requests make an independent unit of a contrast, and on which side of it.

    Requests of two classes of one size come as twins, the n-th of one with the n-th of the other: a unit is the difference
    of two twins, for what twins share is in both. Where the sizes differ, every request is a unit.

    Attributes
    ----------
    harmful : bool array [prompts]
    block : int array [prompts]
        The unit that each prompt is part of.
    sign : array [units]
        1 for differences of twins and for harmful requests, -1 for harmless ones.
    """

    harmful: NDArray[np.bool_]
    block: NDArray[np.int64]
    sign: NDArray[np.float64]

    @classmethod
    def of(cls, harmful: NDArray[np.bool_]) -> Design:
        """The design of prompts of two classes."""
        bad, good = int(harmful.sum()), int((~harmful).sum())
        block = np.zeros(len(harmful), dtype=np.int64)
        if bad == good:
            units = min(bad, MOST_UNITS)
            block[harmful] = block[~harmful] = np.arange(bad) % units
            return cls(harmful, block, np.ones(units))
        most = (min(bad, MOST_UNITS // 2), min(good, MOST_UNITS // 2))
        block[harmful] = np.arange(bad) % most[0]
        block[~harmful] = most[0] + np.arange(good) % most[1]
        return cls(harmful, block, np.repeat([1.0, -1.0], most))

    @property
    def paired(self) -> bool:
        """Whether units are differences of twins."""
        return bool((self.sign > 0).all())

    @property
    def fewest(self) -> int:
        """Units of the smaller side."""
        return int(min((self.sign == side).sum() for side in set(self.sign)))

    @property
    def weights(self) -> NDArray[np.float64]:
        """Of the units in the difference of means, ``gap = weights @ rows``."""
        found: NDArray[np.float64] = self.sign / np.where(
            self.sign > 0, (self.sign > 0).sum(), max(1, (self.sign < 0).sum())
        )
        return found

    def rows(self, features: Floats) -> NDArray[np.float64]:
        """Units of features ``[prompts, ..., channels]``, ``[units, ..., channels]``."""
        x = features.astype(np.float64)
        if self.paired:
            x = x * np.where(self.harmful, 1.0, -1.0).reshape(-1, *[1] * (x.ndim - 1))
            counts = np.bincount(self.block[self.harmful])
        else:
            x = x - x.mean(0)  # the estimate does not change, and numbers stay small
            counts = np.bincount(self.block)
        found = np.zeros((len(self.sign), *x.shape[1:]))
        np.add.at(found, self.block, x)
        found /= counts.reshape(-1, *[1] * (x.ndim - 1))
        return found

    def dealt(self, draws: int = DEALT, seed: int = 0) -> NDArray[np.float64]:
        """Weights under labels that chance deals anew, ``[draws, units]``: twins swapped, or requests shuffled."""
        rng = np.random.default_rng(seed)
        if self.paired:
            return np.where(rng.random((draws, len(self.sign))) < 0.5, -1.0, 1.0) * self.weights
        return rng.permuted(np.tile(self.weights, (draws, 1)), axis=1)

    def centred(self, weights: Floats) -> NDArray[np.float64]:
        """Weights ``[..., units]`` of differences in which the means of the sides have no part."""
        found = np.array(weights, dtype=np.float64)
        for side in {*self.sign.tolist()}:
            found[..., self.sign == side] -= found[..., self.sign == side].mean(-1, keepdims=True)
        return found


def cross_fit(gram: Floats, design: Design) -> float:
    """Unbiased ``mu' A mu`` from the Gram matrix ``rows A rows'``: the mean product of two different units.

    Parameters
    ----------
    gram : array [units, units]
    design : Design

    Returns
    -------
    float
        May be negative. NaN where a side has one unit.
    """
    total, within, counts = _sums(gram, design)
    return float(_form(total, within, counts))


def left_out(gram: Floats, design: Design) -> NDArray[np.float64]:
    """:func:`cross_fit` without each unit in turn, ``[units]``."""
    side = (design.sign < 0).astype(int)
    total, within, counts = _sums(gram, design)
    sides = len(counts)
    rows = np.stack([gram[:, side == g].sum(1) for g in range(sides)], 1)
    found = np.zeros(len(gram))
    for unit, own in enumerate(side):
        less, part = total.copy(), within.copy()
        less[own] -= rows[unit]
        less[:, own] -= rows[unit]
        less[own, own] += gram[unit, unit]
        part[own] -= gram[unit, unit]
        found[unit] = _form(less, part, counts - (np.arange(sides) == own))
    return found


def _sums(gram: Floats, design: Design) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Of a Gram matrix: sums by pair of sides, of the diagonal by side; units of each side."""
    member = np.stack([design.sign == side for side in (1.0, -1.0)[: 1 if design.paired else 2]]).astype(float)
    return member @ gram @ member.T, member @ np.diag(gram), member.sum(1).astype(np.int64)


def _form(total: NDArray[np.float64], within: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        same = (np.diag(total) - within) / (counts * (counts - 1.0))
        across = 0.0 if len(counts) == 1 else -2 * total[0, 1] / (counts[0] * counts[1])
    return float(same.sum() + across)


def _error(deleted: NDArray[np.float64], design: Design) -> float:
    """Jackknife standard error of an estimate, from its values without each unit."""
    variance = 0.0
    for side in {*design.sign.tolist()}:
        part = deleted[design.sign == side]
        variance += (len(part) - 1) / len(part) * float(((part - part.mean()) ** 2).sum())
    return float(np.sqrt(variance))


@dataclass(frozen=True)
class Signal:
    """The squared class difference of the population, from a sample.

    Attributes
    ----------
    value : float
        Unbiased; may be negative.
    low, high : float
        95 % interval. ``low`` may be negative: nothing below the value is excluded then. NaN of too few units.
    share : float
        Of the squared difference of the sample means, what is not chance: ``value / |gap|^2``.
    """

    value: float
    low: float
    high: float
    share: float


def signal(gram: Floats, design: Design) -> Signal:
    """Squared difference of the class means from the Gram matrix of the units' rows.

    Parameters
    ----------
    gram : array [units, units]
    design : Design

    Notes
    -----
    The interval is Student's on the jackknife's standard error. In few dimensions that error is too small where the
    difference looks small by chance, so ``high`` is at least what the interval of the mean along the difference gives,
    which is exact in one dimension.
    """
    value, weights = cross_fit(gram, design), design.weights
    squared = max(float(weights @ gram @ weights), 0.0)
    share = value / squared if squared > 0 else float("nan")
    if design.fewest < 3 or not squared > 0:
        return Signal(value, float("nan"), float("nan"), share)
    quantile = _quantile(design)
    reach = quantile * _error(left_out(gram, design), design)
    along = gram @ weights / np.sqrt(squared)
    spread = 0.0
    for side in {*design.sign.tolist()}:
        part = along[design.sign == side]
        spread += float(part.var(ddof=1)) / len(part)
    exact = (np.sqrt(max(value, 0.0) + spread) + quantile * np.sqrt(spread)) ** 2
    return Signal(value, value - reach, max(value + reach, float(exact)), share)


def chance(gram: Floats, dealt: Floats, weights: Floats) -> float:
    """How often chance separates the classes as far: one-sided p-value of the class difference.

    Parameters
    ----------
    gram : array [units, units]
    dealt : array [draws, units]
        See :meth:`Design.dealt`.
    weights : array [units]
        Of the true labels.

    Returns
    -------
    float
        Share of the labelings, the true one among them, whose means are as far apart. Where labels mean nothing, it is
        at most ``a`` with probability ``a``.
    """
    drawn = ((dealt @ gram) * dealt).sum(1)
    own = float(weights @ gram @ weights)
    return float((1 + (drawn >= own * (1 - 1e-9)).sum()) / (1 + len(drawn)))


@dataclass(frozen=True)
class NoiseToSignal:
    """Rounding noise along the class difference over the squared class difference, of the population.

    Attributes
    ----------
    estimate : Estimate
        Of ``(mu'Ne mu / |mu|^2) / |mu|^2``, in units of the Gram matrices. The value is NaN where the class difference
        cannot be told from 0; ``low`` is then the noise along the fitted direction over the largest signal. Where the class
        difference can be told from 0 and the noise along it cannot, nothing is known but that the ratio may be small: value
        and ``low`` are NaN. ``high`` is NaN where the signal's interval reaches 0.
    noise : float
        The numerator alone: along the class difference without what chance adds to it. NaN as the value.
    raw : float
        The value whether or not it can be told from 0, infinite where signal or noise are estimated at 0 or less: a number to
        rank by, and nothing else.
    """

    estimate: Estimate
    noise: float
    raw: float


def noise_to_signal(gram: Floats, noise: Floats, design: Design, found: Signal, known: bool) -> NoiseToSignal:
    """Noise along the class difference over its square, both cross-fitted, with a 95 % interval.

    Parameters
    ----------
    gram, noise : array [units, units]
        ``G G'``, and the sum or mean over tokens of ``(G e)(G e)'``.
    design : Design
    found : Signal
        Of ``gram``.
    known : bool
        Whether the class difference can be told from 0.

    Notes
    -----
    The interval is the jackknife's of the logarithm: a unit that is left out is left out of signal, direction and noise
    alike.
    """
    nan, weights = float("nan"), design.weights
    value, along = found.value, cross_fit(noise, design)
    plain = float(weights @ noise @ weights) / max(float(weights @ gram @ weights), np.finfo(float).tiny)
    least = plain / found.high if found.high > 0 else nan
    raw = along / value**2 if value > 0 and along > 0 else float("inf")
    if known and value > 0 and not along > 0:  # noise along the class difference itself may be next to nothing
        least = nan
    if not (known and np.isfinite(raw)):
        return NoiseToSignal(Estimate(nan, least, nan), nan, raw)
    signals, noises = left_out(gram, design), left_out(noise, design)
    if not ((signals > 0).all() and (noises > 0).all()):
        return NoiseToSignal(Estimate(raw, min(least, raw), nan), along / value, raw)
    error = _error(np.log(noises) - 2 * np.log(signals), design)
    reach = float(np.exp(_quantile(design) * error))
    low, high = raw / reach, raw * reach
    if not found.low > 0:
        low, high = min(low, least), nan
    return NoiseToSignal(Estimate(raw, low, high), along / value, raw)


def _quantile(design: Design) -> float:
    return float(student.ppf((1 + COVERAGE) / 2, design.fewest - 1))


def held_out_signal(
    features: Floats, harmful: NDArray[np.bool_], fit: Callable[[NDArray[np.int64]], Floats], folds: int = 5
) -> Signal:
    """Squared class difference within a subspace, each part of the requests in the subspace of the others.

    For subspaces that are not simply the class difference. Twins are in one fold.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    fit : callable
        From row numbers to an orthonormal basis ``[channels, k]`` found in these rows alone.
    folds : int

    Returns
    -------
    Signal
        Of the subspaces that so many requests give, one fold less than there are. The interval takes them as given.
    """
    bad = int(harmful.sum())
    fewest = min(bad, len(harmful) - bad)
    fold = folds_of(harmful, max(2, min(folds, fewest // 3)))
    value = plain = variance = 0.0
    worst = len(harmful)
    for number in np.unique(fold):
        inside = fold == number
        basis = fit(np.flatnonzero(~inside))
        design = Design.of(harmful[inside])
        rows = design.rows(features[inside]) @ basis
        gram, share = rows @ rows.T, float(inside.mean())
        value += share * cross_fit(gram, design)
        gap = design.weights @ rows
        plain += share * float(gap @ gap)
        worst = min(worst, design.fewest)
        if design.fewest >= 3:
            variance += (share * _error(left_out(gram, design), design)) ** 2
    if worst < 3 or not np.isfinite(value):
        return Signal(value, float("nan"), float("nan"), value / plain if plain > 0 else float("nan"))
    reach = float(student.ppf((1 + COVERAGE) / 2, fewest - 1)) * float(np.sqrt(variance))
    return Signal(value, value - reach, value + reach, value / plain if plain > 0 else float("nan"))
