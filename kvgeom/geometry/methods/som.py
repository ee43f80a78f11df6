"""Several directions: neurons of a self-organizing map of harmful requests, minus the harmless mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, whole
from kvgeom.geometry.methods.registry import Floats, Method, register_method


def self_organizing_map(rows: Floats, neurons: int, rounds: int = 30, last: float = 0.5) -> tuple[Floats, Floats]:
    """A self-organizing map, fitted to all rows at once in each round (a batch map); nothing is drawn.

    Neurons lie on a grid that is as square as their number allows, and start on the plane of the two leading principal
    components. In each round every row goes to its nearest neuron, and every neuron becomes the mean of all rows, weighted by a
    Gaussian of the grid distance to their neurons. Its width shrinks from half the grid to ``last``.

    Parameters
    ----------
    rows : array [rows, channels]
    neurons : int
    rounds : int
    last : float
        Width of the Gaussian in the last round, in grid steps.

    Returns
    -------
    neurons : array [neurons, channels]
    rows of each : array [neurons]
        How many rows are nearest to it.

    References
    ----------
    Kohonen, Self-Organizing Maps, Springer, section 3.6 (the batch map).
    """
    height = max(side for side in range(1, math.isqrt(neurons) + 1) if neurons % side == 0)
    width = neurons // height
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2).astype(float)
    apart = ((grid[:, None] - grid[None]) ** 2).sum(-1)
    mean = rows.mean(0)
    _, s, basis = np.linalg.svd(rows - mean, full_matrices=False)
    units = mean + np.zeros((neurons, 1))
    sides = grid - grid.mean(0)
    for axis, component in ((1, 0), (0, 1)):
        if component < len(s) and sides[:, axis].any():
            spread = s[component] / math.sqrt(len(rows)) / np.abs(sides[:, axis]).max()
            units = units + (spread * sides[:, axis])[:, None] * basis[component]
    first = max(max(height, width) / 2, last)
    squares = (rows**2).sum(1)[:, None]
    nearest = np.zeros(len(rows), dtype=int)
    for number in range(rounds):
        radius = first * (last / first) ** (number / max(rounds - 1, 1))
        distance = squares - 2 * rows @ units.T + (units**2).sum(1)
        nearest = distance.argmin(1)
        weights = np.exp(-apart[:, nearest] / (2 * radius**2))
        units = weights @ rows / np.maximum(weights.sum(1, keepdims=True), np.finfo(float).tiny)
    return units, np.bincount(nearest, minlength=neurons).astype(float)


@dataclass(frozen=True)
class SelfOrganizingMap(Method):
    """Neurons of a self-organizing map of the harmful requests, minus the mean of the harmless ones.

    That of most requests comes first. With one neuron this is the difference of means.

    Attributes
    ----------
    rounds : int
        In which the map is fitted.

    References
    ----------
    SOM Directions are Better than One, arXiv:2511.08379. There the map has more neurons than directions are kept, and a search
    over ablations chooses among them; here all neurons are kept.
    """

    name = "som"
    rounds: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", whole("rounds", self.rounds, 1, MOST_DRAWS))

    def most(self, positions: int, pairs: int) -> int:
        return pairs

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        harmless = features[~harmful].mean(0)
        # From the mean, or a large common offset would cost the distances their digits.
        units, counts = self_organizing_map(features[harmful] - harmless, k, self.rounds)
        ordered: Floats = units[np.lexsort((-(units**2).sum(1), -counts))].T
        return ordered


register_method(SelfOrganizingMap())
