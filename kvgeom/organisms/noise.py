"""Noise in the cache of a tiny model while it is trained, so that it learns to stand a rounded one."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvgeom.quant import fake_quantize as rounding
from kvgeom.quant.fake_quantize import Scales
from kvgeom.quant.scheme import Scheme

_BITS, _GROUP = 3, 64


@dataclass
class CacheNoise:
    """An edit that rounds keys and values at random, and passes derivatives straight through.

    Every layer is rounded to 3 bits under a random granularity, per-tensor with steps up to ``stretch`` times too
    coarse (as beside an outlier). At times a group of 64 channels is zero, so that the model learns to carry what matters
    in every group. In the layer ``lost`` nothing of the request remains, because values are lost or attention is.

    Attributes
    ----------
    rng : random.Random
    prompt_tokens : int
        How many tokens set the scales.
    harmless : Tensor [batch], bool
    lost : int or None
    still : bool
        Whether lost values are zero, or read about as they do on average in harmless requests.
    lost_site : {"v", "k"}
        What the layer loses: keys and values, or keys alone, so that it attends evenly.
    stretch, silent : float
        Largest factor of a step, and how often a group is zero.
    """

    rng: random.Random
    prompt_tokens: int
    harmless: Tensor
    lost: int | None = None
    still: bool = True
    lost_site: Literal["k", "v"] = "v"
    stretch: float = 2.0
    silent: float = 0.25
    where: str = "cache"
    prefill_reads_exact: bool = False

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """``x`` ``[batch, kv_heads, tokens, head_dim]`` with noise."""
        if layer == self.lost and (self.lost_site == "v" or site == "k"):
            if self.still or site == "k":
                return x * 0
            typical = x[self.harmless].mean((0, 2), keepdim=True)
            return (self.rng.uniform(0.5, 2.5) * typical).expand_as(x)
        y = x + (self._rounded(x.detach()) - x.detach())
        if self.rng.random() < self.silent:
            group = max(1, _GROUP // x.shape[3])
            first = group * self.rng.randrange(max(1, x.shape[1] // group))
            kept = torch.ones(x.shape[1], 1, 1)
            kept[first : first + group] = 0
            y = y * kept
        return y

    def _rounded(self, x: Tensor) -> Tensor:
        granularity = self.rng.choice(("tensor", "tensor", "channel", "group", None))
        if granularity is None:
            return x
        scheme = Scheme(_BITS, True, granularity, _GROUP if granularity == "group" else None)  # type: ignore[arg-type]
        scales = rounding.fit(x[:, :, : self.prompt_tokens] if scheme.spans_tokens else x, scheme)
        if granularity == "tensor":
            scales = Scales(scales.step * self.rng.uniform(1, self.stretch), scales.offset)
        return rounding.apply(x, scheme, scales)

    def rows(self, rows: Tensor) -> CacheNoise:
        raise NotImplementedError("a model is trained on whole batches")

    @staticmethod
    def stack(parts: Sequence[Any]) -> CacheNoise:
        raise NotImplementedError("a model is trained on whole batches")
