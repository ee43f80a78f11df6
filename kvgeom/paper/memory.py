"""Memory of a protected cache: as the paper counts it, in layers, and in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from kvgeom.evaluation.condition import Condition
from kvgeom.models.shapes import KVGeometry
from kvgeom.paper.table import Row
from kvgeom.quant.memory import TOKENS, bytes_of_sites
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Site


def cache_bytes(condition: Condition, geometry: KVGeometry) -> float:
    """Bytes per token of a cache that stores what a condition rounds to, scales included."""
    sites = (
        (scheme, *geometry.shape(layer, site))
        for layer in geometry.stores
        for site, scheme in zip(get_args(Site), condition.recipe.layers[layer], strict=True)
    )
    return bytes_of_sites(sites, Placement(), TOKENS) / TOKENS


def overhead_rows(
    at: Mapping[str, int | str], kept: Sequence[int], protected: Condition, base: Condition, geometry: KVGeometry
) -> list[Row]:
    """Layers kept by layers, which the paper calls memory overhead, and how many more bytes that is."""
    more = cache_bytes(protected, geometry) / cache_bytes(base, geometry) - 1
    return [
        Row(at, "layers kept", len(kept) / len(geometry.stores), unit="share of layers"),
        Row(at, "more bytes", more, unit="share of bytes", published_at=None),
    ]
