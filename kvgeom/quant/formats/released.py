"""The integer grids of the code released with arXiv:2606.09864."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Released(Format):
    """Symmetric, or asymmetric with a zero point that is rounded and clamped to the codes, ``0 .. 2**bits - 1``.

    The clamp is what matters. Codes are ``round(x / step + zero)``, so that a block whose values all have one sign, and lie
    further from 0 than they differ, has no code near them: it comes back as one end of its range, or as 0. Symmetric grids are
    those of ``int``.

    Some channels alone are rounded with the scale of their own values, and a short last group is filled with zeros. Source:
    ``core/quantization.py`` at commit 682b9f6, here in float32 at least where it computes in the model's own type.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype | None]:
        """float32, and a byte for the zero point; the code itself stores neither."""
        import torch

        return torch.float32, None if scheme.symmetric else torch.uint8

    def lowest(self, scheme: Grid) -> int:
        """``-2**(bits - 1)``, which no value reaches, or 0."""
        return -(1 << (scheme.bits - 1)) if scheme.symmetric else 0

    def fit(self, scheme: Grid, blocks: Tensor, axes: Axes) -> Scales:
        """Steps, and zero points as offsets."""
        import torch

        if scheme.symmetric:
            most = blocks.abs().amax(axes, keepdim=True).clamp_min(1e-8)
            step = most / ((1 << (scheme.bits - 1)) - 1)
            return Scales(step, torch.zeros_like(step))
        low, high = blocks.amin(axes, keepdim=True), blocks.amax(axes, keepdim=True)
        step = ((high - low) / scheme.levels).clamp_min(1e-8)
        return Scales(step, self.zero_point(scheme, (-low / step).round_()))

    def zero_point(self, scheme: Grid, whole: Tensor) -> Tensor:
        """The zero point as it is kept."""
        return whole.clamp_(0, scheme.levels)

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """The nearest codes, ties to even."""
        lowest = self.lowest(scheme)
        codes = blocks / scales.step
        if not scheme.symmetric:
            codes = codes.add_(scales.offset)
        return codes.round_().clamp_(lowest, lowest + (1 << scheme.bits) - 1)

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        return (codes if scheme.symmetric else codes - scales.offset) * scales.step


register_format(
    Released(
        name="released",
        widths=(2, 3, 4, 5, 6, 7, 8),
        granularities=("tensor", "channel", "token", "group"),
        symmetric_widths=None,
        groups_cross_heads=True,
        fills_with_zeros=True,
        own_channels=True,
        examples={
            "released4-asym-channel": "the paper's code: zero points clamped; sym or asym, tensor, channel, token or group64"
        },
    )
)
