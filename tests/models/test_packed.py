"""The cache that holds codes: the same values as the simulated one, and as many bytes as the accounting says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.engines.registry import presets, resolve
from kvgeom.errors import InputError
from kvgeom.models.packed import PackedCache
from kvgeom.quant.formats.base import formats
from kvgeom.quant.memory import bits_per_element, bytes_per_token, cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics
from tests.builders.tiny import wide_model

MODEL = wide_model()
IDS = [1, *range(40, 75)]
PLACEMENTS = [
    Placement(),
    Placement(scales="call"),
    Placement(sinks=3),
    Placement(residual=8, prefill_reads="exact"),
    Placement(residual=5, flush="all"),
    Placement(residual=4, sinks=2),
]
SCHEMES = [
    "int2-asym-tensor",
    "int3-sym-group48",
    "int4-asym-token",
    "int4-asym-head/f16",
    "int5-asym-channel-group7",
    "int8-sym-channel/bf16",
    "int4-asym-token-head+hadamard",
    "int4-asym-token+center",
    "fp8_e4m3",
    "fp8_e5m2-tensor",
    "fp8_e4m3_rz",
    "mlx3-group64",
    "hqq2-group32",
    "vllm4-token-head+rht",
    "released4-asym-channel",
    "released3-sym-group48",
    "vllm_fp8",
    "vllm_turboquant3+hadamard",
    "vllm_uniform3",
    "lmdeploy_qjl+hadamard",
    "lmdeploy_lloyd+hadamard",
    "exllama5+hadamard32",
    "turboquant3+rotation",
    "turboquant_prod3+rotation",
    *[known.name for known in formats() if known.block_size is not None and len(known.widths) == 1],
]


def compare(recipe: Recipe, placement: Placement, prompt: int, generated: int) -> PackedCache:
    simulated, packed = MODEL.new_cache(Quantizer(recipe, placement)), PackedCache(3, Quantizer(recipe, placement))
    for ids in (IDS[:prompt], *([token] for token in IDS[prompt : prompt + generated])):
        assert torch.equal(MODEL.forward(ids, packed), MODEL.forward(ids, simulated))
    expected = cache_bytes(recipe, placement, 2, 64, prompt, generated, exact_bytes=4)
    assert packed.nbytes == expected
    return packed


#: Each scheme under two placements, in turn; all of them are slow together.
OFTEN = {(scheme, (number + more) % len(PLACEMENTS)) for number, scheme in enumerate(SCHEMES) for more in (0, 3)}


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        pytest.param(
            text,
            placement,
            marks=() if (text, number) in OFTEN else pytest.mark.slow,
            id=f"{text}-{placement}",
        )
        for text in SCHEMES
        for number, placement in enumerate(PLACEMENTS)
    ],
)
def test_same_values_and_the_bytes_of_the_accounting(text: str, placement: Placement) -> None:
    recipe = Recipe.uniform(3, Scheme.parse(text))
    if "center" in text:
        recipe = recipe.with_statics(offsets=Statics.of("key bias", MODEL.key_biases(), rotary=True))
    compare(recipe, placement, 20, 9)


@settings(max_examples=25)
@given(
    st.sampled_from([*SCHEMES[:5], "q4_0", "fp8_e4m3-token"]),
    st.integers(1, 24),
    st.integers(0, 10),
    st.integers(0, 12),
    st.sampled_from(["oldest", "all"]),
    st.integers(0, 5),
    st.sets(st.integers(0, 2)),
)
def test_any_window_and_prompt(
    text: str, prompt: int, generated: int, residual: int, flush: str, sinks: int, kept: set[int]
) -> None:
    flush = flush if residual else "oldest"
    placement = Placement(residual=residual, flush=flush, sinks=sinks)  # type: ignore[arg-type]
    compare(Recipe.uniform(3, Scheme.parse(text)).keep(kept), placement, prompt, generated)


@pytest.mark.parametrize(
    "known", [known for known in presets() if known.placement.where == "cache"], ids=lambda p: p.name
)
def test_presets(known) -> None:  # type: ignore[no-untyped-def]
    for width in known.widths:
        engine = resolve(known.name, bits=width)
        compare(engine.recipe(3), engine.placement, 20, 5)


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.09), (4, 0.16), (8, 0.28)])
def test_memory_saved(bits: int, at_most: float) -> None:
    """Against the same model's float32 cache: codes are a sixteenth, an eighth, a quarter, and scales come on top."""
    recipe = Recipe.uniform(3, Scheme(bits, False, "token-head", scales="f16"))
    packed = compare(recipe, Placement(), 30, 0)
    assert bytes_per_token(recipe, Placement(), 2, 64, 30, exact_bytes=4) == packed.nbytes / 30
    exact = sum(part.nbytes for layer in _exact(30).layers for part in (layer.keys, layer.values))
    assert packed.nbytes / exact <= at_most


def _exact(tokens: int):  # type: ignore[no-untyped-def]
    cache = MODEL.new_cache()
    MODEL.forward(IDS[:tokens], cache)
    return cache


def test_accounting_by_hand() -> None:
    q4 = Recipe.uniform(2, Scheme.parse("q4_0"))
    assert bytes_per_token(q4, kv_heads=2, head_dim=64) == 2 * 2 * 2 * (64 // 2 + 2 * 2)  # codes and two f16 scales
    assert bits_per_element(q4, kv_heads=2, head_dim=64) == 4.5
    assert bits_per_element(Recipe.exact(2)) == 16
    assert bits_per_element(q4.keep([0])) == (16 + 4.5) / 2
    tensor = Recipe.uniform(1, Scheme(8, True, "tensor"))
    assert cache_bytes(tensor, Placement(), 1, 64, 10, 90) == 2 * (100 * 64 + 4)  # one scale for good
    assert cache_bytes(tensor, Placement(scales="call"), 1, 64, 10, 90) == 2 * (100 * 64 + 91 * 4)
    waiting = cache_bytes(tensor, Placement(residual=16), 1, 64, 40)
    assert waiting == 2 * (32 * 64 + 4 + 8 * 64 * 2)  # two blocks of 16 rounded together, eight tokens wait


def test_what_a_packed_cache_is_not_for() -> None:
    recipe = Recipe.uniform(3, Scheme(4))
    for edit in (None, Quantizer(recipe, Placement.paper())):
        with pytest.raises(InputError, match="rounds in the cache"):
            PackedCache(3, edit)
    cache = PackedCache(3, Quantizer(recipe))
    token = int(MODEL.forward(IDS, cache)[-1].argmax())
    with pytest.raises(InputError, match="one sequence"):
        MODEL.generate([cache], [token], 3)
    with pytest.raises(InputError, match="layer 0, k"):
        MODEL.forward(IDS, PackedCache(3, Quantizer(Recipe.uniform(3, Scheme(4).only([1])))))
