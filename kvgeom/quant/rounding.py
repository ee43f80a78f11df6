"""Pure tensor functions: fit scales to keys or values, and round them.

Tensors are ``[batch, kv_heads, tokens, head_dim]``. Arithmetic is in float32 at least, whatever the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.quant.scheme import Scheme

# The axes of [batch, kv_heads, tokens, head_dim] that share a scale ("group" has a layout of its own).
_SHARED_AXES = {"tensor": (1, 2, 3), "token": (1, 3), "channel": (2,), "head": (2, 3)}


@dataclass(frozen=True)
class Scales:
    """Step and offset of a rounding grid, broadcastable to the values: ``x ~ offset + step * code``."""

    step: Tensor
    offset: Tensor

    def rows(self, rows: Tensor) -> Scales:
        """The scales of some sequences of the batch."""
        return Scales(self.step[rows], self.offset[rows])

    @staticmethod
    def stack(parts: list[Scales]) -> Scales:
        """The scales of several batches as one batch."""
        return Scales(torch.cat([p.step for p in parts]), torch.cat([p.offset for p in parts]))


def fit(x: Tensor, scheme: Scheme) -> Scales:
    """Smallest grid that covers ``x`` without clipping.

    Symmetric: ``step = max|x| / qmax``, offset 0. Asymmetric: ``step = (max - min) / (2**bits - 1)``, offset ``min``.
    """
    values = _working(x)
    if scheme.granularity == "group":
        values = _grouped(values, scheme)
        axes: tuple[int, ...] = (-1,)
    else:
        axes = _SHARED_AXES[scheme.granularity]
    if scheme.symmetric:
        step = values.abs().amax(axes, keepdim=True) / (scheme.levels / 2)
        return Scales(step, torch.zeros_like(step))
    low = values.amin(axes, keepdim=True)
    return Scales((values.amax(axes, keepdim=True) - low) / scheme.levels, low)


def apply(x: Tensor, scheme: Scheme, scales: Scales) -> Tensor:
    """Round ``x`` to the grid ``scales`` (values beyond it saturate) and return it in its own dtype."""
    values = _working(x)
    if scheme.granularity == "group":
        values = _grouped(values, scheme)
    # A constant block has step 0: any step then gives code 0, and the offset is the value itself.
    step = torch.where(scales.step == 0, torch.ones_like(scales.step), scales.step)
    low, high = (-scheme.levels // 2, scheme.levels // 2) if scheme.symmetric else (0, scheme.levels)
    codes = ((values - scales.offset) / step).round_().clamp_(low, high)
    rounded = codes.mul_(step).add_(scales.offset)
    if scheme.granularity == "group":
        rounded = _ungrouped(rounded, x)
    rounded = rounded.to(x.dtype)
    if scheme.channels is None:
        return rounded
    heads, head_dim = x.shape[1], x.shape[3]
    if scheme.channels[-1] >= heads * head_dim:
        raise InputError(f"channel {scheme.channels[-1]} was asked, but there are channels 0 to {heads * head_dim - 1}")
    chosen = torch.zeros(heads * head_dim, dtype=torch.bool, device=x.device)
    chosen[list(scheme.channels)] = True
    return torch.where(rearrange(chosen, "(h d) -> h 1 d", h=heads), rounded, x)


def round_kv(x: Tensor, scheme: Scheme) -> Tensor:
    """``x`` as a cache under ``scheme`` would return it, scales fitted to ``x`` itself.

    Parameters
    ----------
    x : Tensor [batch, kv_heads, tokens, head_dim]
    scheme : Scheme

    Returns
    -------
    Tensor
        Same shape and dtype; ``|x - round_kv(x)| <= step / 2`` for every entry, up to float32 arithmetic on
        the largest value of its block.
    """
    return apply(x, scheme, fit(x, scheme))


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _grouped(x: Tensor, scheme: Scheme) -> Tensor:
    """``[batch, tokens, groups, group_size]``; a short last group is filled with copies of its last value."""
    size = scheme.group_size or 1
    flat = rearrange(x, "b h t d -> b t (h d)")
    missing = -flat.shape[-1] % size
    if missing:
        flat = torch.cat([flat, flat[..., -1:].expand(*flat.shape[:-1], missing)], dim=-1)
    return rearrange(flat, "b t (g s) -> b t g s", s=size)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    flat = rearrange(groups, "b t g s -> b t (g s)")[..., : like.shape[1] * like.shape[3]]
    return rearrange(flat, "b t (h d) -> b h t d", h=like.shape[1])
