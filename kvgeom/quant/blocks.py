"""Block formats: those of GGML that llama.cpp offers for its cache, and the 4-bit block floats.

Blocks lie along the last axis. Source: ``ggml-quants.c`` (and, as numpy, ``quants.py`` of the gguf package) for the
GGML types; the OCP Microscaling Formats specification 1.0 for MXFP4; NVIDIA's description of NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgeom.quant.grids import Axes, FloatGrid, Grid, HqqGrid, IntGrid, MlxGrid, Scales, VllmGrid
from kvgeom.quant.scheme import Scheme

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Halfway between levels; a tie goes to the level whose last bit is even, which is the upper one at every second bound.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, torch.zeros_like(step), 1.0 / step)


@dataclass(frozen=True)
class Q8Grid(Grid):
    """``q8_0``: ``step = max|x| / 127``, nearest level, ties away from zero."""

    lowest: ClassVar[int] = -128

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        step = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(step)
        size = scaled.abs()
        whole = size.floor()
        codes = (whole + (2 * (size - whole)).floor_()).mul_(scaled.sign())
        return codes, Scales(_half(step), torch.zeros_like(step))


@dataclass(frozen=True)
class SignedGrid(Grid):
    """``q4_0`` and ``q5_0``: the entry of largest size becomes the lowest level exactly; the highest may saturate."""

    @property
    def lowest(self) -> int:  # type: ignore[override]
        """-8 or -16."""
        return -(1 << (self.scheme.bits - 1))

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        half = -self.lowest
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        step = extreme / -half
        codes = (blocks * _inverse(step)).add_(half + 0.5).trunc_().clamp_(0, 2 * half - 1).sub_(half)
        return codes, Scales(_half(step), torch.zeros_like(step))


@dataclass(frozen=True)
class OffsetGrid(Grid):
    """``q4_1`` and ``q5_1``: from the smallest to the largest value."""

    offset_dtype: ClassVar[torch.dtype | None] = torch.float16

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        levels = (1 << self.scheme.bits) - 1
        low = blocks.amin(-1, keepdim=True)
        step = (blocks.amax(-1, keepdim=True) - low) / levels
        codes = ((blocks - low) * _inverse(step)).add_(0.5).trunc_().clamp_(0, levels)
        return codes, Scales(_half(step), _half(low))


@dataclass(frozen=True)
class Iq4Grid(Grid):
    """``iq4_nl``: sixteen uneven levels; codes under a first scaling, then the step that fits these codes best.

    What llama.cpp's cache calls (``quantize_row_iq4_nl_ref``): errors are weighted by the squared value. Writing a
    GGUF file tries more scalings than this.
    """

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        levels = torch.tensor(_IQ4_LEVELS, dtype=blocks.dtype, device=blocks.device)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        codes = _nearest(blocks * (1.0 / (extreme / levels[0])), levels)
        step = _best_step(blocks, levels[codes])
        step = torch.where(extreme.abs() < 1e-15, torch.zeros_like(step), step)
        return codes.to(blocks.dtype), Scales(_half(step), torch.zeros_like(step))

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        levels = torch.tensor(_IQ4_LEVELS, dtype=scales.step.dtype, device=codes.device)
        return levels[codes.long()] * scales.step


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level; the upper one where both are as near."""
    above = torch.bucketize(x.contiguous(), levels, right=True).clamp(1, len(levels) - 1)
    below = above - 1
    return torch.where(x - levels[below] < levels[above] - x, below, above)


def _best_step(blocks: Tensor, levels: Tensor) -> Tensor:
    """The step whose error, weighted by the squared value, is least."""
    weight = blocks * blocks
    fits = (weight * levels * blocks).sum(-1, keepdim=True)
    size = (weight * levels * levels).sum(-1, keepdim=True)
    return torch.where(size > 0, fits / size, torch.zeros_like(size))


@dataclass(frozen=True)
class Fp4Grid(Grid):
    """E2M1 floats (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) under a scale of the block, saturating.

    ``mxfp4``: the scale is the power of two that brings the largest entry into [4, 8). ``nvfp4``: ``max|x| / 6`` as an
    E4M3 float, without a second scale of the tensor.
    """

    @property
    def step_dtype(self) -> torch.dtype:  # type: ignore[override]
        """A power of two, or E4M3."""
        return torch.float8_e8m0fnu if self.scheme.format == "mxfp4" else torch.float8_e4m3fn

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        size = blocks.abs().amax(-1, keepdim=True)
        if self.scheme.format == "mxfp4":
            # frexp gives size = m * 2**e with m in [0.5, 1): floor(log2(size)) = e - 1, without log2's rounding.
            power = (torch.frexp(size).exponent - 3).clamp(-127, 127)
            step = torch.where(size > 0, torch.ldexp(torch.ones_like(size), power), torch.zeros_like(size))
            step = torch.where(torch.isfinite(size), step, size * 0)
        else:
            step = (size / 6).clamp(max=448).to(torch.float8_e4m3fn).to(size.dtype)
        scaled = blocks * _inverse(step)
        bounds = torch.tensor(_E2M1_BOUNDS, dtype=blocks.dtype, device=blocks.device)
        bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
        levels = torch.tensor(_E2M1_LEVELS, dtype=blocks.dtype, device=blocks.device)
        magnitude = levels[torch.bucketize(scaled.abs().contiguous(), bounds)]
        codes = torch.where(scaled.isnan(), scaled, magnitude.copysign(scaled))
        return codes, Scales(step, torch.zeros_like(step))

    def to_bytes(self, codes: Tensor) -> Tensor:
        levels = torch.tensor(_E2M1_LEVELS, dtype=codes.dtype, device=codes.device)
        return (torch.bucketize(codes.abs().contiguous(), levels) + 8 * torch.signbit(codes)).to(torch.uint8)

    def from_bytes(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        levels = torch.tensor(_E2M1_LEVELS, dtype=dtype, device=numbers.device)
        return torch.cat([levels, -levels])[numbers.long()]


FORMATS: dict[str, Callable[[Scheme], Grid]] = {
    "int": IntGrid,
    "fp8_e4m3": FloatGrid,
    "fp8_e5m2": FloatGrid,
    "mlx": MlxGrid,
    "hqq": HqqGrid,
    "vllm": VllmGrid,
    "q8_0": Q8Grid,
    "q5_0": SignedGrid,
    "q4_0": SignedGrid,
    "q5_1": OffsetGrid,
    "q4_1": OffsetGrid,
    "iq4_nl": Iq4Grid,
    "mxfp4": Fp4Grid,
    "nvfp4": Fp4Grid,
}


def grid(scheme: Scheme) -> Grid:
    """The format of a scheme."""
    return FORMATS[scheme.format](scheme)
