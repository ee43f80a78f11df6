"""TurboQuant: the norm of a head of a token, and the nearest levels of a codebook for its direction.

A random rotation, which is a transform of the scheme (``+rotation``, or ``+hadamard`` as engines have it), makes the coordinates of
any direction look like those of a random point of the sphere. That distribution is known, so the codebook is, too, and nothing
is measured or stored but the norm. Source: arXiv:2504.19874, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.quant.codebooks import Array, sphere_levels
from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format
from kvgeom.quant.transforms import remembered

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WIDTHS = (2, 3, 4, 5, 6)
#: Seed of the random projection of residuals.
_SEED = 0x2504_19874
_PROJECTIONS: dict[tuple[int, torch.device], Tensor] = {}


class Codebook(Format):
    """Indices into a codebook for the directions of vectors, and their norms in 16 bits."""

    #: Added to a norm before it divides.
    tiny = 1e-8
    #: Whether a value halfway between two levels goes to the upper one.
    upper = True

    def levels(self, bits: int, channels: int) -> Array:
        """The codebook, for coordinates times the root of the number of channels."""
        return sphere_levels(bits, channels)

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Indices and norms of some vectors."""
        import torch

        norm = blocks.norm(dim=-1, keepdim=True)
        codes = self.nearest(scheme.bits, blocks / (norm + self.tiny))
        codes = torch.where(norm.isfinite(), codes, norm * 0)  # which is NaN
        return codes, Scales(half(norm), torch.zeros_like(norm))

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Vectors of such norms."""
        return self.directions(scheme.bits, codes) * scales.step

    def nearest(self, bits: int, directions: Tensor) -> Tensor:
        """Indices of the nearest levels."""
        import torch

        levels = self._levels(bits, directions)
        bounds = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(directions.contiguous(), bounds, right=self.upper).to(directions.dtype)

    def directions(self, bits: int, codes: Tensor) -> Tensor:
        """Levels of indices; NaN of NaN."""
        import torch

        found = self._levels(bits, codes)[torch.nan_to_num(codes).long()]
        return torch.where(codes.isnan(), codes, found)

    def _levels(self, bits: int, like: Tensor) -> Tensor:
        import torch

        channels = like.shape[-1]
        return torch.from_numpy(self.levels(bits, channels) / channels**0.5).to(like)


class Product(Codebook):
    """One bit of each channel for the signs of a random projection of what the codebook misses: inner products without bias.

    The residual, of norm ``r``, comes back as ``r * sqrt(pi / 2) / channels`` times the transposed projection of the signs (QJL,
    arXiv:2406.03482). Its norm is stored as well. A code is the index, and above it the sign.
    """

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """Both norms in float16."""
        import torch

        return torch.float16, torch.float16

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes, norms, and norms of what the codebook misses."""
        import torch

        bits = scheme.bits - 1
        norm = blocks.norm(dim=-1, keepdim=True)
        unit = blocks / (norm + self.tiny)
        index = self.nearest(bits, unit)
        residual = unit - self.directions(bits, index)
        above = (_product(residual, _projection(residual)) >= 0).to(unit.dtype)
        codes = torch.where(norm.isfinite(), index + above * 2**bits, norm * 0)
        return codes, Scales(half(norm), half(norm * residual.norm(dim=-1, keepdim=True)))

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Vectors, with the expected residual of their signs."""
        import torch

        high = 2.0 ** (scheme.bits - 1)
        above = torch.where(codes.isnan(), codes, (codes >= high).to(codes.dtype))
        found = self.directions(scheme.bits - 1, codes - above * high) * scales.step
        guess = _product(2 * above - 1, _projection(codes).T) * ((torch.pi / 2) ** 0.5 / codes.shape[-1])
        together: Tensor = found + guess * scales.offset
        return together


def half(x: Tensor) -> Tensor:
    """Rounded to float16, as it is stored."""
    return x.half().to(x.dtype)


def _projection(like: Tensor) -> Tensor:
    """A matrix of standard normal numbers, in double precision."""
    return remembered(_PROJECTIONS, (like.shape[-1], like.device), _drawn)


def _drawn(key: tuple[int, torch.device]) -> Tensor:
    import numpy as np
    import torch

    size, device = key
    drawn = torch.from_numpy(np.random.default_rng((_SEED, size)).standard_normal((size, size)))
    return drawn.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Each row times the matrix, rounded once, so that a token comes out the same alone as among others."""
    return (x.to(matrix.dtype) @ matrix.T).to(x.dtype)


for _kind, _name, _note in (
    (Codebook, "turboquant", "TurboQuant: a norm, and levels for a random direction; 2 to 6 bits"),
    (Product, "turboquant_prod", "TurboQuant with one of the bits for the signs of a projected residual"),
):
    register_format(
        _kind(
            name=_name,
            widths=_WIDTHS,
            granularities=("token-head",),
            default_granularity="token-head",
            symmetric_widths=_WIDTHS,
            examples={f"{_name}4+rotation": _note},
        )
    )
