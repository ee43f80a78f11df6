"""4-bit floats under a scale of their block: MXFP4 and NVFP4.

Source: the OCP Microscaling Formats specification 1.0 for MXFP4; NVIDIA's description of NVFP4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Halfway between levels; a tie goes to the level whose last bit is even, which is the upper one at every second bound.
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class BlockFloat4(Format):
    """E2M1 floats (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) under a scale of the block, saturating."""

    def step(self, largest: Tensor) -> Tensor:
        """The scale of blocks whose largest magnitudes are given."""
        raise NotImplementedError

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        step = self.step(blocks.abs().amax(-1, keepdim=True))
        scaled = blocks * torch.where(step == 0, torch.zeros_like(step), 1.0 / step)
        bounds = torch.tensor(_BOUNDS, dtype=blocks.dtype, device=blocks.device)
        bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
        levels = torch.tensor(_LEVELS, dtype=blocks.dtype, device=blocks.device)
        magnitude = levels[torch.bucketize(scaled.abs().contiguous(), bounds)]
        codes = torch.where(scaled.isnan(), scaled, magnitude.copysign(scaled))
        return codes, Scales(step, torch.zeros_like(step))

    def to_bytes(self, scheme: Grid, codes: Tensor) -> Tensor:
        """Index of the magnitude, and 8 for a sign."""
        import torch

        levels = torch.tensor(_LEVELS, dtype=codes.dtype, device=codes.device)
        return (torch.bucketize(codes.abs().contiguous(), levels) + 8 * torch.signbit(codes)).to(torch.uint8)

    def from_bytes(self, scheme: Grid, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`to_bytes`."""
        import torch

        levels = torch.tensor(_LEVELS, dtype=dtype, device=numbers.device)
        return torch.cat([levels, -levels])[numbers.long()]


class Mxfp4(BlockFloat4):
    """The scale is the power of two that brings the largest entry into [4, 8)."""

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, None]:
        """A power of two."""
        import torch

        return torch.float8_e8m0fnu, None

    def step(self, largest: Tensor) -> Tensor:
        """A power of two."""
        import torch

        # frexp gives size = m * 2**e with m in [0.5, 1): floor(log2(size)) = e - 1, without log2's rounding.
        power = (torch.frexp(largest).exponent - 3).clamp(-127, 127)
        step = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), power), torch.zeros_like(largest))
        return torch.where(torch.isfinite(largest), step, largest * 0)


class Nvfp4(BlockFloat4):
    """The scale is ``max|x| / 6`` as an E4M3 float, without a second scale of the tensor."""

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, None]:
        """E4M3."""
        import torch

        return torch.float8_e4m3fn, None

    def step(self, largest: Tensor) -> Tensor:
        """An E4M3 float."""
        import torch

        return (largest / 6).clamp(max=448).to(torch.float8_e4m3fn).to(largest.dtype)


for _kind, _name, _size in ((Mxfp4, "mxfp4", 32), (Nvfp4, "nvfp4", 16)):
    register_format(
        _kind(
            name=_name,
            widths=(4,),
            granularities=("group",),
            block_size=_size,
            symmetric_widths=(4,),
            examples={_name: f"blocks of {_size} channels"},
        )
    )
