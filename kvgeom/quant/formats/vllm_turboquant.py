"""What vLLM makes of TurboQuant: a codebook for keys, and an ordinary grid for values.

Source: ``triton_turboquant_store.py``, ``triton_turboquant_decode.py`` and ``turboquant/centroids.py`` of vLLM 0.32. Keys are rotated
by a Hadamard matrix (``+hadamard``), values are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvgeom.quant.codebooks import Array
from kvgeom.quant.formats.base import Axes, Format, Grid, Scales, register_format
from kvgeom.quant.formats.turboquant import Codebook, half
from kvgeom.quant.transforms import remembered

if TYPE_CHECKING:
    import torch
    from torch import Tensor


#: How vLLM computes its levels: rounds of Lloyd's iteration, panels of the trapezoidal rule for a cell, where the outer cells
#: end, and where the evenly spaced first levels do, in standard deviations.
_ROUNDS, _PANELS, _END, _FIRST = 200, 200, 10.5, 3.5
_LEVELS: dict[int, Array] = {}


def vllm_levels(bits: int) -> Array:
    """Levels of vLLM for the standard normal distribution, with what its way of integrating adds to them.

    Parameters
    ----------
    bits : int

    Returns
    -------
    array [2**bits]
        Up to 0.002 from those of least error (:func:`~kvgeom.quant.codebooks.normal_levels`) for 3 and 4 bits, which moves
        some values to the next level.
    """
    return remembered(_LEVELS, bits, _integrated)


def _integrated(bits: int) -> Array:
    weight = np.full((_PANELS + 1, 1), 1.0)
    weight[[0, -1]] = 0.5
    levels = _FIRST * ((2 * np.arange(1 << bits) + 1) / (1 << bits) - 1)
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[-_END], (levels[1:] + levels[:-1]) / 2, [_END]])
        x = np.linspace(bounds[:-1], bounds[1:], _PANELS + 1)
        mass = weight * np.exp(-x * x / 2)
        levels = (mass * x).sum(0) / mass.sum(0)
    return levels


class Keys(Codebook):
    """Levels of the normal distribution; directions become unit vectors again when they are read ("norm correction")."""

    def levels(self, bits: int, channels: int) -> Array:
        """The same for any number of channels."""
        return vllm_levels(bits)

    def directions(self, bits: int, codes: Tensor) -> Tensor:
        """Unit vectors."""
        found = super().directions(bits, codes)
        return found / (found.square().sum(-1, keepdim=True) + 1e-16).sqrt()


class Values(Format):
    """From the smallest to the largest value, nearest level, ties upwards; step and offset are rounded after they were used."""

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype, torch.dtype]:
        """float16 both."""
        import torch

        return torch.float16, torch.float16

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        low = blocks.amin(axes, keepdim=True)
        step = ((blocks.amax(axes, keepdim=True) - low) / scheme.levels).clamp_min(1e-8)
        codes = ((blocks - low) / step).add_(0.5).trunc_().clamp_(0, scheme.levels)
        return codes, Scales(half(step), half(low))


for _kind, _name, _symmetric, _example, _note in (
    (Keys, "vllm_turboquant", (3, 4), "vllm_turboquant4+hadamard", "vLLM's keys under turboquant_*_nc; 3 or 4 bits"),
    (Values, "vllm_uniform", (), "vllm_uniform4", "vLLM's values under turboquant_*; 3 or 4 bits"),
):
    register_format(
        _kind(
            name=_name,
            widths=(3, 4),
            granularities=("token-head",),
            default_granularity="token-head",
            symmetric_widths=_symmetric,
            examples={_example: _note},
        )
    )
