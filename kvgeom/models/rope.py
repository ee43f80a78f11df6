"""Taking rotary position embedding out of keys, so that tokens at different positions can be compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Rotates vectors ``[kv_heads, head_dim]`` into ``[batch or 1, kv_heads, tokens, head_dim]``, each at its token's position.
Rotation = Callable[[Tensor], Tensor]


def rotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys as stored, from keys as projected: ``k * cos + rotate_half(k) * sin``.

    Parameters
    ----------
    k : Tensor [..., tokens, head_dim]
    cos, sin : Tensor [tokens, rotary_dim]
        What the model's own rotary module returned; with a partial rotary embedding ``rotary_dim < head_dim``
        and the other channels pass through.
    """
    size = cos.shape[-1]
    rotated = k[..., :size]
    return torch.cat([rotated * cos + _rotate_half(rotated) * sin, k[..., size:]], dim=-1)


def unrotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Inverse of :func:`rotate`, also where the model scales ``cos`` and ``sin`` (as YaRN does)."""
    scale = (cos * cos + sin * sin).clamp_min(torch.finfo(cos.dtype).tiny)
    return rotate(k, cos / scale, -sin / scale)


def rotation_at(cos: Tensor, sin: Tensor) -> Rotation:
    """How the positions of some tokens rotate vectors that are the same at all of them.

    Parameters
    ----------
    cos, sin : Tensor [batch or 1, tokens, rotary_dim]
        What the model's own rotary module returned.
    """
    cos, sin = cos[:, None], sin[:, None]
    rows, _, tokens, _ = cos.shape
    return lambda vectors: rotate(vectors[None, :, None].to(cos).expand(rows, -1, tokens, -1), cos, sin)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
