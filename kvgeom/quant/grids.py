"""Formats: from blocks of values to codes and scales, and back. Each is what an engine computes, operation by operation.

A block lies along the axes that share a scale. Codes are whole numbers held as floats (or 8-bit floats), ready to be
multiplied; :mod:`kvgeom.quant.packing` makes bits of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvgeom.quant.scheme import Scheme

Axes = tuple[int, ...]
PRECISIONS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Scales:
    """Step and offset of a rounding grid, broadcastable to the values: ``x ~ offset + step * code``."""

    step: Tensor
    offset: Tensor

    def rows(self, rows: Tensor) -> Scales:
        """The scales of some sequences of the batch."""
        return Scales(self.step[rows], self.offset[rows])

    @staticmethod
    def stack(parts: Sequence[Scales]) -> Scales:
        """The scales of several batches as one batch."""
        return Scales(torch.cat([p.step for p in parts]), torch.cat([p.offset for p in parts]))


@dataclass(frozen=True)
class Grid:
    """A format at work.

    Attributes
    ----------
    lowest : int
        The smallest code; packed codes are counted from it.
    step_dtype, offset_dtype : torch.dtype or None
        What a scale, and its offset, are held as; None where there is none to hold.
    """

    scheme: Scheme

    lowest: ClassVar[int] = 0
    step_dtype: ClassVar[torch.dtype | None] = torch.float16
    offset_dtype: ClassVar[torch.dtype | None] = None

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        scales = self.fit(blocks, axes)
        return self.encode(blocks, scales), scales

    def fit(self, blocks: Tensor, axes: Axes) -> Scales:
        """Scales alone."""
        return self.quantize(blocks, axes)[1]

    def encode(self, blocks: Tensor, scales: Scales) -> Tensor:
        """Codes under scales that other values have set; beyond their range values saturate."""
        raise NotImplementedError(f"{self.scheme} has no scales that another token could use")

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        return codes * scales.step + scales.offset

    def to_bytes(self, codes: Tensor) -> Tensor:
        """Codes as ``0 .. 2**bits - 1``, uint8."""
        return (codes - self.lowest).to(torch.uint8)

    def from_bytes(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`to_bytes`."""
        return numbers.to(dtype) + self.lowest


@dataclass(frozen=True)
class IntGrid(Grid):
    """Evenly spaced levels, nearest one, ties to even.

    Symmetric: ``step = max|x| / qmax``, offset 0. Asymmetric: ``step = (max - min) / (2**bits - 1)``, offset ``min``.
    """

    @property
    def lowest(self) -> int:  # type: ignore[override]
        """``-qmax`` or 0."""
        return -self.scheme.levels // 2 if self.scheme.symmetric else 0

    @property
    def step_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The precision that the scheme says."""
        return PRECISIONS[self.scheme.scales]

    @property
    def offset_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """The same, or nothing where the grid is symmetric."""
        return None if self.scheme.symmetric else self.step_dtype

    def fit(self, blocks: Tensor, axes: Axes) -> Scales:
        """The smallest grid that covers the values without clipping, held as precisely as the scheme says."""
        high = blocks.amax(axes, keepdim=True)
        low = blocks.amin(axes, keepdim=True)
        if self.scheme.symmetric:
            step = torch.maximum(high, -low) / (self.scheme.levels / 2)
            return Scales(self._held(step), torch.zeros_like(step))
        return Scales(self._held((high - low) / self.scheme.levels), self._held(low))

    def _held(self, x: Tensor) -> Tensor:
        return x if self.scheme.scales == "f32" else x.to(PRECISIONS[self.scheme.scales]).to(x.dtype)

    def encode(self, blocks: Tensor, scales: Scales) -> Tensor:
        # A constant block has step 0: any step then gives code 0, and the offset is the value itself.
        step = torch.where(scales.step == 0, torch.ones_like(scales.step), scales.step)
        lowest = self.lowest
        codes = blocks / step if self.scheme.symmetric else (blocks - scales.offset).div_(step)
        return codes.round_().clamp_(lowest, lowest + self.scheme.levels)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        values = codes * scales.step
        return values if self.scheme.symmetric else values.add_(scales.offset)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """8-bit floats: scaled to the largest of them (or as they are), nearest one, ties to even, saturating."""

    @property
    def step_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """float32, or none."""
        return None if self.scheme.granularity == "none" else torch.float32

    @property
    def largest(self) -> float:
        """448 or 57344."""
        return torch.finfo(FLOAT8[self.scheme.format]).max

    def fit(self, blocks: Tensor, axes: Axes) -> Scales:
        if self.scheme.granularity == "none":
            one = blocks.new_ones(1, *(1,) * (blocks.ndim - 1)).expand(blocks.shape[0], *(1,) * (blocks.ndim - 1))
            return Scales(one, torch.zeros_like(one))
        step = blocks.abs().amax(axes, keepdim=True) / self.largest
        return Scales(step, torch.zeros_like(step))

    def encode(self, blocks: Tensor, scales: Scales) -> Tensor:
        if self.scheme.granularity != "none":
            blocks = blocks / torch.where(scales.step == 0, torch.ones_like(scales.step), scales.step)
        return blocks.clamp(-self.largest, self.largest).to(FLOAT8[self.scheme.format])

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        values = codes.to(scales.step.dtype)
        return values if self.scheme.granularity == "none" else values.mul_(scales.step)

    def to_bytes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.uint8)

    def from_bytes(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return numbers.view(FLOAT8[self.scheme.format])


@dataclass(frozen=True)
class MlxGrid(Grid):
    """``mx.quantize``: the larger end of a block is a level of its own, and so is zero, where the block holds it.

    Source: ``affine_quantize`` of MLX 0.32, which holds scale and offset in the model's own precision.
    """

    step_dtype: ClassVar[torch.dtype | None] = torch.float32
    offset_dtype: ClassVar[torch.dtype | None] = torch.float32

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        levels = self.scheme.levels
        high, low = blocks.amax(axes, keepdim=True), blocks.amin(axes, keepdim=True)
        from_low = low.abs() > high.abs()
        step = ((high - low) / levels).clamp_min(1e-7)
        step, edge = torch.where(from_low, step, -step), torch.where(from_low, low, high)
        zero_at = (edge / step).round()
        holds_zero = zero_at != 0
        step = torch.where(holds_zero, edge / torch.where(holds_zero, zero_at, torch.ones_like(zero_at)), step)
        offset = torch.where(holds_zero, edge, torch.zeros_like(edge))
        return ((blocks - offset) / step).round_().clamp_(0, levels), Scales(step, offset)


@dataclass(frozen=True)
class HqqGrid(Grid):
    """HQQ's half-quadratic solver: the zero point is moved so that a robust (l_0.7) error of the block falls.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), with the defaults of
    hqq 0.2.8, as transformers' cache calls it: float32, at most 20 rounds, stopped when the mean error over the
    *whole tensor* no longer falls, so that values share more than a scale. ``offset`` holds the zero point.
    """

    step_dtype: ClassVar[torch.dtype | None] = torch.float32
    offset_dtype: ClassVar[torch.dtype | None] = torch.float32

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        rows = [self._solve(row) for row in blocks]  # sequences must not see each other
        codes, steps, zeros = (torch.stack(part) for part in zip(*rows, strict=True))
        return codes, Scales(steps, zeros)

    def _solve(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = self.scheme.levels
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        span = high - low
        inverse = torch.where(span.abs() <= 1e-4, torch.ones_like(span), levels / span).clamp(max=2e4)
        zero = -low * inverse

        def codes() -> Tensor:
            return (blocks * inverse + zero).round_().clamp_(0, levels)

        best = torch.tensor(torch.inf)
        for _ in range(20):
            found = codes()
            reached = (found - zero) / inverse
            missed = blocks - reached
            outlying = missed.abs()
            outlying = (outlying - 0.1 * outlying.pow(-0.3)).clamp_min_(0.0) * missed.sign()
            zero = (found - (blocks - outlying) * inverse).mean(-1, keepdim=True)
            error = missed.abs().mean().float()
            if not error < best:
                break
            best = error
        return codes(), 1.0 / inverse, zero

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        return (codes - scales.offset) * scales.step


@dataclass(frozen=True)
class VllmGrid(Grid):
    """vLLM's per-token-head integers: 8 bits symmetric, 4 bits with a whole zero point; ties go away from zero.

    Source: ``_reshape_cache_per_token_head`` and ``_reshape_cache_int4_kernel`` (the zero point lies in the four lowest
    bits of the scale) of vLLM 0.28.
    """

    step_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def lowest(self) -> int:  # type: ignore[override]
        """-128 or 0."""
        return -128 if self.scheme.bits == 8 else 0

    def quantize(self, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        if self.scheme.bits == 8:
            step = (blocks.abs().amax(axes, keepdim=True) / 127).clamp_min(1e-6)
            return _half_away(blocks * (1.0 / step)).clamp_(-128, 127), Scales(step, torch.zeros_like(step))
        low, high = blocks.amin(axes, keepdim=True), blocks.amax(axes, keepdim=True)
        step = ((high - low) / 15.0).clamp_min(1e-6)
        zero = _half_away(-low / step).clamp_(0, 15)
        codes = _half_away(blocks * (1.0 / step) + zero).clamp_(0, 15)
        held = (step.float().view(torch.int32) & -16 | zero.int()).view(torch.float32).to(step.dtype)
        return codes, Scales(held, torch.zeros_like(step))

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        if self.scheme.bits == 8:
            return codes * scales.step
        held = scales.step.float().view(torch.int32)
        step, zero = (held & -16).view(torch.float32), held & 15
        return (codes - zero) * step.to(scales.step.dtype)


def _half_away(x: Tensor) -> Tensor:
    """Nearest whole number, ties away from zero, as ``trunc(x + 0.5)`` computes it."""
    return (x + torch.where(x >= 0, 0.5, -0.5).to(x.dtype)).trunc_()
