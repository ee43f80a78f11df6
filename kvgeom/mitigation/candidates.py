"""Caches that might keep the refusals that a quantized cache loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from kvgeom.errors import InputError
from kvgeom.evaluation.condition import Condition
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site

#: The cache as the engine makes it.
UNMITIGATED = "unmitigated"
#: What of a layer may be kept in 16 bits.
KEPT: tuple[tuple[Site, ...], ...] = (("k", "v"), ("k",), ("v",))


@dataclass(frozen=True)
class Candidate:
    """A cache, and what it does differently.

    Attributes
    ----------
    name : str
    family : str
        What kind of change it is: ``"unmitigated"``, the name of a mitigation (``"center"``, ``"protect"``, ...), or
        ``"combined"``.
    recipe : Recipe
    placement : Placement
    description : str
        What it does, as a verb phrase: "keeps the first 4 tokens in 16 bits".
    """

    name: str
    family: str
    recipe: Recipe
    placement: Placement
    description: str

    def bytes_per_token(self, geometry: KVGeometry) -> float:
        """Memory of a token in all layers, scales, offsets and tokens in 16 bits included, of a prompt of 4,096 tokens."""
        return geometry.bytes_per_token(self.recipe, self.placement)

    def same_cache(self, other: Candidate) -> bool:
        """Whether another candidate is the same cache, whatever it is called."""
        return (self.recipe, self.placement) == (other.recipe, other.placement)

    def condition(self, draw: int | None = None) -> Condition:
        """What is evaluated: the cache itself, or its control with errors of the same size in random directions.

        Parameters
        ----------
        draw : int, optional
            Seed of the random directions.
        """
        recipe = self.recipe if draw is None else self.recipe.with_random_directions(draw)
        return Condition(recipe, self.placement, family="mitigation", draw=draw)

    def rounded_share(self, tokens: int) -> float:
        """Share of a prompt that is rounded when the response begins; the rest waits, or stays, in 16 bits.

        Parameters
        ----------
        tokens : int
            Length of the prompt.
        """
        shares = []
        for scheme in {scheme for pair in self.recipe for scheme in pair if scheme is not None}:
            start, stop = self.placement.next_span(-1, tokens, scheme.spans_tokens)
            shares.append((stop - start) / tokens)
        return max(shares, default=0.0)


def protect(
    candidate: Candidate, layers: Iterable[int], sites: Iterable[Site] = ("k", "v"), how: str = ""
) -> Candidate:
    """The same with some layers in 16 bits, or only their keys or values.

    Parameters
    ----------
    candidate : Candidate
    layers : iterable of int
    sites : iterable of {"k", "v"}
    how : str
        Why these layers, as part of the name.
    """
    kept, sites = sorted({*layers}), {*sites}
    if not kept or kept[0] < 0 or kept[-1] >= len(candidate.recipe):
        raise InputError(
            f"layers to keep in 16 bits must be at least one of 0 to {len(candidate.recipe) - 1}, got {kept}"
        )
    if not sites or not sites <= {*get_args(Site)}:
        raise InputError(f"sites to keep in 16 bits must be k, v or both, got {sorted(sites)}")
    what = "keys and values" if len(sites) == 2 else "keys" if "k" in sites else "values"
    pairs = tuple(
        (None if "k" in sites else k, None if "v" in sites else v) if layer in kept else (k, v)
        for layer, (k, v) in enumerate(candidate.recipe)
    )
    label = f"{'' if len(sites) == 2 else what + ' of '}{how + ' ' if how else ''}{_listed(kept)} in 16 bits"
    alone = candidate.family == "unmitigated"
    return Candidate(
        label if alone else f"{candidate.name}; {label}",
        "protect" if alone else "combined",
        replace(candidate.recipe, layers=pairs),
        candidate.placement,
        f"keeps {what} of {_listed(kept)} in 16 bits" + ("" if alone else f" and {candidate.description}"),
    )


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
