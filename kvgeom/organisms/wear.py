"""What a tiny model learns to stand while it is trained: a rounded cache."""

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
class Wear:
    """An edit that wears keys and values out as a rounded cache does, and passes derivatives straight through.

    Every layer is rounded to 3 bits under a random granularity, per-tensor with steps up to ``stretch`` times too
    coarse (as beside an outlier). At times a group of 64 channels is silent, so that the model learns to carry what
    matters in every group. In the layer ``lost`` nothing of the request remains.

    Attributes
    ----------
    rng : random.Random
    prompt_tokens : int
        How many tokens set the scales.
    harmless : Tensor [batch], bool
    lost : int or None
    still : bool
        Whether the lost layer is silent, or reads as it does on average in harmless requests, more or less.
    stretch, silent : float
        Largest factor of a step, and how often a group is silent.
    """

    rng: random.Random
    prompt_tokens: int
    harmless: Tensor
    lost: int | None = None
    still: bool = True
    stretch: float = 2.0
    silent: float = 0.25
    where: str = "cache"
    prefill_reads_exact: bool = False

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """``x`` ``[batch, kv_heads, tokens, head_dim]`` as worn."""
        if layer == self.lost:
            if self.still or site == "k":
                return x * 0
            typical = x[self.harmless].mean((0, 2), keepdim=True)
            return (self.rng.uniform(0.5, 2.5) * typical).expand_as(x)
        y = x + (self._rounded(x.detach()) - x.detach())
        if self.rng.random() < self.silent:
            together = max(1, _GROUP // x.shape[3])
            first = together * self.rng.randrange(max(1, x.shape[1] // together))
            heard = torch.ones(x.shape[1], 1, 1)
            heard[first : first + together] = 0
            y = y * heard
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

    def rows(self, rows: Tensor) -> Wear:
        raise NotImplementedError("a model is trained on whole batches")

    @staticmethod
    def stack(parts: Sequence[Any]) -> Wear:
        raise NotImplementedError("a model is trained on whole batches")
