"""vLLM's grids of a head of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format
from kvgeom.quant.formats.float8 import Float8

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Vllm(Format):
    """vLLM's per-token-head integers: 8 bits symmetric, 4 bits with a whole zero point; ties go away from zero.

    Source: ``_reshape_cache_per_token_head`` and ``_reshape_cache_int4_kernel`` (the zero point lies in the four lowest
    bits of the scale) of vLLM 0.28.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, None]:
        """float32; a zero point lies within it."""
        import torch

        return torch.float32, None

    def lowest(self, scheme: Grid) -> int:
        """-128 or 0."""
        return -128 if scheme.bits == 8 else 0

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        if scheme.bits == 8:
            step = (blocks.abs().amax(axes, keepdim=True) / 127).clamp_min(1e-6)
            return _half_away(blocks * (1.0 / step)).clamp_(-128, 127), Scales(step, torch.zeros_like(step))
        low, high = blocks.amin(axes, keepdim=True), blocks.amax(axes, keepdim=True)
        step = ((high - low) / 15.0).clamp_min(1e-6)
        zero = _half_away(-low / step).clamp_(0, 15)
        codes = _half_away(blocks * (1.0 / step) + zero).clamp_(0, 15)
        stored = (step.float().view(torch.int32) & -16 | zero.int()).view(torch.float32).to(step.dtype)
        return codes, Scales(stored, torch.zeros_like(step))

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        import torch

        if scheme.bits == 8:
            return codes * scales.step
        stored = scales.step.float().view(torch.int32)
        step, zero = (stored & -16).view(torch.float32), stored & 15
        return (codes - zero) * step.to(scales.step.dtype)


class Float8PerHead(Float8):
    """vLLM's ``fp8_per_token_head``: values are multiplied by the inverse of the scale, which has a least value.

    Source: ``_reshape_cache_per_token_head`` of vLLM 0.32. ``fp8_e4m3-token-head``, which divides, rounds some values that lie
    halfway between two floats to the other one.
    """

    @property
    def dtype(self) -> torch.dtype:
        """E4M3."""
        import torch

        return torch.float8_e4m3fn

    def fit(self, scheme: Grid, blocks: Tensor, axes: Axes) -> Scales:
        """The scale that takes the largest value to 448."""
        step = (blocks.abs().amax(axes, keepdim=True) / self.largest).clamp_min(1e-6)
        return Scales(step, blocks.new_zeros(step.shape))

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """The nearest floats."""
        return (blocks * (1.0 / scales.step)).clamp(-self.largest, self.largest).to(self.dtype)


def _half_away(x: Tensor) -> Tensor:
    """Nearest whole number, ties away from zero, as ``trunc(x + 0.5)`` computes it."""
    import torch

    return (x + torch.where(x >= 0, 0.5, -0.5).to(x.dtype)).trunc_()


register_format(
    Vllm(
        name="vllm",
        widths=(4, 8),
        granularities=("token-head",),
        symmetric_widths=(8,),
        examples={"vllm4-token-head+rht": "vLLM's own grids: vllm4 and vllm8"},
    )
)
register_format(
    Float8PerHead(
        name="vllm_fp8",
        widths=(8,),
        granularities=("token-head",),
        default_granularity="token-head",
        symmetric_widths=(8,),
        examples={"vllm_fp8": "vLLM's own E4M3 with a scale for a head of a token"},
    )
)
