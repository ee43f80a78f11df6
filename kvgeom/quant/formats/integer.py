"""Evenly spaced integer levels, as papers mean them by "int4"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Integer(Format):
    """Evenly spaced levels, nearest one, ties to even.

    Symmetric: ``step = max|x| / qmax``, offset 0. Asymmetric: ``step = (max - min) / (2**bits - 1)``, offset ``min``.
    """

    def lowest(self, scheme: Grid) -> int:
        """``-qmax`` or 0."""
        return -scheme.levels // 2 if scheme.symmetric else 0

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype | None]:
        """The precision that the scheme names; no offset where it is symmetric."""
        dtype = _precision(scheme)
        return dtype, None if scheme.symmetric else dtype

    def fit(self, scheme: Grid, blocks: Tensor, axes: Axes) -> Scales:
        """The smallest grid that covers the values without clipping, in the precision of the scheme's scales."""
        import torch

        high = blocks.amax(axes, keepdim=True)
        low = blocks.amin(axes, keepdim=True)
        if scheme.symmetric:
            step = torch.maximum(high, -low) / (scheme.levels / 2)
            return Scales(_stored(step, scheme), torch.zeros_like(step))
        return Scales(_stored((high - low) / scheme.levels, scheme), _stored(low, scheme))

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """The nearest codes."""
        import torch

        # A constant block has step 0: any step then gives code 0, and the offset is the value itself.
        step = torch.where(scales.step == 0, torch.ones_like(scales.step), scales.step)
        lowest = self.lowest(scheme)
        codes = blocks / step if scheme.symmetric else (blocks - scales.offset).div_(step)
        return codes.round_().clamp_(lowest, lowest + scheme.levels)

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        values = codes * scales.step
        return values if scheme.symmetric else values.add_(scales.offset)


def _precision(scheme: Grid) -> torch.dtype:
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[scheme.scales]


def _stored(x: Tensor, scheme: Grid) -> Tensor:
    return x if scheme.scales == "f32" else x.to(_precision(scheme)).to(x.dtype)


register_format(
    Integer(
        name="int",
        widths=(2, 3, 4, 5, 6, 7, 8),
        granularities=("tensor", "head", "channel", "token", "token-head", "group", "channel-group"),
        symmetric_widths=None,
        scale_precisions=("f32", "f16", "bf16"),
        groups_cross_heads=True,
        examples={
            f"int4-asym-{granularity}": f"2-8 bits, sym or asym; one scale for {shared}"
            for granularity, shared in {
                "tensor": "a sequence",
                "head": "a head",
                "channel": "a channel",
                "token": "a token",
                "token-head": "a head of a token",
                "group64": "64 channels of a token; any size",
                "channel-group32": "32 tokens of a channel; any size",
            }.items()
        },
    )
)
