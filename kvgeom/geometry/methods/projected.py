"""The difference of means without its part along the harmless mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import Floats, Method, register_method


@dataclass(frozen=True)
class Projected(Method):
    """The difference of means minus its component along the mean of the harmless requests.

    That mean is what the vectors have in common: a constant offset such as the bias of keys, massive activations, the language
    itself. A class difference along it is one of size, and taking such a direction out takes the offset out of all requests.
    The method is known from model editing as projected abliteration.

    The direction depends on where 0 is, as no other method here does.
    """

    name = "projected"

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        gap, mean = difference_of_means(features, harmful), features[~harmful].mean(0)
        size = float(mean @ mean)
        rest: Floats = gap if size == 0 else gap - mean * (float(gap @ mean) / size)
        return rest[:, None]


register_method(Projected())
