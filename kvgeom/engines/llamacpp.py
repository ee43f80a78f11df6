"""llama.cpp: a type for all keys and one for all values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences, layer_names, unrounded
from kvgeom.engines.engine import Engine, Export, Preset
from kvgeom.engines.registry import register_engine
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes, Site
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

#: Types that a cache may have, narrow ones first.
_TYPES = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "f16")
_BLOCK = 32


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """Flags of llama.cpp that come nearest to a recipe (:class:`~kvgeom.engines.engine.Export`).

    There is one type for all layers. A site that stays in 16 bits in some layer stays so in all of them: layers that a
    mitigation protects must not be rounded because a flag is missing.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    sites: tuple[Site, Site] = ("k", "v")
    layers = geometry.stores
    chosen = {site: _type([recipe.scheme(n, site) for n in layers], geometry.head_dim) for site in sites}
    pair = (_stored("k", chosen["k"], geometry), _stored("v", chosen["v"], geometry))
    stored = Recipe((pair,) * len(recipe)).only(layers)
    cannot = list(differences(recipe, placement, stored, Placement()))
    protected = [layer for layer in unrounded(recipe) if layer in layers]
    if 0 < len(protected) < len(layers):
        rest = [_type([s for s in (recipe.scheme(n, site) for n in layers) if s], geometry.head_dim) for site in sites]
        cannot.append(
            f"{layer_names(protected, len(recipe))} cannot have their own type; {_flags(*rest)} would round them with all others"
        )
    return Export(
        engine="llama.cpp",
        text=_flags(chosen["k"], chosen["v"]),
        versions="July 2026 (as in llama-cpp-python 0.3.36) was run; rotation of heads since April 2026",
        cannot=tuple(cannot),
        notes=tuple(_notes(chosen["k"], chosen["v"], geometry)),
        recipe=stored,
        placement=Placement(),
    )


def _flags(k: str, v: str) -> str:
    return f"{'' if v == 'f16' else '-fa on '}-ctk {k} -ctv {v}"


def _notes(k: str, v: str, geometry: KVGeometry) -> list[str]:
    notes = []
    if v != "f16":
        notes.append("a quantized type of values needs flash attention; llama.cpp does not start without -fa on")
    if (k, v) not in (("f16", "f16"), ("q4_0", "q4_0"), ("q8_0", "q8_0")):
        notes.append("on CUDA, anything but q4_0 or q8_0 for both sites needs a build with GGML_CUDA_FA_ALL_QUANTS=ON")
    if geometry.head_dim % _BLOCK:
        notes.append(f"heads of {geometry.head_dim} channels cannot be quantized: blocks have {_BLOCK} channels")
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


def _stored(site: Site, kind: str, geometry: KVGeometry) -> Scheme | None:
    """As llama.cpp stores it: heads of a multiple of 64 channels are rotated first."""
    if kind == "f16":
        return None
    rotation = {"k": "+hadamard", "v": "+hadamard64"}[site] if geometry.head_dim % 64 == 0 else ""
    return Scheme.parse(kind + rotation)


def _rotated(kind: str) -> Callable[[int], Schemes]:
    return lambda _: (Scheme.parse(f"{kind}+hadamard"), Scheme.parse(f"{kind}+hadamard64"))


LLAMACPP = register_engine(
    Engine(
        name="llamacpp",
        title="llama.cpp",
        version="(July 2026, in llama-cpp-python 0.3.36)",
        source="https://github.com/ggml-org/llama.cpp (src/llama-kv-cache.cpp, ggml/src/ggml-quants.c)",
        checked="its blocks bit for bit (gguf package); the engine itself in greedy tokens and logits",
        page="engine-llamacpp.md",
        presets=tuple(
            Preset(f"llamacpp-{kind}", f"type_k = type_v = {kind}", (bits,), _rotated(kind))
            for kind, bits in (("q8_0", 8), ("q4_0", 4))
        ),
        export=export,
    )
)
