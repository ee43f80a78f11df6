"""A Recipe and a Placement at work on the stream of keys and values of some sequences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvgeom.quant import rounding
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.rounding import Scales


class Rounder:
    """Rounds keys and values on their way into a cache; the edit of a :class:`~kvgeom.models.cache.EditedCache`.

    It remembers the scales that a prompt has set, so it belongs to one cache: make a new one for each.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    prompt_tokens : int, optional
        How many tokens of the first call are the prompt that sets shared scales; all of them by default.
        With it, one teacher-forced pass over prompt and response rounds as the step-by-step cache does.
    """

    def __init__(self, recipe: Recipe, placement: Placement | None = None, prompt_tokens: int | None = None) -> None:
        self.recipe = recipe
        self.placement = placement or Placement()
        self.prompt_tokens = prompt_tokens
        self._scales: dict[tuple[int, Site], Scales] = {}

    @property
    def where(self) -> str:
        """``"cache"`` or ``"projection"``."""
        return self.placement.where

    @property
    def prefill_reads_exact(self) -> bool:
        """Whether the prompt's own attention reads unrounded values."""
        return self.placement.prefill_reads == "exact"

    def __call__(self, layer: int, site: Site, x: Tensor) -> Tensor:
        """What the cache holds of ``x``, ``[batch, kv_heads, new tokens, head_dim]``, in ``layer``."""
        scheme = self.recipe.scheme(layer, site)
        if scheme is None:
            return x
        if not scheme.spans_tokens or self.placement.scales == "call":
            return rounding.round_kv(x, scheme)
        scales = self._scales.get((layer, site))
        if scales is None:
            scales = self._scales[layer, site] = rounding.fit(x[:, :, : self.prompt_tokens], scheme)
        return rounding.apply(x, scheme, scales)

    def rows(self, rows: Tensor) -> Rounder:
        """The rounder of some sequences of the batch."""
        return self._with({key: scales.rows(rows) for key, scales in self._scales.items()})

    @staticmethod
    def stack(parts: Sequence[Rounder]) -> Rounder:
        """One rounder for the sequences of several, which must follow the same recipe."""
        first = parts[0]
        return first._with({key: Scales.stack([part._scales[key] for part in parts]) for key in first._scales})

    def _with(self, scales: dict[tuple[int, Site], Scales]) -> Rounder:
        new = Rounder(self.recipe, self.placement)
        new._scales = scales
        return new
