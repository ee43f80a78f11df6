"""llama.cpp: a type for all keys and one for all values."""

from __future__ import annotations

from kvgeom.engines.export import Export, differences, kept, spelled
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme

#: Types that a cache may have, narrow ones first.
_TYPES = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "f16")
_BLOCK = 32


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """The flags of llama.cpp that are nearest to a recipe (:class:`~kvgeom.engines.export.Export`).

    There is one type for all layers. Where a site is to stay in 16 bits in some layer, it stays so in all: the layers that
    a mitigation protects must not be rounded for want of a flag.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    sites: tuple[Site, Site] = ("k", "v")
    chosen = {site: _type([recipe.scheme(n, site) for n in range(len(recipe))], geometry.head_dim) for site in sites}
    held = Recipe(tuple((_held("k", chosen["k"], geometry), _held("v", chosen["v"], geometry)) for _ in recipe))
    cannot = list(differences(recipe, placement, held, Placement()))
    protected = kept(recipe)
    if 0 < len(protected) < len(recipe):
        rest = [
            _type([s for s in (recipe.scheme(n, site) for n in range(len(recipe))) if s], geometry.head_dim)
            for site in sites
        ]
        cannot.append(
            f"{spelled(protected, len(recipe))} cannot have a type of their own; {_flags(*rest)} would round them with all others"
        )
    return Export(
        engine="llama.cpp",
        text=_flags(chosen["k"], chosen["v"]),
        versions="July 2026 (as in llama-cpp-python 0.3.36) was run; rotation of heads since April 2026",
        cannot=tuple(cannot),
        notes=tuple(_notes(chosen["k"], chosen["v"], geometry)),
        recipe=held,
        placement=Placement(),
    )


def _flags(k: str, v: str) -> str:
    return f"{'' if v == 'f16' else '-fa on '}-ctk {k} -ctv {v}"


def _notes(k: str, v: str, geometry: KVGeometry) -> list[str]:
    notes = []
    if v != "f16":
        notes.append("a quantized type of values needs flash attention (-fa on), and fails at the start without it")
    if (k, v) not in (("f16", "f16"), ("q4_0", "q4_0"), ("q8_0", "q8_0")):
        notes.append("on CUDA, types other than q4_0 or q8_0 for both need a build with GGML_CUDA_FA_ALL_QUANTS=ON")
    if geometry.head_dim % _BLOCK:
        notes.append(f"heads of {geometry.head_dim} channels cannot be quantized: blocks have {_BLOCK}")
    return notes


def _type(schemes: list[Scheme | None], head_dim: int) -> str:
    """The widest of the types that are nearest to each scheme."""
    names = [_nearest(scheme) for scheme in schemes] or ["f16"]
    return "f16" if head_dim % _BLOCK else max(names, key=_TYPES.index)


def _nearest(scheme: Scheme | None) -> str:
    if scheme is None:
        return "f16"
    if scheme.format in _TYPES:
        return scheme.format
    if scheme.bits > 5:
        return "q8_0"
    return f"q{max(scheme.bits, 4)}_{0 if scheme.symmetric else 1}"


def _held(site: Site, kind: str, geometry: KVGeometry) -> Scheme | None:
    """As llama.cpp stores it: heads of a multiple of 64 channels are rotated first."""
    if kind == "f16":
        return None
    rotation = {"k": "+hadamard", "v": "+hadamard64"}[site] if geometry.head_dim % 64 == 0 else ""
    return Scheme.parse(kind + rotation)
