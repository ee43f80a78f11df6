"""The cache, against transformers' own; rounding in it, against one pass over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvgeom.models.cache import EditedCache
from kvgeom.models.hf import HFModel
from kvgeom.models.rotary import TokenRotation
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.rotary import halves, rotate
from tests.builders.tiny import KINDS, tiny_model

IDS = [1, *range(40, 70), 12, 9, 200]  # longer than the sliding windows of the tiny models
PROJECTING = [kind for kind in KINDS if kind != "gpt_neox"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> HFModel:
    return tiny_model(request.param)


@torch.inference_mode()
def plain_logits(model: HFModel, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model.hf_model(torch.tensor([ids]), past_key_values=DynamicCache()).logits[0]
    return logits


def test_without_edit_it_is_transformers_own(model: HFModel) -> None:
    assert torch.equal(model.forward(IDS, all_logits=True), plain_logits(model, IDS))


def test_the_exact_recipe_changes_nothing(model: HFModel) -> None:
    quantizer = Quantizer(Recipe.exact(model.geometry.layers))
    assert torch.equal(model.forward(IDS, model.new_cache(quantizer)), model.forward(IDS))


def test_greedy_generation_is_transformers_own(model: HFModel) -> None:
    prompts = [IDS, IDS[:9], IDS[3:25]]
    caches = [model.new_cache() for _ in prompts]
    first = [int(model.forward(ids, cache)[-1].argmax()) for ids, cache in zip(prompts, caches, strict=True)]
    ours = model.generate(caches, first, 6)
    for ids, response in zip(prompts, ours, strict=True):
        theirs = model.hf_model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=sorted(model.stop_tokens)
        )[0, len(ids) :].tolist()
        assert response == [token for token in theirs if token not in model.stop_tokens]


@pytest.mark.parametrize(
    "text",
    [
        "int4-asym-tensor",
        "int4-asym-token",
        "int4-asym-channel",
        "int4-asym-head",
        "int4-asym-token-head",
        "int4-asym-channel-group7",
        "fp8_e4m3-tensor",
        "int4-sym-group8+hadamard",
    ],
)
def test_streaming_is_one_teacher_forced_pass(model: HFModel, text: str) -> None:
    """Step by step, or at once with the prompt's scales: the cache holds the same."""
    recipe = Recipe.uniform(model.geometry.layers, Scheme.parse(text))
    prompt, response = IDS[:20], IDS[20:]
    stepwise = model.new_cache(Quantizer(recipe))
    logits = [model.forward(prompt, stepwise)[-1]]
    logits += [model.forward([token], stepwise)[-1] for token in response]
    at_once = model.new_cache(Quantizer(recipe, prompt_tokens=len(prompt)))
    together = model.forward(IDS, at_once, all_logits=True)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.stack(logits), together, atol=2e-4, rtol=1e-4)


def test_the_cache_holds_rounded_values_and_prefill_reads_them(model: HFModel) -> None:
    scheme, last = Scheme(2, True, "tensor"), model.geometry.layers - 1
    recipe = Recipe.uniform(model.geometry.layers, scheme, layers=[last])
    exact, rounded, unread = (
        model.new_cache(),
        *(
            model.new_cache(Quantizer(recipe, placement))
            for placement in (Placement(), Placement(prefill_reads="exact"))
        ),
    )
    logits = [model.forward(IDS, cache) for cache in (exact, rounded, unread)]
    for cache in (rounded, unread):
        torch.testing.assert_close(cache.layers[last].keys, fake_quantize(exact.layers[last].keys, scheme))
        torch.testing.assert_close(cache.layers[last].values, fake_quantize(exact.layers[last].values, scheme))
    assert torch.equal(logits[2], logits[0])  # the prompt read exact values
    assert not torch.allclose(logits[1], logits[0], atol=1e-3)


@pytest.mark.parametrize("kind", PROJECTING)
def test_projection_rounding_reaches_the_cache_through_rope(kind: str) -> None:
    """With the last layer rounded at its projections, the cache holds rope(round(k_proj(x))) and round(v_proj(x))."""
    model, scheme = tiny_model(kind), Scheme(3, True, "tensor")
    last = model.geometry.layers - 1
    recipe = Recipe.uniform(model.geometry.layers, scheme, layers=[last])
    exact, rounded = model.new_cache(), model.new_cache(Quantizer(recipe, Placement.paper()))
    model.forward(IDS, exact)
    model.forward(IDS, rounded)
    torch.testing.assert_close(rounded.layers[last].values, fake_quantize(exact.layers[last].values, scheme))
    assert not torch.allclose(rounded.layers[last].keys, exact.layers[last].keys, atol=1e-3)
    for layer in range(last):
        assert torch.equal(rounded.layers[layer].keys, exact.layers[layer].keys)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi3"])
def test_unrotated_keys_are_projected_keys(kind: str) -> None:
    model = tiny_model(kind)
    projected: dict[int, torch.Tensor] = {}
    rotations: dict[int, TokenRotation] = {}

    class Tap(Quantizer):
        def __call__(self, layer, site, x):  # type: ignore[no-untyped-def]
            if site == "k":
                projected[layer] = x.clone()
            return x

    exact = Recipe.exact(model.geometry.layers)
    cache = model.new_cache(Tap(exact, Placement(where="projection")))
    model.forward(IDS, cache, on_rotation=rotations.__setitem__)
    for layer, keys in projected.items():
        torch.testing.assert_close(rotations[layer].rotate(keys), cache.layers[layer].keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotations[layer].unrotate(cache.layers[layer].keys), keys, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([2, 4, 8]), st.floats(0.5, 2.0), st.integers(0, 2**31))
def test_unrotate_inverts_rotate(heads: int, tokens: int, rotary: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, heads, tokens, 8, generator=generator, dtype=torch.float64)
    angle = torch.randn(tokens, rotary // 2, generator=generator, dtype=torch.float64)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rotation = TokenRotation(cos, sin, halves(rotary))
    turned = rotation.rotate(k)
    torch.testing.assert_close(turned, rotate(k, cos.repeat(1, 2), sin.repeat(1, 2)))
    torch.testing.assert_close(rotation.unrotate(turned), k)
    pairs = torch.randperm(8, generator=generator)[:rotary].reshape(-1, 2)
    other = TokenRotation(cos, sin, pairs)
    order = torch.cat([pairs.T.flatten(), torch.tensor([c for c in range(8) if c not in pairs], dtype=torch.long)])
    torch.testing.assert_close(other.rotate(k)[..., order], rotation.rotate(k[..., order]))


def test_suffix_reuse_is_exact(model: HFModel) -> None:
    recipe_of = {
        layer: Recipe.uniform(model.geometry.layers, Scheme(3, True, "tensor"), layers=[layer])
        for layer in range(model.geometry.layers)
    }
    resid: dict[int, torch.Tensor] = {}
    before = model.forward(IDS, on_resid=resid.__setitem__)
    for layer, recipe in recipe_of.items():
        start = (layer, resid[layer - 1]) if layer else None
        short = model.forward(IDS, model.new_cache(Quantizer(recipe)), start=start)
        assert torch.equal(short, model.forward(IDS, model.new_cache(Quantizer(recipe))))
    assert torch.equal(model.forward(IDS), before)  # nothing stays behind


@settings(max_examples=20)
@given(st.lists(st.integers(1, 33), min_size=1, max_size=5), st.integers(1, 6), st.randoms())
def test_stacked_sequences_do_not_see_each_other(lengths: list[int], batch_size: int, random) -> None:  # type: ignore[no-untyped-def]
    """Whatever the neighbours, the padding and the batch: responses under rounding are the same."""
    model = STACKED
    texts = ["int4-asym-tensor", "int4-asym-token", "int4-asym-channel", "int4-asym-channel-group5", "fp8_e4m3-head"]
    recipe = Recipe.uniform(model.geometry.layers, Scheme.parse(random.choice(texts)))
    placement = random.choice(
        [Placement(), Placement(sinks=2), Placement(residual=3), Placement(residual=2, flush="all")]
    )
    prompts = [[random.randrange(3, 259) for _ in range(length)] for length in lengths]

    def prefill(ids: list[int]) -> tuple[EditedCache, int]:
        cache = model.new_cache(Quantizer(recipe, placement))
        return cache, int(model.forward(ids, cache)[-1].argmax())

    filled = [prefill(ids) for ids in prompts]
    together = model.generate([c for c, _ in filled], [t for _, t in filled], 5, batch_size=batch_size)
    alone = [model.generate([cache], [token], 5)[0] for cache, token in (prefill(ids) for ids in prompts)]
    assert together == alone


STACKED = tiny_model("qwen2")


def test_generation_leaves_the_caches_alone(model: HFModel) -> None:
    cache = model.new_cache()
    first = int(model.forward(IDS, cache)[-1].argmax())
    before = cache.layers[0].keys.clone()
    assert model.generate([cache], [first], 4) == model.generate([cache], [first], 4)
    assert torch.equal(cache.layers[0].keys, before)


def test_a_copy_takes_another_edit() -> None:
    model = tiny_model()
    cache = model.new_cache()
    model.forward(IDS[:10], cache)
    copy = cache.copy(Quantizer(Recipe.uniform(3, Scheme(2))))
    model.forward(IDS[10:12], copy)
    assert cache.get_seq_length() == 10
    assert copy.get_seq_length() == 12
    assert torch.equal(copy.layers[0].keys[:, :, :10], cache.layers[0].keys)
