"""MLX's integer grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Mlx(Format):
    """``mx.quantize``: the larger end of a block is a level of its own, and so is zero where the block contains it.

    Source: ``affine_quantize`` of MLX 0.32, which stores scale and offset in the model's own precision.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """float32 both."""
        import torch

        return torch.float32, torch.float32

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        levels = scheme.levels
        high, low = blocks.amax(axes, keepdim=True), blocks.amin(axes, keepdim=True)
        from_low = low.abs() > high.abs()
        step = ((high - low) / levels).clamp_min(1e-7)
        step, edge = torch.where(from_low, step, -step), torch.where(from_low, low, high)
        zero_at = (edge / step).round()
        has_zero = zero_at != 0
        step = torch.where(has_zero, edge / torch.where(has_zero, zero_at, torch.ones_like(zero_at)), step)
        offset = torch.where(has_zero, edge, torch.zeros_like(edge))
        return ((blocks - offset) / step).round_().clamp_(0, levels), Scales(step, offset)


register_format(
    Mlx(
        name="mlx",
        widths=(2, 3, 4, 5, 6, 8),
        granularities=("group",),
        examples={"mlx4-group64": "MLX's own grid; 2, 3, 4, 5, 6 or 8 bits"},
    )
)
