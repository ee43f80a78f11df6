"""A Recipe and a Placement at work on the stream of keys and values of some sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from kvgeom.quant import rounding
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.rounding import Scales
from kvgeom.quant.scheme import Scheme


class Rounder:
    """Rounds keys and values on their way into a cache; the edit of a :class:`~kvgeom.models.cache.EditedCache`.

    It remembers the scales that a prompt has set, so it belongs to one cache: make a new one for each.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    prompt_tokens : int, optional
        How many tokens, from the first call on, are the prompt; all of the first call by default. Only they set
        scales that tokens share. With it, one teacher-forced pass over prompt and response rounds as the
        step-by-step cache does.
    """

    def __init__(self, recipe: Recipe, placement: Placement | None = None, prompt_tokens: int | None = None) -> None:
        self.recipe = recipe
        self.placement = placement or Placement()
        self.prompt_tokens = prompt_tokens
        self._scales: dict[tuple[int, Site], Scales] = {}
        self._seen: dict[tuple[int, Site], int] = {}

    @property
    def where(self) -> str:
        """``"cache"`` or ``"projection"``."""
        return self.placement.where

    @property
    def prefill_reads_exact(self) -> bool:
        """Whether the prompt's own attention reads unrounded values."""
        return self.placement.prefill_reads == "exact"

    @property
    def kind(self) -> Hashable:
        """Recipe and placement: what is done to a sequence, whatever the scales that its prompt has set."""
        return self.recipe, self.placement

    def __call__(self, layer: int, site: Site, x: Tensor) -> Tensor:
        """What the cache holds of ``x``, ``[batch, kv_heads, new tokens, head_dim]``, in ``layer``."""
        scheme = self.recipe.scheme(layer, site)
        if scheme is None:
            return x
        if not scheme.spans_tokens:
            return rounding.round_kv(x, scheme)
        if self.placement.scales == "call":
            return self._call_by_call((layer, site), x, scheme)
        scales = self._scales.get((layer, site))
        if scales is None:
            scales = self._scales[layer, site] = rounding.fit(x[:, :, : self.prompt_tokens], scheme)
        return rounding.apply(x, scheme, scales)

    def _call_by_call(self, key: tuple[int, Site], x: Tensor, scheme: Scheme) -> Tensor:
        """Fresh scales in every call: the prompt is one, and each token after it another."""
        if self.prompt_tokens is None:
            return rounding.round_kv(x, scheme)
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + x.shape[2]
        prompt, response = x.tensor_split((max(0, self.prompt_tokens - seen),), dim=2)
        calls = [rounding.round_kv(prompt, scheme)] if prompt.shape[2] else []
        if response.shape[2]:
            alone = rearrange(response, "b h t d -> (b t) h 1 d")
            calls.append(rearrange(rounding.round_kv(alone, scheme), "(b t) h 1 d -> b h t d", b=len(x)))
        return torch.cat(calls, dim=2)

    def rows(self, rows: Tensor) -> Rounder:
        """The rounder of some sequences of the batch."""
        return self._past_the_prompt({key: scales.rows(rows) for key, scales in self._scales.items()})

    @staticmethod
    def stack(parts: Sequence[Rounder]) -> Rounder:
        """One rounder for the sequences of several, which must follow the same recipe."""
        first = parts[0]
        scales = {key: Scales.stack([part._scales[key] for part in parts]) for key in first._scales}
        return first._past_the_prompt(scales)

    def _past_the_prompt(self, scales: dict[tuple[int, Site], Scales]) -> Rounder:
        new = Rounder(self.recipe, self.placement, prompt_tokens=0)
        new._scales = scales
        return new
