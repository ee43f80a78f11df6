"""The block formats of GGML that llama.cpp offers for its cache, and ``q6_0`` of ik_llama.cpp.

Blocks lie along the last axis. Source: ``ggml-quants.c`` (and, as numpy, ``quants.py`` of the gguf package).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK = 32
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Q8(Format):
    """``q8_0``: ``step = max|x| / 127``, nearest level, ties away from zero."""

    def lowest(self, scheme: Grid) -> int:
        """-128."""
        return -128

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        step = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(step)
        size = scaled.abs()
        whole = size.floor()
        codes = (whole + (2 * (size - whole)).floor_()).mul_(scaled.sign())
        return codes, _scales(step)


class SignedBlocks(Format):
    """``q4_0`` and ``q5_0``: the entry of largest size becomes the lowest level exactly; the highest may saturate."""

    def lowest(self, scheme: Grid) -> int:
        """-8 or -16."""
        return -(1 << (scheme.bits - 1))

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        half = -self.lowest(scheme)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        step = extreme / -half
        codes = (blocks * _inverse(step)).add_(half + 0.5).trunc_().clamp_(0, 2 * half - 1).sub_(half)
        return codes, _scales(step)


class FittedBlocks(SignedBlocks):
    """``q6_0``: codes as those of ``q5_0``, then the step that fits these codes best, errors weighted by the squared value."""

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        codes, _ = super().quantize(scheme, blocks, axes)
        return codes, _scales(_best_step(blocks, codes))


class OffsetBlocks(Format):
    """``q4_1`` and ``q5_1``: from the smallest to the largest value."""

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """float16 both."""
        import torch

        return torch.float16, torch.float16

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        levels = (1 << scheme.bits) - 1
        low = blocks.amin(-1, keepdim=True)
        step = (blocks.amax(-1, keepdim=True) - low) / levels
        codes = ((blocks - low) * _inverse(step)).add_(0.5).trunc_().clamp_(0, levels)
        return codes, _scales(step, low)


class Iq4(Format):
    """``iq4_nl``: sixteen uneven levels; codes under a first scaling, then the step that fits these codes best.

    What llama.cpp's cache calls (``quantize_row_iq4_nl_ref``): errors are weighted by the squared value. Writing a
    GGUF file tries more scalings than this.
    """

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        levels = torch.tensor(_IQ4_LEVELS, dtype=blocks.dtype, device=blocks.device)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        codes = _nearest(blocks * (1.0 / (extreme / levels[0])), levels)
        step = _best_step(blocks, levels[codes])
        step = torch.where(extreme.abs() < 1e-15, torch.zeros_like(step), step)
        return codes.to(blocks.dtype), _scales(step)

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        import torch

        levels = torch.tensor(_IQ4_LEVELS, dtype=scales.step.dtype, device=codes.device)
        return levels[codes.long()] * scales.step


def _scales(step: Tensor, offset: Tensor | None = None) -> Scales:
    """Rounded to float16, as they are stored."""
    import torch

    low = torch.zeros_like(step) if offset is None else offset.half().to(offset.dtype)
    return Scales(step.half().to(step.dtype), low)


def _inverse(step: Tensor) -> Tensor:
    import torch

    return torch.where(step == 0, torch.zeros_like(step), 1.0 / step)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level; the upper one where both are as near."""
    import torch

    above = torch.bucketize(x.contiguous(), levels, right=True).clamp(1, len(levels) - 1)
    below = above - 1
    return torch.where(x - levels[below] < levels[above] - x, below, above)


def _best_step(blocks: Tensor, levels: Tensor) -> Tensor:
    """The step whose error, weighted by the squared value, is least."""
    import torch

    weight = blocks * blocks
    fits = (weight * levels * blocks).sum(-1, keepdim=True)
    size = (weight * levels * levels).sum(-1, keepdim=True)
    return torch.where(size > 0, fits / size, torch.zeros_like(size))


for _kind, _name, _bits in (
    (Q8, "q8_0", 8),
    (FittedBlocks, "q6_0", 6),
    (SignedBlocks, "q5_0", 5),
    (OffsetBlocks, "q5_1", 5),
    (SignedBlocks, "q4_0", 4),
    (OffsetBlocks, "q4_1", 4),
    (Iq4, "iq4_nl", 4),
):
    register_format(
        _kind(
            name=_name,
            widths=(_bits,),
            granularities=("group",),
            block_size=_BLOCK,
            symmetric_widths=() if _kind is OffsetBlocks else (_bits,),
            examples={_name: f"blocks of {_BLOCK} channels"},
        )
    )
