"""llama.cpp: a type for all keys and one for all values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences, layer_names, unrounded
from kvgeom.engines.engine import Engine, Export, Preset
from kvgeom.engines.registry import register_engine
from kvgeom.engines.runner import Launch, Runner
from kvgeom.errors import InputError, brief
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


#: Its own HTTP server, out of the xllamacpp wheel. It ends when what started it does.
_PROGRAM = """
import json, sys, threading
import xllamacpp
launch = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = launch["model"], {launch["name"]}
params.hostnames, params.port = ["127.0.0.1"], launch["port"]
params.n_ctx, params.n_parallel = launch["context"] * launch["parallel"], launch["parallel"]
params.kv_unified = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = launch["threads"]
params.cache_type_k, params.cache_type_v = (
    getattr(xllamacpp.ggml_type, "GGML_TYPE_" + launch["cache"][site].upper()) for site in ("k", "v")
)
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
params.verbosity = 4
server = xllamacpp.Server(params)
threading.Event().wait()
"""
#: What it prints of its cache as it begins.
_CACHE = re.compile(r"llama_kv_cache: size = .*?\bK \((\w+)\).*?\bV \((\w+)\)")


def _gguf(model: str) -> str:
    """The .gguf file that a user means."""
    from kvgeom.checks import as_path
    from kvgeom.models.demo import DEMOS, demo_gguf

    if model in DEMOS:
        return str(demo_gguf(DEMOS[model]))
    path = as_path("model", model)
    if path.suffix != ".gguf" or not path.is_file():
        raise InputError(f"llama.cpp loads a .gguf file, got {brief(model)}; give the path of one, or demo")
    return str(path.absolute())


def _stated(launch: Launch, log: str) -> Mapping[str, str]:
    found = _CACHE.search(log)
    return {} if found is None else {"k": found[1], "v": found[2]}


RUNNER = Runner(
    module="xllamacpp",
    packages=("xllamacpp",),
    install="pip install xllamacpp==2026.10.11549",
    caches={site: tuple(reversed(_TYPES)) for site in ("k", "v")},
    find=_gguf,
    command=lambda launch: ["-c", _PROGRAM, json.dumps(asdict(launch))],
    stated=_stated,
    flags={"-ctk": "k", "-ctv": "v", "-fa": ""},
)

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
        runner=RUNNER,
    )
)
