"""8-bit floating point, E4M3 and E5M2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor


#: How the names of formats end that round toward zero, as CUDA calls this mode.
_TOWARD_ZERO = "_rz"


class Float8(Format):
    """8-bit floats: scaled to the largest of them (or as they are), nearest one, ties to even, saturating."""

    @property
    def dtype(self) -> torch.dtype:
        """Torch's dtype of the codes."""
        import torch

        return {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[self.name.removesuffix(_TOWARD_ZERO)]

    @property
    def largest(self) -> float:
        """448 or 57344."""
        import torch

        return torch.finfo(self.dtype).max

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype | None, None]:
        """float32, or none without a scale."""
        import torch

        return None if scheme.granularity == "none" else torch.float32, None

    def fit(self, scheme: Grid, blocks: Tensor, axes: Axes) -> Scales:
        """The scale that takes the largest value to the largest float, or one."""
        import torch

        if scheme.granularity == "none":
            one = blocks.new_ones(1, *(1,) * (blocks.ndim - 1)).expand(blocks.shape[0], *(1,) * (blocks.ndim - 1))
            return Scales(one, torch.zeros_like(one))
        step = blocks.abs().amax(axes, keepdim=True) / self.largest
        return Scales(step, torch.zeros_like(step))

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """The nearest floats."""
        import torch

        if scheme.granularity != "none":
            blocks = blocks / torch.where(scales.step == 0, torch.ones_like(scales.step), scales.step)
        return blocks.clamp(-self.largest, self.largest).to(self.dtype)

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        values = codes.to(scales.step.dtype)
        return values if scheme.granularity == "none" else values.mul_(scales.step)

    def to_bytes(self, scheme: Grid, codes: Tensor) -> Tensor:
        """The bits of the floats."""
        import torch

        return codes.view(torch.uint8)

    def from_bytes(self, scheme: Grid, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`to_bytes`."""
        return numbers.view(self.dtype)


class Float8TowardZero(Float8):
    """8-bit floats without a scale: the next one toward zero, saturating."""

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """The largest floats that are no larger than the values, in magnitude."""
        import torch

        nearest = super().encode(scheme, blocks, scales)
        # Sign and magnitude: one less, as a number, is the next float toward zero.
        larger = nearest.to(blocks.dtype).abs() > blocks.abs()
        return (nearest.view(torch.uint8) - larger.to(torch.uint8)).view(self.dtype)


for _name in ("fp8_e4m3", "fp8_e5m2"):
    register_format(
        Float8(
            name=_name,
            widths=(8,),
            granularities=("none", "tensor", "head", "channel", "token", "token-head", "group", "channel-group"),
            default_granularity="none",
            symmetric_widths=(8,),
            examples={_name: "cast, saturating; with -tensor, -token, -head, ...: scaled first"},
        )
    )
    register_format(
        Float8TowardZero(
            name=_name + _TOWARD_ZERO,
            widths=(8,),
            granularities=("none",),
            default_granularity="none",
            symmetric_widths=(8,),
            examples={_name + _TOWARD_ZERO: "cast toward zero, saturating"},
        )
    )
