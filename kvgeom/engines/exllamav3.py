"""ExLlamaV3: 2 to 8 bits for keys and for values, rotated in blocks of 32 channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences
from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import register_engine
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

_BLOCK = 32
_SCHEME = "exllama{bits}+hadamard32"


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """The argument of ExLlamaV3's scripts that comes nearest to a recipe (:class:`~kvgeom.engines.engine.Export`).

    There is one width for all keys and one for all values. It has no 16 bits beside them: where either stays in 16 bits in some
    layer, the cache is not quantized.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    k, v = (max(_width(recipe.layers[n][site]) for n in geometry.stores) for site in (0, 1))
    quantizes = max(k, v) <= 8 and geometry.head_dim % _BLOCK == 0
    pair: Schemes = (None, None)
    if quantizes:
        pair = Scheme.parse(_SCHEME.format(bits=k)), Scheme.parse(_SCHEME.format(bits=v))
    stored = Recipe((pair,) * len(recipe)).only(geometry.stores)
    where = placement if stored.touched == () else Placement()
    return Export(
        engine="ExLlamaV3",
        text=f"-cq {k},{v}" if quantizes else "(no -cq)",
        versions="1.4.1, by its source; the engine was not run",
        cannot=differences(recipe, placement, stored, where),
        notes=("in Python: Cache(model, ..., layer_type=CacheLayer_quant, k_bits=..., v_bits=...)",)
        if quantizes
        else (),
        recipe=stored,
        placement=where,
    )


def _width(scheme: Scheme | None) -> int:
    return 16 if scheme is None else scheme.bits


EXLLAMAV3 = register_engine(
    Engine(
        name="exllamav3",
        title="ExLlamaV3",
        version="1.4.1",
        source="https://github.com/turboderp-org/exllamav3 (exllamav3/cache/quant.py, exllamav3_ext/cache/q_cache_kernels.cuh)",
        checked="its source, written out in numpy",
        page="engine-exllamav3.md",
        presets=(
            Preset("exllamav3", "cache_quant of one width for keys and values", (4, 2, 3, 5, 6, 7, 8), both(_SCHEME)),
        ),
        export=export,
    )
)
