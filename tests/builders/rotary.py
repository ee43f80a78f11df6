"""Rotary embedding written out once more, from its definition: the two halves of a head are pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels of ``x [..., tokens, head_dim]`` turned; ``cos`` and ``sin`` hold every angle twice."""
    size = cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    return torch.cat([x[..., :size] * cos + torch.cat([-second, first], dim=-1) * sin, x[..., size:]], dim=-1)


def halves(rotated: int) -> Tensor:
    """The pairs of so many channels, ``[rotated / 2, 2]``."""
    return torch.arange(rotated).reshape(2, -1).T
