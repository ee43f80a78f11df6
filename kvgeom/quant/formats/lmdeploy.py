"""What LMDeploy makes of TurboQuant: 3 bits and a sign for keys, 2 bits for values, each under a norm of the head of a token.

Source: ``turbo_quant.py`` and ``fill_kv_cache.py`` in ``lmdeploy/pytorch/kernels/cuda``, at commit 1263d5c. Its codebooks are typed in
there, for the normal distribution; here they are computed, and the same to their seven digits. Heads are rotated by a
Hadamard matrix (``+hadamard``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.codebooks import Array, normal_levels
from kvgeom.quant.formats.base import Axes, Grid, Scales, register_format
from kvgeom.quant.formats.turboquant import Codebook, half

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Values(Codebook):
    """Indices into a codebook, and a norm."""

    upper = False

    def levels(self, bits: int, channels: int) -> Array:
        """The same for any number of channels."""
        return normal_levels(bits)

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Indices and norms, which are never zero."""
        import torch

        norm = _norm(blocks)
        codes = torch.where(norm.isfinite(), self.nearest(scheme.bits, blocks / norm), norm * 0)
        return codes, Scales(half(norm), torch.zeros_like(norm))


class Keys(Values):
    """An index, and above it the sign of what is left of each channel, which comes back as its root mean square.

    Signs are those of the channels themselves: there is no projection, as QJL has it, and no expectation that it would make
    unbiased. The root mean square is that of the unit vector.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """Norm and root mean square."""
        import torch

        return torch.float16, torch.float16

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes, norms and root mean squares."""
        import torch

        bits = scheme.bits - 1
        norm = _norm(blocks)
        unit = blocks / norm
        index = self.nearest(bits, unit)
        left = unit - self.directions(bits, index)
        codes = torch.where(norm.isfinite(), index + (left >= 0).to(unit.dtype) * 2**bits, norm * 0)
        return codes, Scales(half(norm), half(_norm(left) / blocks.shape[-1] ** 0.5))

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Vectors."""
        import torch

        high = 2.0 ** (scheme.bits - 1)
        above = torch.where(codes.isnan(), codes, (codes >= high).to(codes.dtype))
        return (self.directions(scheme.bits - 1, codes - above * high) + (2 * above - 1) * scales.offset) * scales.step


def _norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + 1e-8).sqrt()


for _kind, _name, _bits, _note in (
    (Keys, "lmdeploy_qjl", 4, "LMDeploy's keys under quant_policy=42: 3 bits and a sign"),
    (Values, "lmdeploy_lloyd", 2, "LMDeploy's values under quant_policy=42: 2 bits"),
):
    register_format(
        _kind(
            name=_name,
            widths=(_bits,),
            granularities=("token-head",),
            default_granularity="token-head",
            symmetric_widths=(_bits,),
            examples={f"{_name}+hadamard": _note},
        )
    )
