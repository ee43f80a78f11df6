"""4-bit floats under a scale of their block: MXFP4, NVFP4, and what engines make of them.

Source: the OCP Microscaling Formats specification 1.0 for MXFP4; NVIDIA's description of NVFP4; vLLM's pull request 45187 for
``nvfp4_4over6``; ``kvfp4_tensor.py`` of SGLang for ``fp4_e2m1``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Halfway between levels.
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class BlockFloat4(Format):
    """E2M1 floats (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) under a scale of the block, saturating.

    A tie goes to the level whose last bit is even.
    """

    def step(self, largest: Tensor) -> Tensor:
        """The scale of blocks whose largest magnitudes are given."""
        raise NotImplementedError

    def below(self, bounds: Tensor) -> Tensor:
        """The largest values that go to the lower of two levels, given what lies halfway between them."""
        import torch

        # The even level is the upper one at every second bound.
        lower = bounds.clone()
        lower[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
        return lower

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        step = self.step(blocks.abs().amax(-1, keepdim=True))
        return self.codes(blocks, step), Scales(step, torch.zeros_like(step))

    def codes(self, blocks: Tensor, step: Tensor) -> Tensor:
        """The nearest floats under a scale."""
        import torch

        scaled = blocks * torch.where(step == 0, torch.zeros_like(step), 1.0 / step)
        bounds = self.below(torch.tensor(_BOUNDS, dtype=blocks.dtype, device=blocks.device))
        levels = torch.tensor(_LEVELS, dtype=blocks.dtype, device=blocks.device)
        magnitude = levels[torch.bucketize(scaled.abs().contiguous(), bounds)]
        return torch.where(scaled.isnan(), scaled, magnitude.copysign(scaled))

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


class Fp4E2m1(Mxfp4):
    """The scale is the least power of two under which the largest entry is 6 at most; a tie goes away from zero."""

    def step(self, largest: Tensor) -> Tensor:
        """A power of two."""
        import torch

        # frexp gives largest / 6 = m * 2**e with m in [0.5, 1), so that ceil(log2) is e, or one less where m is 0.5.
        mantissa, power = torch.frexp((largest / 6).clamp_min(1e-10))
        power = power - (mantissa == 0.5).to(power.dtype)
        return torch.where(torch.isfinite(largest), torch.ldexp(torch.ones_like(largest), power), largest * 0)

    def below(self, bounds: Tensor) -> Tensor:
        """Just less than halfway."""
        import torch

        return torch.nextafter(bounds, torch.zeros_like(bounds))


class Nvfp4(BlockFloat4):
    """The scale is ``max|x| / 6`` as an E4M3 float, without a second scale of the tensor."""

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, None]:
        """E4M3."""
        import torch

        return torch.float8_e4m3fn, None

    def step(self, largest: Tensor) -> Tensor:
        """An E4M3 float."""
        return _e4m3(largest / 6)


class Nvfp4FourOverSix(Nvfp4):
    """The scale takes the largest entry to 6 or to 4, whichever has the smaller squared error over the block; 6 if equal."""

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        import torch

        largest = blocks.abs().amax(-1, keepdim=True)
        six, four = _e4m3(largest / 6), _e4m3(largest / 4)
        at_six, at_four = self.codes(blocks, six), self.codes(blocks, four)
        errors = [
            (codes * step - blocks).square().sum(-1, keepdim=True) for codes, step in ((at_six, six), (at_four, four))
        ]
        to_four = errors[1] < errors[0]
        step = torch.where(to_four, four, six)
        return torch.where(to_four, at_four, at_six), Scales(step, torch.zeros_like(step))


def _e4m3(x: Tensor) -> Tensor:
    import torch

    return x.clamp(max=448).to(torch.float8_e4m3fn).to(x.dtype)


for _kind, _name, _size, _note in (
    (Mxfp4, "mxfp4", 32, "blocks of 32 channels"),
    (Nvfp4, "nvfp4", 16, "blocks of 16 channels"),
    (Nvfp4FourOverSix, "nvfp4_4over6", 16, "vLLM's: blocks of 16 channels, scaled to 6 or to 4"),
    (Fp4E2m1, "fp4_e2m1", 16, "SGLang's: blocks of 16 channels under a power of two"),
):
    register_format(
        _kind(
            name=_name,
            widths=(4,),
            granularities=("group",),
            block_size=_size,
            symmetric_widths=(4,),
            examples={_name: _note},
        )
    )
