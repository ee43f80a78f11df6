"""ExLlamaV3's grid: blocks of 32 channels, levels in the middle of equal intervals, none of them zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    from torch import Tensor


class ExLlama(Format):
    """``[-max|x|, max|x|]`` in ``2**bits`` equal intervals; a value becomes the middle of its own.

    The engine rotates each block by a Hadamard matrix first (``+hadamard32``). Source: ``q_cache_kernels.cuh`` of ExLlamaV3 1.4.1,
    without its compander, which is off by default.
    """

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        half = 1 << (scheme.bits - 1)
        size = blocks.abs().amax(axes, keepdim=True) + 1e-10
        codes = (blocks * (1.0 / size) * half + half).floor_().clamp_(0, 2 * half - 1)
        return codes, Scales(size.half().to(size.dtype), blocks.new_zeros(size.shape))

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """The middles of intervals; a scale is the half of their range."""
        half = 1 << (scheme.bits - 1)
        return (codes + (0.5 - half)) * (scales.step / half)


register_format(
    ExLlama(
        name="exllama",
        widths=(4, 2, 3, 5, 6, 7, 8),
        granularities=("group",),
        block_size=32,
        symmetric_widths=(2, 3, 4, 5, 6, 7, 8),
        examples={"exllama4+hadamard32": "ExLlamaV3's: blocks of 32 channels; 2 to 8 bits"},
    )
)
