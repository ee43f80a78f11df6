"""HQQ's integer grid, whose zero points a solver chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Hqq(Format):
    """HQQ's half-quadratic solver: the zero point is moved so that a robust (l_0.7) error of the block falls.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), with the defaults of
    hqq 0.2.8, as transformers' cache calls it: float32, at most 20 rounds, stopped when the mean error over the
    *whole tensor* no longer falls, so that values share more than a scale. ``offset`` is the zero point.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """float32 both."""
        import torch

        return torch.float32, torch.float32

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes, scales and zero points of some blocks."""
        import torch

        rows = [_solve(row, scheme.levels) for row in blocks]  # sequences must not see each other
        codes, steps, zeros = (torch.stack(part) for part in zip(*rows, strict=True))
        return codes, Scales(steps, zeros)

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        return (codes - scales.offset) * scales.step


def _solve(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    import torch

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


register_format(
    Hqq(
        name="hqq",
        widths=(2, 3, 4, 8),
        granularities=("group",),
        couples_tokens=True,
        examples={"hqq4-group64": "HQQ's solver; 2, 3, 4 or 8 bits"},
    )
)
