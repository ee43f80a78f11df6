"""Per-channel statistics of keys and values over some prompts: what constant offsets and factors are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.models.rope import unrotate

Key = tuple[int, Literal["k", "v"]]


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and largest magnitude of every channel, keys freed of their rotary embedding.

    Attributes
    ----------
    mean, largest : dict of (layer, "k" or "v") to Tensor [kv_heads, head_dim]
    rotary_dim : int
        How many channels of a head the model rotates; 0 without rotary embedding.
    tokens : int
    """

    mean: dict[Key, Tensor] = field(repr=False)
    largest: dict[Key, Tensor] = field(repr=False)
    rotary_dim: int
    tokens: int


def channel_statistics(model: Model, prompts: Sequence[str]) -> ChannelStatistics:
    """Run some prompts (one pass each) and summarise what the cache holds of them.

    Sums are kept, no prompt is.

    Raises
    ------
    InputError
        Without prompts.
    """
    if not prompts:
        raise InputError("statistics of keys and values were asked without prompts; give at least one")
    sums: dict[Key, Tensor] = {}
    largest: dict[Key, Tensor] = {}
    tokens, rotary_dim = 0, 0
    for prompt in model.encode(prompts):
        rotations: dict[int, tuple[Tensor, Tensor]] = {}

        def see(layer: int, cos: Tensor, sin: Tensor, seen: dict[int, tuple[Tensor, Tensor]] = rotations) -> None:
            seen[layer] = (cos, sin)

        cache = model.new_cache()
        model.forward(prompt.ids, cache, on_rotation=see)
        tokens += len(prompt)
        for index, layer in enumerate(cache.layers):
            keys = unrotate(layer.keys, *rotations[index]) if index in rotations else layer.keys
            rotary_dim = rotations[index][0].shape[-1] if index in rotations else 0
            for site, x in (("k", keys), ("v", layer.values)):
                key: Key = (index, site)  # type: ignore[assignment]
                own = x[0].float()
                sums[key] = sums.get(key, torch.zeros(())) + own.sum(1)
                largest[key] = torch.maximum(largest.get(key, torch.zeros_like(own[:, 0])), own.abs().amax(1))
    return ChannelStatistics({key: total / tokens for key, total in sums.items()}, largest, rotary_dim, tokens)
