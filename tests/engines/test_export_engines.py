"""Flags and lists for engines: never narrower than the recipe, and honest about what they leave out."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.engines import exllamav3, llamacpp, mlx, vllm
from kvgeom.engines.differences import differences
from kvgeom.engines.engine import Export
from kvgeom.engines.registry import resolve
from kvgeom.models.model import KVGeometry
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import wide_model

ENGINES = {"vllm": vllm, "mlx": mlx, "llamacpp": llamacpp, "exllamav3": exllamav3}
LLAMA = KVGeometry(layers=4, query_heads=32, kv_heads=8, head_dim=128, d_model=4096, key_bias=False, rope="llama3")
PHI = KVGeometry(layers=4, query_heads=32, kv_heads=32, head_dim=80, d_model=2560, key_bias=False, rope="longrope")
SCHEMES = [
    "int3-asym-group64",
    "int4-asym-token+center",
    "int4-sym-group32",
    "int5-asym-channel",
    "int6-sym-head+equalize",
    "int8-asym-tensor",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3-token-head",
    "q4_0+hadamard",
    "q5_1",
    "iq4_nl",
    "mlx3-group64",
    "mxfp4",
    "vllm4-token-head+rht",
    "nvfp4",
    "vllm_turboquant3+hadamard",
    "vllm_uniform4",
    "turboquant4+rotation",
    "exllama3+hadamard32",
    "kept",
]


def parsed(text: str) -> Scheme | None:
    return None if text == "kept" else Scheme.parse(text)


def uniform(text: str) -> Recipe:
    return Recipe.uniform(4, Scheme.parse(text))


def made(engine: str, recipe: Recipe, placement: Placement | None = None, geometry: KVGeometry = LLAMA) -> Export:
    module: Any = ENGINES[engine]
    result: Export = module.export(recipe, placement or Placement(), geometry)
    return result


@given(
    st.sampled_from(sorted(ENGINES)),
    st.lists(st.tuples(st.sampled_from(SCHEMES), st.sampled_from(SCHEMES)), min_size=4, max_size=4),
    st.sampled_from([LLAMA, PHI]),
    st.sampled_from([Placement(), Placement(residual=32, flush="all", sinks=4), Placement(prefill_reads="exact")]),
)
def test_never_narrower_and_nothing_is_silent(
    engine: str, texts: list[tuple[str, str]], geometry: KVGeometry, placement: Placement
) -> None:
    recipe = Recipe(tuple((parsed(k), parsed(v)) for k, v in texts))
    found = made(engine, recipe, placement, geometry)
    assert len(found.recipe) == 4
    silent = True
    for pair, stored_pair in zip(recipe, found.recipe, strict=True):
        for scheme, stored in zip(pair, stored_pair, strict=True):
            assert stored is None or (scheme is not None and stored.bits >= scheme.bits)
            silent &= scheme == stored
    if silent and (placement == Placement() or found.placement == placement):
        assert not found.cannot
    else:
        assert found.cannot
    # Whatever is left out is named.
    named = "\n".join(found.cannot)
    for pair, stored_pair in zip(recipe, found.recipe, strict=True):
        for scheme, stored in zip(pair, stored_pair, strict=True):
            assert scheme == stored or str(scheme) in named
            if scheme is not None and stored is not None and scheme.transform in ("center", "equalize"):
                assert f"({scheme.transform}" in named
    # And what is stored is what the text says.
    assert read(engine, found.text, geometry) == found.recipe


def read(engine: str, text: str, geometry: KVGeometry, layers: int = 4) -> Recipe:
    """A recipe out of the text, by what the engines' pages in the documentation say."""
    if engine == "mlx":
        layers: list[Any] = []
        for name, group, bits, count in re.findall(
            r"\*\((\w+)\((?:group_size=(\d+), bits=(\d+))?\) for _ in range\((\d+)\)\)", text
        ):
            scheme = None if name == "KVCache" else Scheme.parse(f"mlx{bits}-group{group}")
            layers += [(scheme, scheme)] * int(count)
        return Recipe(tuple(layers))
    if engine == "vllm":
        dtype = re.search(r"--kv-cache-dtype (\w+)", text)
        skipped = re.search(r"--kv-cache-dtype-skip-layers ([\d ]+)", text)
        assert dtype is not None
        holds = {
            "auto": None,
            "int4_per_token_head": ("vllm4-token-head+rht",) * 2,
            "int8_per_token_head": ("vllm8-token-head",) * 2,
            "fp8_e4m3": ("fp8_e4m3",) * 2,
            "fp8_e5m2": ("fp8_e5m2",) * 2,
            "fp8_per_token_head": ("vllm_fp8",) * 2,
            "nvfp4": ("nvfp4",) * 2,
            "turboquant_3bit_nc": ("vllm_turboquant3+hadamard", "vllm_uniform3"),
            "turboquant_k3v4_nc": ("vllm_turboquant3+hadamard", "vllm_uniform4"),
            "turboquant_4bit_nc": ("vllm_turboquant4+hadamard", "vllm_uniform4"),
            "turboquant_k8v4": ("fp8_e4m3", "vllm_uniform4"),
        }[dtype[1]]
        recipe = Recipe((holds,) * layers) if holds else Recipe.exact(layers)
        ends = 2 if dtype[1].startswith("turboquant") else 0
        return recipe.keep([int(n) for n in skipped[1].split()] if skipped else []).keep_ends(ends, ends)
    if engine == "exllamav3":
        widths = re.fullmatch(r"-cq (\d),(\d)", text)
        if widths is None:
            return Recipe.exact(layers)
        return Recipe(((f"exllama{widths[1]}+hadamard32", f"exllama{widths[2]}+hadamard32"),) * layers)
    pair: list[Any] = []
    for flag, rotation in (("-ctk", "+hadamard"), ("-ctv", "+hadamard64")):
        kind = re.search(rf"{flag} (\w+)", text)
        assert kind is not None
        rotated = rotation if geometry.head_dim % 64 == 0 else ""
        pair.append(None if kind[1] == "f16" else Scheme.parse(kind[1] + rotated))
    assert ("-fa on" in text) == (pair[1] is not None)
    return Recipe((tuple(pair),) * layers)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (
            uniform("int4-asym-group64").keep([0, 2]),
            "--kv-cache-dtype int4_per_token_head --kv-cache-dtype-skip-layers 0 2",
        ),
        (uniform("int5-asym-token"), "--kv-cache-dtype int8_per_token_head"),
        (uniform("fp8_e5m2"), "--kv-cache-dtype fp8_e5m2"),
        (uniform("fp8_e4m3-tensor"), "--kv-cache-dtype fp8_e4m3"),
        (uniform("fp8_e4m3-token-head"), "--kv-cache-dtype fp8_per_token_head"),
        (uniform("vllm_fp8"), "--kv-cache-dtype fp8_per_token_head"),
        (uniform("nvfp4").keep([1]), "--kv-cache-dtype nvfp4 --kv-cache-dtype-skip-layers 1"),
        (uniform("nvfp4_4over6"), "--kv-cache-dtype nvfp4_4over6"),
        (uniform("mxfp4"), "--kv-cache-dtype int4_per_token_head"),
        (Recipe.exact(4), "--kv-cache-dtype auto"),
        (
            Recipe.uniform(4, Scheme(4), layers=[1], sites=["k"]),
            "--kv-cache-dtype auto",
        ),
    ],
)
def test_vllm(recipe: Recipe, text: str) -> None:
    assert made("vllm", recipe).text == text


@pytest.mark.parametrize(
    ("k", "v", "dtype"),
    [
        ("turboquant2+rotation", "turboquant3+rotation", "turboquant_3bit_nc"),
        ("vllm_turboquant3+hadamard", "vllm_uniform4", "turboquant_k3v4_nc"),
        ("turboquant_prod4+rotation", "turboquant2+rotation", "turboquant_4bit_nc"),
        ("turboquant6+rotation", "turboquant4+rotation", "turboquant_k8v4"),
        ("turboquant4+rotation", "turboquant5+rotation", "int8_per_token_head"),
        ("vllm_turboquant3+hadamard", "int3-asym-token", "int4_per_token_head"),
    ],
)
def test_codebooks_become_vllms_own(k: str, v: str, dtype: str) -> None:
    """The narrowest type that is no narrower; layers at the ends stay exact whatever is said, and need no flag."""
    geometry = replace(LLAMA, layers=7, stores=())
    recipe = Recipe(((Scheme.parse(k), Scheme.parse(v)),) * 7).keep([1, 3])
    found = vllm.export(recipe, Placement(prefill_reads="exact"), geometry)
    turbo = dtype.startswith("turboquant")
    assert found.text == f"--kv-cache-dtype {dtype} --kv-cache-dtype-skip-layers {'3' if turbo else '1 3'}"
    assert found.recipe == read("vllm", found.text, geometry, 7)
    assert found.recipe.touched == ((2, 4) if turbo else (0, 2, 4, 5, 6))
    assert any("layers 0, 5-6: 16 bits instead of" in line for line in found.cannot) == turbo
    wide = vllm.export(recipe, Placement(), replace(geometry, head_dim=80))
    assert "turboquant" not in wide.text


def test_vllms_turboquant_loses_nothing_of_its_own_preset() -> None:
    config = resolve("vllm-turboquant-3bit-nc")
    found = vllm.export(config.recipe(6), config.placement, replace(LLAMA, layers=6, stores=()))
    assert (found.text, found.cannot) == ("--kv-cache-dtype turboquant_3bit_nc", ())
    assert (found.recipe, found.placement) == (config.recipe(6), config.placement)


def test_exllama() -> None:
    recipe = Recipe(((Scheme.parse("int6-asym-token"), Scheme.parse("int3-asym-token")),) * 4)
    assert made("exllamav3", recipe).text == "-cq 6,3"
    own = uniform("exllama5+hadamard32")
    assert made("exllamav3", own).text == "-cq 5,5"
    assert not made("exllamav3", own).cannot
    for exact in (recipe.keep([2]), Recipe.exact(4)):
        found = made("exllamav3", exact)
        assert (found.text, found.recipe) == ("(no -cq)", Recipe.exact(4))
    assert made("exllamav3", own, geometry=PHI).recipe == Recipe.exact(4)


def test_vllm_rotates_only_heads_of_a_power_of_two() -> None:
    found = made("vllm", uniform("int4-asym-group64"), geometry=PHI)
    assert found.text == "--kv-cache-dtype int8_per_token_head"


def test_what_vllm_cannot_say() -> None:
    recipe = Recipe.uniform(4, Scheme.parse("int3-asym-group64+center")).keep([0])
    found = made("vllm", recipe, Placement(residual=128))
    for word in (
        "layers 1-3",
        "int3-asym-group64+center",
        "vllm4-token-head+rht",
        "4 bits instead of 3",
        "(rht)",
        "(center)",
    ):
        assert word in found.cannot[0]
    assert "128 tokens" in found.cannot[1]
    (keys,) = made("vllm", Recipe.uniform(4, Scheme(8), sites=["k"])).cannot
    assert keys.startswith("keys of all layers: 16 bits")
    exactly = made("vllm", uniform("vllm4-token-head+rht").keep([3]))
    assert exactly.cannot == ()
    assert "0.25" in exactly.versions
    assert "not run" in exactly.versions


@pytest.mark.parametrize(
    ("placement", "stored", "word"),
    [
        (Placement(residual=64), Placement(), "64 tokens"),
        (Placement(), Placement(residual=64), "64 tokens"),
        (Placement(residual=64, flush="all"), Placement(residual=64), "'all'"),
        (Placement(sinks=4), Placement(sinks=2), "first 4"),
        (Placement(prefill_reads="exact"), Placement(), "exact values"),
        (Placement.paper(), Placement(), "projection"),
        (Placement(scales="call"), Placement(), "call"),
    ],
)
def test_differences_of_placements(placement: Placement, stored: Placement, word: str) -> None:
    recipe = uniform("int4-sym-tensor")
    assert any(word in line for line in differences(recipe, placement, recipe, stored))
    assert differences(recipe, placement, recipe, placement) == ()


def test_layers_that_an_engine_rounds_unasked() -> None:
    recipe = uniform("int4-sym-tensor")
    (line,) = differences(recipe.keep([0, 3]), Placement(), recipe, Placement())
    assert "layers 0, 3: int4-sym-tensor instead of 16 bits" in line


def test_mlx() -> None:
    layers = (
        (None, Scheme.parse("int4-asym-group64")),
        *((Scheme.parse("int4-asym-group64"), Scheme.parse("int3-asym-group32")),) * 2,
        (Scheme.parse("int5-asym-token"), Scheme.parse("int6-asym-token")),
    )
    found = made("mlx", Recipe(layers))
    assert found.text.splitlines()[2:7] == [
        "cache = [",
        "    *(KVCache() for _ in range(1)),",
        "    *(QuantizedKVCache(group_size=32, bits=4) for _ in range(2)),",
        "    *(QuantizedKVCache(group_size=64, bits=8) for _ in range(1)),",  # 5 and 6 bits: see below
        "]",
    ]
    assert any("multiple of 32" in note for note in made("mlx", uniform("int4-asym-token"), geometry=PHI).notes)


def test_llamacpp() -> None:
    assert made("llamacpp", uniform("int4-asym-token")).text == "-fa on -ctk q4_1 -ctv q4_1"
    assert made("llamacpp", uniform("int3-sym-token")).text == "-fa on -ctk q4_0 -ctv q4_0"
    mixed = Recipe(((Scheme.parse("int5-sym-token"), Scheme.parse("q4_0")), (Scheme.parse("fp8_e4m3"), None)) * 2)
    found = made("llamacpp", mixed)
    assert found.text == "-ctk q8_0 -ctv f16"
    assert "layers 1, 3" in found.cannot[-1]
    assert "-fa on -ctk q8_0 -ctv q4_0" in found.cannot[-1]
    protected = made("llamacpp", uniform("int4-asym-token").keep([0]))
    assert protected.text == "-ctk f16 -ctv f16"
    assert "layer 0 " in protected.cannot[-1]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_as_text(engine: ModuleType) -> None:
    found = engine.export(uniform("int4-asym-token"), Placement(sinks=2), LLAMA)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"# {found.engine} (")
    assert found.text in str(found)
    assert sum(line.startswith("# cannot: ") for line in lines) == len(found.cannot)
    assert "of all layers: " in found.cannot[0]
    assert "instead of int4-asym-token" in found.cannot[0]
    assert any("the first 2" in line for line in found.cannot[1:])
    size = bits_per_element(found.recipe, found.placement, 8, 128)
    assert 4 < size < 6


def test_mlx_lm_runs_the_list() -> None:
    """Where it is installed: the widths that are avoided do fail, the others run and hold what is said."""
    mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed; pip install 'kvgeom[engines]'")
    cache_module: Any = pytest.importorskip("mlx_lm.models.cache")
    for head_dim in (64, 96, 128, 256):
        geometry = KVGeometry(3, 2, 2, head_dim, 128, False, "default")
        x = mx.random.normal((1, 2, 7, head_dim))
        for bits in (2, 3, 4, 5, 6, 8):
            found = mlx.export(Recipe.uniform(3, Scheme(bits)).keep([1]), Placement(), geometry)
            names: dict[str, Any] = {}
            exec(found.text, names)
            for made_cache in names["cache"]:
                made_cache.update_and_fetch(x, x)
                made_cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
            assert [type(each).__name__ for each in names["cache"]] == [
                "QuantizedKVCache",
                "KVCache",
                "QuantizedKVCache",
            ]
            if names["cache"][0].bits != bits:
                with pytest.raises(ValueError, match="broadcast"):
                    cache_module.QuantizedKVCache(group_size=32, bits=bits).update_and_fetch(x, x)


def test_what_is_stored_can_be_evaluated() -> None:
    """The recipe of an export runs as any other."""
    model = wide_model()
    for name, module in ENGINES.items():
        found = module.export(Recipe.uniform(3, Scheme.parse("int4-asym-token")).keep([1]), Placement(), model.geometry)
        cache = model.new_cache(Quantizer(found.recipe, found.placement))
        logits = model.forward([1, 50, 60, 70], cache)
        exact = model.forward([1, 50, 60, 70])
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, exact) == (name in ("llamacpp", "exllamav3"))
