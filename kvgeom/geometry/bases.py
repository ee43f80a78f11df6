"""Subspaces as orthonormal bases: made of directions, compared, and seen from a class difference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
#: A direction with less than this share of its length outside of those before it adds no dimension.
DEPENDENT = 1e-6


def oriented(directions: Floats, gap: Floats | None) -> Floats:
    """Directions made orthonormal one after the other, each with the class difference on its positive side.

    Parameters
    ----------
    directions : array [channels, k]
    gap : array [channels] or None
        Without it each stays on its own side.

    Returns
    -------
    array [channels, at most k]
        Without directions that depend on those before. A single one of length 0 stays.
    """
    columns: list[Floats] = []
    for direction in directions.T:
        rest, size = direction.astype(np.float64), float(np.linalg.norm(direction))
        for _ in range(2):  # twice is enough, once is not
            for column in columns:
                rest = rest - column * float(column @ rest)
        left = float(np.linalg.norm(rest))
        if left > DEPENDENT * size:
            columns.append(rest / left)
    if not columns:
        return np.zeros((len(directions), 1))
    basis = np.stack(columns, axis=1)
    signed: Floats = basis if gap is None else basis * np.where(gap @ basis < 0, -1.0, 1.0)
    return signed


def along(gap: Floats, basis: Floats) -> Floats:
    """The unit vector of a subspace that lies nearest to the class difference; zero where there is none.

    Parameters
    ----------
    gap : array [channels]
    basis : array [channels, k]
        Orthonormal.
    """
    part = basis @ (basis.T @ gap)
    size = float(np.linalg.norm(part))
    found: Floats = part / size if size > 0 else part
    return found


def agreement(one: Floats, other: Floats) -> float:
    """How far two subspaces agree: 1 if one contains the other.

    Parameters
    ----------
    one, other : array [channels, k]
        Orthonormal columns, or a column of 0.

    Returns
    -------
    float
        Of two single directions the cosine, with its sign; of more, the root of the mean squared cosine of the principal
        angles, as many as the smaller has dimensions.
    """
    cosines = one.T @ other
    if cosines.shape == (1, 1):
        return float(cosines[0, 0])
    return float(np.sqrt((cosines**2).sum() / min(cosines.shape)))
