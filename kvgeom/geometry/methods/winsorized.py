"""The difference of winsorized means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import number
from kvgeom.errors import InputError, brief
from kvgeom.geometry.methods.registry import Floats, Method, register_method

#: Share of each end of a class that the winsorized mean pulls in, channel by channel.
WINSOR = 0.1


def difference_of_winsorized_means(features: Floats, harmful: NDArray[np.bool_], share: float = WINSOR) -> Floats:
    """The difference of means, with both ends of each class pulled in to the rest, channel by channel.

    A few prompts with massive activations move a mean far, and this hardly.

    Parameters
    ----------
    features : array [prompts, ..., channels]
    harmful : bool array [prompts]
    share : float
        Of a class, pulled in at each end.
    """

    def mean(rows: Floats) -> Floats:
        low, high = np.quantile(rows, [share, 1 - share], axis=0)
        found: Floats = np.clip(rows, low, high).mean(0)
        return found

    return mean(features[harmful]) - mean(features[~harmful])


@dataclass(frozen=True)
class Winsorized(Method):
    """The difference of winsorized means; not the same in a rotated space.

    Attributes
    ----------
    share : float
        Of a class, pulled in at each end; from 0 (means) to below 0.5 (medians).
    """

    name = "winsorized"
    in_span = False
    share: float = WINSOR

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", number("share", self.share, 0, 0.5))
        if self.share == 0.5:
            raise InputError(f"share must be from 0 to below 0.5, got {brief(self.share)}")

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        return self.gap(features, harmful)[:, None]

    def gap(self, features: Floats, harmful: NDArray[np.bool_]) -> Floats:
        return difference_of_winsorized_means(features, harmful, self.share)


register_method(Winsorized())
