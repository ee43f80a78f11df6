"""Codebooks for numbers whose distribution is known: the levels of least squared error, by Lloyd's and Max's conditions.

Each level is the mean of the values that go to it, and each bound between two levels lies halfway (Max 1960; Lloyd 1982). For the
densities here, which are log-concave, that has one solution.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import whole
from kvgeom.quant.transforms import remembered

Array = NDArray[np.float64]

#: Levels have settled when none moves by more than this, in standard deviations.
_SETTLED = 1e-12
_ROUNDS = 200_000
_NORMAL: dict[int, Array] = {}
_SPHERE: dict[tuple[int, int], Array] = {}


def normal_levels(bits: int) -> Array:
    """Levels for the standard normal distribution.

    Parameters
    ----------
    bits : int
        1 to 8.

    Returns
    -------
    array [2**bits]
        Ascending, symmetric around zero.

    Examples
    --------
    >>> normal_levels(2).round(4).tolist()
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    return remembered(_NORMAL, bits, _of_normal)


def _of_normal(bits: int) -> Array:
    from scipy.special import ndtr, ndtri

    def moment(x: Array) -> Array:
        found: Array = -np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
        return found

    return _levels(bits, ndtr, moment, ndtri, np.inf)


def sphere_levels(bits: int, dimension: int) -> Array:
    """Levels for one coordinate of a random point of the unit sphere, times the root of the dimension.

    The coordinate has a density proportional to ``(1 - x**2)**((dimension - 3) / 2)`` (arXiv:2504.19874, lemma 1), which tends
    to the normal distribution as the dimension grows.

    Parameters
    ----------
    bits : int
        1 to 8.
    dimension : int
        3 or more; for keys and values the channels of a head.

    Returns
    -------
    array [2**bits]
        Ascending, symmetric around zero.

    Examples
    --------
    >>> sphere_levels(2, 64).round(4).tolist()
    [-1.5, -0.4521, 0.4521, 1.5]
    """
    return remembered(_SPHERE, (bits, whole("dimension", dimension, 3)), _of_sphere)


def _of_sphere(key: tuple[int, int]) -> Array:
    from scipy.special import betainc, betaincinv, gammaln

    bits, dimension = key
    half, root = (dimension - 1) / 2, np.sqrt(dimension)
    # Half of (coordinate + 1) has the beta distribution with both parameters (dimension - 1) / 2.
    factor = np.exp(gammaln(dimension / 2) - gammaln(half)) / np.sqrt(np.pi) / (2 * half)

    def below(x: Array) -> Array:
        found: Array = betainc(half, half, (1 + np.clip(x / root, -1, 1)) / 2)
        return found

    def moment(x: Array) -> Array:
        found: Array = -factor * root * (1 - np.clip(x / root, -1, 1) ** 2) ** half
        return found

    def quantile(share: Array) -> Array:
        found: Array = root * (2 * betaincinv(half, half, share) - 1)
        return found

    return _levels(bits, below, moment, quantile, root)


def _levels(
    bits: int,
    below: Callable[[Array], Array],
    moment: Callable[[Array], Array],
    quantile: Callable[[Array], Array],
    end: float,
) -> Array:
    """Lloyd's iteration on the upper half, from the distribution, its partial first moment and its quantiles."""
    count = 1 << whole("bits of a codebook", bits, 1, 8)
    # Many levels lie nearly as the cube root of the density does, which for a normal one is three times as wide.
    levels = np.sqrt(3.0) * quantile(0.5 + (np.arange(count // 2) + 0.5) / count)
    levels = np.minimum(levels, quantile(np.array(1 - 1e-9)))
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [end]])
        share, mass = np.diff(below(bounds)), np.diff(moment(bounds))
        moved = mass / share
        settled = float(np.abs(moved - levels).max()) < _SETTLED
        levels = moved
        if settled:
            break
    return np.concatenate([-levels[::-1], levels])
