"""Keys as they might be."""

from __future__ import annotations

import torch


def keys(tokens: int = 7, seed: int = 0, heads: int = 2, offset: float = 3.0) -> torch.Tensor:
    """Something like keys: channels of different size, some with an offset."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, heads, tokens, 64, generator=generator) * torch.rand(64, generator=generator).exp()
    x[..., ::7] += offset
    return x
