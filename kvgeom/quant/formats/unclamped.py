"""The asymmetric grid of the paper's code without its clamp: what of its damage is the clamp's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Grid, register_format
from kvgeom.quant.formats.released import Released

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Unclamped(Released):
    """Asymmetric with a whole zero point of any size, so that 0 is always a level.

    It differs from ``released`` in the clamp alone, and from ``int`` in that 0 is a level: where outliers set the step, values that are
    small beside it come back as 0, and not as the level that happens to be nearest.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """float32 both."""
        import torch

        return torch.float32, torch.float32

    def zero_point(self, scheme: Grid, whole: Tensor) -> Tensor:
        """As it is."""
        return whole


register_format(
    Unclamped(
        name="unclamped",
        widths=(2, 3, 4, 5, 6, 7, 8),
        granularities=("tensor", "channel", "token", "group"),
        groups_cross_heads=True,
        fills_with_zeros=True,
        own_channels=True,
        examples={"unclamped4-channel": "released4-asym-channel without the clamp of its zero point"},
    )
)
