"""Geometry takes the recipes that behaviour takes, and rounds as the cache does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.geometry.activations import tokens_at
from kvgeom.geometry.attention import attention_error
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.channels import stored
from kvgeom.geometry.rounding import Rounding
from kvgeom.models import statistics
from kvgeom.models.hf import HFModel
from kvgeom.models.reading import read
from kvgeom.models.statistics import constants, with_constants
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_model

CENTER = "int3-asym-tensor+center"
R = (7, 40, 41)


#: Biases are set by hand in models that are loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*was changed since it was loaded")


@pytest.fixture(scope="module")
def biased() -> HFModel:
    """A model whose keys are mostly bias: heads of 8 channels, rotary embedding of base 10,000."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            if name.endswith("k_proj.bias"):
                weight.normal_(std=20.0, generator=torch.manual_seed(len(name)))
    return model


@pytest.fixture(scope="module")
def space(biased: HFModel) -> kvgeom.geometry.subspace.Subspace:  # type: ignore[name-defined]
    return kvgeom.subspace(biased, PAIRS, progress=False)


def rotated(x: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """``x [heads, tokens, 8]`` rotated by the positions 0, 1, ...: the definition of rotary embedding, in halves."""
    angle = sign * np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(4) / 4)
    a, b = x[..., :4], x[..., 4:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def int3_asymmetric(x: np.ndarray) -> np.ndarray:
    """Eight levels from the smallest to the largest entry."""
    step = (x.max() - x.min()) / 7
    return x.min() + step * np.round((x - x.min()) / step)


@pytest.mark.parametrize("layer", [1, 2])
def test_ratio_of_centred_keys_by_hand(biased: HFModel, space, layer: int) -> None:  # type: ignore[no-untyped-def]
    position = space.directions[layer, "k"].position
    bias = biased._layers[layer].self_attn.k_proj.bias.detach().double().numpy().reshape(2, 1, 8)  # type: ignore[union-attr, operator]
    vectors: dict[str, list[np.ndarray]] = {"harmful": [], "harmless": []}
    errors = []
    for kind, found in vectors.items():
        for prompt in biased.encode(getattr(PAIRS, kind)):
            cache = biased.new_cache()
            biased.forward(prompt.ids, cache)
            x = cache.layers[layer].keys[0].double().numpy()
            offset = rotated(np.broadcast_to(bias, x.shape))
            e = int3_asymmetric(x - offset) + offset - x
            flat = [
                rotated(y, -1).transpose(1, 0, 2).reshape(len(prompt), -1)[tokens_at(prompt, position)] for y in (x, e)
            ]
            found.append(flat[0])
            errors.append(flat[1])
    gap = np.mean([x.mean(0) for x in vectors["harmful"]], 0) - np.mean([x.mean(0) for x in vectors["harmless"]], 0)
    x, e = np.concatenate([*vectors["harmful"], *vectors["harmless"]]), np.concatenate(errors)
    u = gap / np.linalg.norm(gap)
    expected = np.mean((e @ u) ** 2) / ((gap @ u) ** 2 / 4) / (np.sum(e**2) / np.sum(x**2))
    found = space.sensitivity(CENTER, contrasts=(), progress=False).data.sel(layer=layer, site="k")
    assert float(found.ratio_plugin) == pytest.approx(expected, rel=0.02)
    assert float(found.nsr_full) == pytest.approx(np.sum(e**2) / np.sum(x**2), rel=0.02)


def test_centring_takes_the_bias_out_of_the_error(space) -> None:  # type: ignore[no-untyped-def]
    plain, centred = (space.sensitivity(s, contrasts=(), progress=False) for s in ("int3-asym-tensor", CENTER))
    keys = {name: found.data.nsr_full.sel(site="k") for name, found in (("plain", plain), ("centred", centred))}
    assert (keys["centred"] < keys["plain"] / 5).all()
    np.testing.assert_array_equal(plain.data.ratio_low.sel(site="resid"), centred.data.ratio_low.sel(site="resid"))
    assert "key bias" in centred.meta["recipe"]
    before = stored(space, 1, "k", "int3-asym-tensor")
    after = stored(space, 1, "k", CENTER)
    assert float(((after.after - after.before) ** 2).sum()) < float(((before.after - before.before) ** 2).sum()) / 20


@pytest.mark.parametrize("transform", ["center", "equalize", "hadamard"])
def test_specs_that_mean_the_same_give_the_same(space, transform: str) -> None:  # type: ignore[no-untyped-def]
    text = f"int3-asym-token+{transform}"
    scheme = Scheme.parse(text)
    same = [
        space.sensitivity(spec, contrasts=(), progress=False).data
        for spec in (text, scheme, resolve(text), Recipe.uniform(3, scheme))
    ]
    for other in same[1:]:
        assert other.identical(same[0])


def test_what_a_recipe_leaves_exact_has_no_ratio(space) -> None:  # type: ignore[no-untyped-def]
    scheme = Scheme(3, True, "tensor")
    pairs = ((scheme, scheme), (None, scheme), (scheme, None))
    part, whole = (space.sensitivity(spec, contrasts=[PAIRS], progress=False).data for spec in (Recipe(pairs), scheme))
    exact = [(1, "k"), (1, "resid"), (2, "v")]
    for layer in range(3):
        for site in ("k", "v", "resid"):
            a, b = (one.sel(layer=layer, site=site) for one in (part, whole))
            if (layer, site) in exact:
                assert a.status == "undefined"
                assert "exact" in str(a.reason.values)
                assert np.isnan(a.ratio)
                assert np.isnan(a.ratio_low)
                assert np.isnan(a.contrast_ratio).all()
            else:
                np.testing.assert_array_equal(a.ratio_low, b.ratio_low)
    assert np.isnan(part.head_ratio.sel(layer=1, kv="k")).all()


def test_presets_keep_their_placement(biased: HFModel, space) -> None:  # type: ignore[no-untyped-def]
    found = space.sensitivity("kivi", contrasts=(), progress=False)
    assert found.meta["placement"] == str(resolve("kivi").placement)
    assert found.meta["scheme"] == resolve("kivi").stored
    projected = kvgeom.subspace(biased, PAIRS, placement=Placement.paper(), progress=False)
    with pytest.raises(InputError, match="kivi"):
        projected.sensitivity("kivi")
    with pytest.raises(InputError, match="kivii"):
        space.sensitivity("kivii")
    with pytest.raises(InputError, match="3 layers"):
        space.sensitivity(Recipe.uniform(2, Scheme(3)))


PLACEMENTS = (
    Placement(),
    Placement.paper(),
    Placement(sinks=3),
    Placement(prefill_reads="last"),
    Placement(prefill_reads="last", scales="call", sinks=2),
    Placement(residual=5, sinks=2),
    Placement(residual=4, flush="all"),
)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize(
    "spec", [CENTER, "int3-asym-channel+center", "int3-sym-tensor+equalize", "int4-asym-token+hadamard"]
)
def test_rounds_what_the_cache_rounds(biased: HFModel, placement: Placement, spec: str) -> None:
    """In layer 0, which sees the same input whatever is rounded; up to tokens that still wait in full precision."""
    rounding = Rounding.of(biased, spec, placement)
    (prompt,) = biased.encode(["burn it all down"])
    taken: dict[str, torch.Tensor] = {}

    class Watched(Quantizer):
        def __call__(self, layer, site, x):  # type: ignore[no-untyped-def]
            rounded = super().__call__(layer, site, x)
            if layer == 0:
                taken[site] = torch.cat([taken[site], rounded], 2) if site in taken else rounded
            return rounded

    cache = biased.new_cache(Watched(rounding.recipe, placement))
    biased.forward(prompt.ids, cache)
    exact = next(read(biased, prompt, placement.where))
    settled = len(prompt)
    if placement.residual and placement.flush == "oldest":
        blocks = (len(prompt) - placement.sinks) // placement.residual * placement.residual
        spans = Scheme.parse(spec).spans_tokens
        settled = placement.sinks + blocks if spans else len(prompt) - placement.residual
    for site, x in (("k", exact.k), ("v", exact.v)):
        ours = rounding(0, site, x, exact.rotation if site == "k" else None)  # type: ignore[arg-type]
        theirs = (
            taken[site]
            if placement.where == "projection"
            else getattr(cache.layers[0], {"k": "keys", "v": "values"}[site])
        )
        torch.testing.assert_close(ours[:, :, :settled], theirs[:, :, :settled])
        assert torch.equal(ours[:, :, : placement.sinks], x[:, :, : placement.sinks])
        assert not torch.equal(ours, x)


def test_constants_that_schemes_share_are_measured_once(biased: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = ["int3-sym-tensor+equalize", "int4-asym-token+equalize", "int4-asym-token"]
    apart = [Rounding.of(biased, spec) for spec in specs]
    passes: list[int] = []
    monkeypatch.setattr(statistics, "channel_statistics", _counted(statistics.channel_statistics, passes))
    assert Rounding.each(biased, specs) == apart
    assert len(passes) == 1


def _counted(function, calls: list[int]):  # type: ignore[no-untyped-def]
    def counting(*given):  # type: ignore[no-untyped-def]
        calls.append(1)
        return function(*given)

    return counting


def test_constants_are_measured_where_they_are_needed(biased: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b c", "hello there"]
    known = constants(biased, texts)
    plain = Recipe.uniform(3, Scheme(3))
    both = Recipe.uniform(3, Scheme(3, transform="center"))
    assert with_constants(biased, both, texts).offsets == known.both
    sizes = with_constants(biased, Recipe.uniform(3, Scheme(3, transform="equalize")), texts)
    assert (sizes.offsets, sizes.factors) == (None, known.factors)
    monkeypatch.setattr(type(biased), "forward", None)
    assert with_constants(biased, plain, texts) is plain
    keys = Recipe.uniform(3, Scheme(3, transform="center"), sites=["k"], layers=[1])
    assert with_constants(biased, keys, texts).offsets == known.keys
    own = both.with_statics(offsets=Statics.of("mine", {(0, "k"): torch.ones(2, 8)}, rotary=True))
    assert with_constants(biased, own, texts) is own


def test_means_are_measured_where_there_is_no_bias() -> None:
    model = tiny_model("llama")
    texts = ["a b c", "hello there"]
    keys = Recipe.uniform(3, Scheme(3, transform="center"), sites=["k"])
    found = with_constants(model, keys, texts).offsets
    assert found == constants(model, texts).keys
    assert found is not None
    assert found.name == "mean key"


def test_first_order_of_centred_keys() -> None:
    """At 8 bits, against patching."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            weight.mul_(0.2) if weight.ndim > 1 else None
            weight.normal_(generator=torch.manual_seed(1)) if name.endswith("k_proj.bias") else None
    prompts = model.encode(PAIRS.harmful)
    spec = "int8-sym-token+center"
    estimate = first_order(model, prompts, spec, R, progress=False)
    exact = patch_layers(model, prompts, spec, R, progress=False)
    ours, theirs = estimate.by_layer.values, exact.margin_drop.sel(scheme=spec).values
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, atol=0.1 * np.abs(theirs).max())


def test_attention_and_patching_take_recipes(biased: HFModel) -> None:
    prompts = biased.encode(PAIRS.harmful[:2])
    scheme = Scheme(3, True, "tensor")
    half = attention_error(biased, prompts, Recipe.uniform(3, scheme, sites=["v"], layers=[1]), progress=False).data
    assert (half.key_mse == 0).all()
    assert (half.score_error == 0).all()
    assert (half.value_mse.sel(layer=[0, 2]) == 0).all()
    whole = attention_error(biased, prompts, "int3-sym-tensor", progress=False).data
    np.testing.assert_array_equal(half.value_mse.sel(layer=1), whole.value_mse.sel(layer=1))
    centred = attention_error(biased, prompts, CENTER, progress=False).by_layer()
    uncentred = attention_error(biased, prompts, "int3-asym-tensor", progress=False).by_layer()
    assert (centred.key_mse < uncentred.key_mse / 5).all()
    with pytest.raises(InputError, match="projection"):
        attention_error(biased, prompts, scheme, placement="paper")
    patched = patch_layers(biased, prompts, [CENTER, "lmdeploy-int4"], R, progress=False)
    assert list(patched.data.scheme.values) == [CENTER, "lmdeploy-int4"]
    with pytest.raises(InputError, match="kivi"):
        patch_layers(biased, prompts, ["lmdeploy-int4", "kivi"], R)
