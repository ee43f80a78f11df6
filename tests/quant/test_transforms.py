"""Transforms: nothing changes in full precision, and each is what the mathematics says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

import kvgeom
from kvgeom.errors import InputError
from kvgeom.models.hf import HFModel
from kvgeom.models.statistics import channel_statistics
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics, frame, pair_factors
from tests.builders.rotary import halves, rotate
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

IDS = [1, *range(40, 66)]


@pytest.fixture(scope="module")
def biased() -> HFModel:
    """A model whose keys have a large constant part."""
    model = tiny_model("qwen2")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model._layers:
            bias = layer.self_attn.k_proj.bias  # type: ignore[union-attr]
            bias.copy_(20 * torch.randn(bias.shape, generator=generator))
    return model


def offsets(model: HFModel) -> Statics:
    return Statics.of("key bias", model.key_biases(), rotary=True)


class _Coarse(Quantizer):
    """Rounds nothing: what remains of the transforms alone."""

    def _fake_quantized(self, key, x, scheme, start):  # type: ignore[no-untyped-def]
        found, _ = self._encode(key, scheme, x, start)
        y = found.enter(x.float())
        return found.leave(y).to(x.dtype)


@pytest.mark.parametrize(
    "placement", [Placement(), Placement(where="projection"), Placement(residual=4), Placement(sinks=2)]
)
@pytest.mark.parametrize("transform", ["center", "hadamard", "hadamard64", "hadamard32", "rotation", "rht", "equalize"])
def test_transforms_leave_full_precision_attention_unchanged(
    biased: HFModel, transform: str, placement: Placement
) -> None:
    scheme = Scheme(4, transform=transform)  # type: ignore[arg-type]
    factors = Statics.of("f", {(n, site): torch.rand(2, 8) + 0.5 for n in range(3) for site in ("k", "v")})  # type: ignore[misc]
    recipe = Recipe.uniform(3, scheme).with_statics(offsets=offsets(biased), factors=factors)
    clean = biased.forward(IDS, all_logits=True)
    ours = biased.forward(IDS, biased.new_cache(_Coarse(recipe, placement)), all_logits=True)
    torch.testing.assert_close(ours, clean, atol=1e-3, rtol=1e-4)


def test_center_rounds_what_is_left_without_the_bias(biased: HFModel) -> None:
    """In the cache: R(p) b + round(K - R(p) b), with angles computed here from the definition of rotary embedding."""
    last = 2
    scheme = Scheme(3, transform="center")
    recipe = Recipe.uniform(3, scheme, layers=[last]).with_statics(offsets=offsets(biased))
    exact, cache = biased.new_cache(), biased.new_cache(Quantizer(recipe))
    biased.forward(IDS, exact)
    biased.forward(IDS, cache)
    angle = torch.arange(len(IDS))[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    bias = biased._layers[last].self_attn.k_proj.bias.detach().view(2, 1, 8)  # type: ignore[union-attr, operator]
    offset = rotate(bias.expand(2, len(IDS), 8), cos, sin)[None]
    expected = fake_quantize(exact.layers[last].keys - offset, Scheme(3)) + offset
    # A value halfway between levels may go to either, for the angles here are not bit for bit those of the model.
    off = (cache.layers[last].keys - expected).abs() > 1e-3
    assert off.float().mean() < 0.02
    assert torch.equal(cache.layers[last].values, fake_quantize(exact.layers[last].values, Scheme(3)))
    plain = biased.new_cache(Quantizer(Recipe.uniform(3, Scheme(3), layers=[last])))
    biased.forward(IDS, plain)
    error = lambda held: (held.layers[last].keys - exact.layers[last].keys).norm()  # noqa: E731
    assert error(cache) < error(plain) / 5


def test_center_in_padded_batches_and_token_by_token(biased: HFModel) -> None:
    """Offsets are turned to each token's own position, whatever its neighbours and padding."""
    recipe = Recipe.uniform(3, Scheme(3, transform="center")).with_statics(offsets=offsets(biased))
    for placement in (Placement(), Placement(residual=3), Placement(sinks=2)):
        prompts = [IDS[:5], IDS[3:25], IDS[:11]]

        def filled(ids: list[int], placement: Placement = placement):  # type: ignore[no-untyped-def]
            cache = biased.new_cache(Quantizer(recipe, placement))
            return cache, int(biased.forward(ids, cache)[-1].argmax())

        caches, first = zip(*map(filled, prompts), strict=True)
        together = biased.generate(caches, first, 6)
        for ids, response in zip(prompts, together, strict=True):
            cache, token = filled(ids)
            alone = [token]
            while len(alone) < len(response):
                alone.append(int(biased.forward(alone[-1:], cache)[-1].argmax()))
            assert alone == response
    stepwise, at_once = biased.new_cache(Quantizer(recipe)), biased.new_cache(Quantizer(recipe, prompt_tokens=9))
    biased.forward(IDS[:9], stepwise)
    for token in IDS[9:]:
        biased.forward([token], stepwise)
    biased.forward(IDS, at_once)
    torch.testing.assert_close(stepwise.layers[0].keys, at_once.layers[0].keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_key_biases(kind: str) -> None:
    """Zero input leaves the bias alone at the projection's output."""
    model = tiny_model(kind)
    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    seen = {}

    class Tap(Quantizer):
        def __call__(self, layer, site, x):  # type: ignore[no-untyped-def]
            seen[layer, site] = x
            return x

    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            if name.endswith(("k_proj.weight", "query_key_value.weight")):
                weight.zero_()
    model.forward(IDS, model.new_cache(Tap(Recipe.exact(3), Placement(where="projection"))))
    for (layer, site), bias in model.key_biases().items():
        torch.testing.assert_close(seen[layer, site], bias[None, :, None].expand_as(seen[layer, site]))
    assert len(model.key_biases()) == 3
    assert not tiny_model("llama").key_biases()
    assert not tiny_model("qwen3").key_biases()


def test_calibration_means_and_sizes(biased: HFModel) -> None:
    """Against the projections themselves, which no position has turned."""
    found = channel_statistics(biased, ["a b c", "hello there"])
    projected = []

    class Tap(Quantizer):
        def __call__(self, layer, site, x):  # type: ignore[no-untyped-def]
            if (layer, site) == (1, "k"):
                projected.append(x[0])
            return x

    for prompt in biased.encode(["a b c", "hello there"]):
        biased.forward(prompt.ids, biased.new_cache(Tap(Recipe.exact(3), Placement(where="projection"))))
    own = torch.cat(projected, dim=1)
    torch.testing.assert_close(found.mean[1, "k"], own.mean(1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.largest[1, "k"], own.abs().amax(1), atol=1e-3, rtol=1e-4)
    assert torch.equal(found.planes[1, "k"], halves(8))
    assert found.tokens == own.shape[1]
    with pytest.raises(InputError, match="prompts"):
        channel_statistics(biased, [])


def rotation(transform: str, size: int) -> np.ndarray:
    """What a transform does to unit vectors."""
    unit = torch.eye(size, dtype=torch.float64)[None, None]
    return np.asarray(frame(transform, None, unit).enter(unit)[0, 0])


@given(st.integers(1, 200))
def test_hadamard_is_scipys_in_blocks_of_any_size(size: int) -> None:
    for transform, most in (("hadamard", size), ("hadamard64", 64)):
        block = min(size & -size, most)
        wanted = np.kron(np.eye(size // block), hadamard(block)) / block**0.5
        found = rotation(transform, size)
        np.testing.assert_allclose(found, wanted, atol=1e-15)
        np.testing.assert_allclose(found @ found, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("transform", ["hadamard", "hadamard64", "rht"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_is_rotated_as_it_is_among_others(transform: str, dtype: torch.dtype) -> None:
    """To the last digit: on some processors a product with a matrix is not."""
    x = torch.randn(1, 2, 40, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    for turn in (frame(transform, None, x).enter, frame(transform, None, x).leave):
        assert torch.equal(turn(x), torch.cat([turn(x[:, :, n : n + 1]) for n in range(40)], 2))
        assert turn(x).dtype == dtype


@pytest.mark.parametrize("transform", ["hadamard", "rht"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotations_come_back(transform: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 64, dtype=dtype)
    found = frame(transform, None, x)
    torch.testing.assert_close(found.leave(found.enter(x)), x)


def test_hadamard_spreads_an_outlier() -> None:
    x = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(0))
    x[..., 3] += 60
    error = {
        t: (fake_quantize(x, Scheme.parse(t)) - x).norm()
        for t in ("int4-asym-token-head", "int4-asym-token-head+hadamard")
    }
    assert error["int4-asym-token-head+hadamard"] < error["int4-asym-token-head"] / 2


def test_equalize_folded_into_the_weights() -> None:
    """Factors in k_proj and v_proj and their inverse in q_proj and o_proj leave the logits alone; rounding what they then
    store is the cache-time transform."""
    plain, folded = tiny_model(), tiny_model()
    generator = torch.Generator().manual_seed(0)
    vectors = {
        (n, site): pair_factors(torch.rand(2, 8, generator=generator) * 9 + 0.1, halves(8) if site == "k" else None)
        for n in range(3)
        for site in ("k", "v")
    }
    with torch.no_grad():
        for n, layer in enumerate(folded._layers):
            per_key, per_value = vectors[n, "k"].flatten(), vectors[n, "v"].flatten()
            # Two query heads for each of keys and values.
            per_query, per_output = (vectors[n, site].repeat_interleave(2, dim=0).flatten() for site in ("k", "v"))
            layer.self_attn.v_proj.weight.div_(per_value[:, None])  # type: ignore[union-attr, operator]
            layer.self_attn.o_proj.weight.mul_(per_output)  # type: ignore[union-attr, operator]
            layer.self_attn.k_proj.weight.div_(per_key[:, None])  # type: ignore[union-attr, operator]
            layer.self_attn.q_proj.weight.mul_(per_query[:, None])  # type: ignore[union-attr, operator]
    torch.testing.assert_close(
        folded.forward(IDS, all_logits=True), plain.forward(IDS, all_logits=True), atol=1e-4, rtol=1e-4
    )
    recipe = Recipe.uniform(3, Scheme(8))
    timed = Recipe.uniform(3, Scheme(8, transform="equalize")).with_statics(
        factors=Statics.of("sizes", vectors)  # type: ignore[arg-type]
    )
    a, b = folded.new_cache(Quantizer(recipe)), plain.new_cache(Quantizer(timed))
    folded.forward(IDS, a)
    plain.forward(IDS, b)
    for site, name in (("k", "keys"), ("v", "values")):
        stored, expected = getattr(a.layers[0], name), getattr(b.layers[0], name)
        off = (stored * vectors[0, site][None, :, None] - expected).abs() > 1e-4
        assert off.float().mean() < 0.01  # ties


@given(st.integers(1, 3), st.sampled_from([0, 4, 8]), st.integers(0, 100))
def test_pair_factors_commute_with_rotation(heads: int, rotary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = pair_factors(torch.rand(heads, 8, generator=generator), halves(rotary))
    torch.testing.assert_close(factors.log().mean(1), torch.zeros(heads), atol=1e-5, rtol=0)
    if rotary:
        k = torch.randn(1, heads, 5, 8, generator=generator)
        angle = torch.randn(5, rotary // 2, generator=generator).repeat(1, 2)
        turned = rotate(k * factors[:, None], angle.cos(), angle.sin())
        torch.testing.assert_close(turned, rotate(k, angle.cos(), angle.sin()) * factors[:, None])


def test_statics_are_equal_by_name_and_content() -> None:
    a, b = ({(0, "k"): torch.full((1, 2), value)} for value in (1.0, 2.0))
    one = Statics.of("x", a)  # type: ignore[arg-type]
    assert one == Statics.of("x", {(0, "k"): torch.ones(1, 2)})
    assert hash(one) == hash(Statics.of("x", {(0, "k"): torch.ones(1, 2)}))
    assert one != Statics.of("x", b)  # type: ignore[arg-type]
    recipe = Recipe.uniform(2, Scheme(4, transform="center")).with_statics(offsets=one)
    assert recipe.keep([0]).offsets == one
    assert str(recipe) == f"int4-asym-token+center (offsets x {one.fingerprint[:8]})"
    assert recipe.keep_ends(1, 1) == recipe.keep([0, 1])


def test_what_is_missing_is_said(biased: HFModel) -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InputError, match="with_statics"):
        fake_quantize(x, Scheme(4, transform="center"))
    with pytest.raises(InputError, match="offsets"):
        Quantizer(Recipe.uniform(3, Scheme(4, transform="center")))(0, "k", x)
    with pytest.raises(InputError, match="factors"):
        Quantizer(Recipe.uniform(3, Scheme(4, transform="equalize")))(0, "k", x)
    with pytest.raises(InputError, match="rotary"):
        Quantizer(Recipe.uniform(3, Scheme(4, transform="center")).with_statics(offsets=offsets(biased)))(0, "k", x)
    with pytest.raises(InputError, match="has none"):
        Statics.of("key bias", {})
    with pytest.raises(InputError, match="finite"):
        Statics.of("key bias", {(0, "k"): torch.full((1, 2), torch.nan)})


@pytest.mark.parametrize("backend", ["lens", "nnsight"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
def test_center_under_other_backends(kind: str, backend: str) -> None:
    """They too say how positions turn the keys that come."""
    held = []
    for name in ("hf", backend):
        hf_model = tiny_hf_model(kind)
        hf_model.set_attn_implementation("eager")  # as TransformerLens runs it: kernels differ in the last digit
        with torch.no_grad():
            for weight_name, weight in hf_model.named_parameters():
                if weight_name.endswith("bias"):
                    weight.copy_(5 * torch.linspace(-1, 1, weight.numel()).view_as(weight))
        model = kvgeom.load(hf_model, tokenizer=tiny_tokenizer(), backend=name)
        statics = Statics.of("key bias", model.key_biases(), rotary=True)  # type: ignore[attr-defined]
        recipe = Recipe.uniform(3, Scheme(8, transform="center")).with_statics(offsets=statics)
        cache = model.new_cache(Quantizer(recipe))
        model.forward(IDS, cache)
        held.append(cache.layers[0].keys)
    # Values halfway between levels may fall to either side.
    assert ((held[0] - held[1]).abs() > 1e-4).float().mean() < 0.01
