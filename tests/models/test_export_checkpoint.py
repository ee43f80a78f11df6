"""Transforms in the weights: the same logits, the same rounded cache, and a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kvgeom
from kvgeom.errors import InputError, ModelError
from kvgeom.models import edits
from kvgeom.models.checkpoint import MARK, fold, plain, save_checkpoint, unrotated
from kvgeom.models.hf import HFModel
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics, pair_factors
from tests.builders.rotary import halves, rotate
from tests.builders.tiny import KINDS, tiny_config, tiny_hf_model, tiny_model, tiny_tokenizer

IDS = [1, *range(40, 70), 12, 9, 200]
#: Classes whose output projection can have a bias that a checkpoint keeps.
BIASED = ("llama", "qwen3", "gemma3_text", "gpt_neox")
SHARED_GAIN = ("qwen3", "gemma3_text")
ROTARY = {"gpt_neox": 2}
GRIDS = ["int8-asym-token", "int4-sym-channel", "int5-asym-group8/f16", "int6-asym-token-head"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> HFModel:
    """In float64, where what two ways of computing the same differ by moves no value to another code."""
    hf = tiny_hf_model(request.param).double()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1)) if name.endswith("bias") else None
    return HFModel(hf, tiny_tokenizer(), name=f"tiny-{request.param}")


def kind(model: HFModel) -> str:
    return model.name.removeprefix("tiny-")


def vectors(model: HFModel, seed: int) -> tuple[Statics, Statics]:
    """Offsets that can be folded, and factors in pairs, equal in heads that share the gain of a norm."""
    g, generator = model.geometry, torch.Generator().manual_seed(seed)
    rotated = ROTARY.get(kind(model), g.head_dim)
    offsets: dict[Any, torch.Tensor] = {}
    factors: dict[Any, torch.Tensor] = {}
    for layer in range(g.layers):
        offsets[layer, "k"] = 3 * torch.randn(g.kv_heads, g.head_dim, generator=generator)
        offsets[layer, "k"][:, :rotated] = 0
        offsets[layer, "v"] = 3 * torch.randn(g.kv_heads, g.head_dim, generator=generator)
        for site in ("k", "v"):
            sizes = torch.rand(g.kv_heads, g.head_dim, generator=generator) * 9 + 0.1
            if site == "k" and kind(model) in SHARED_GAIN:
                sizes = sizes[:1].expand_as(sizes)
            factors[layer, site] = pair_factors(sizes, halves(rotated) if site == "k" else None)
    return Statics.of("offsets", offsets, rotary=True), Statics.of("factors", factors)


@st.composite
def transforms(draw: st.DrawFn) -> list[tuple[str, str]]:
    """For each layer, what is done to keys and to values."""
    keys = st.sampled_from(["none", "equalize", "center"])
    values = st.sampled_from(["none", "equalize", "center", "hadamard", "hadamard64", "rotation", "rht"])
    return draw(st.lists(st.tuples(keys, values), min_size=3, max_size=3))


def recipe_of(model: HFModel, grid: str, chosen: list[tuple[str, str]], seed: int) -> Recipe:
    layers: list[Any] = []
    for k, v in chosen:
        k = "none" if k == "center" and kind(model) != "gpt_neox" else k
        v = "none" if v == "center" and kind(model) not in BIASED else v
        layers.append(tuple(Scheme.parse(grid if t == "none" else f"{grid}+{t}") for t in (k, v)))
    offsets, factors = vectors(model, seed)
    return Recipe(tuple(layers)).with_statics(offsets=offsets, factors=factors)


def rounded(model: HFModel, recipe: Recipe, placement: Placement) -> torch.Tensor:
    cache = model.new_cache(Quantizer(recipe, placement))
    return torch.stack([model.forward(ids, cache)[-1] for ids in (IDS, [44], [12])])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(GRIDS), transforms(), st.integers(0, 2**31), st.sampled_from([Placement(), Placement(residual=3)])
)
def test_folded_models_compute_and_round_the_same(
    model: HFModel, grid: str, chosen: list[tuple[str, str]], seed: int, placement: Placement
) -> None:
    recipe = recipe_of(model, grid, chosen, seed)
    folded = fold(model, recipe)
    torch.testing.assert_close(
        folded.forward(IDS, all_logits=True), model.forward(IDS, all_logits=True), atol=1e-4, rtol=1e-4
    )
    bare = plain(recipe)
    assert {scheme.transform for pair in bare for scheme in pair if scheme} == {"none"}
    assert (bare.offsets, bare.factors) == (None, None)
    # Gemma's norms compute in float32 whatever the model does, so that a value halfway between codes may get either one.
    close = 5e-2 if kind(model) == "gemma3_text" else 1e-4
    torch.testing.assert_close(
        rounded(folded, bare, placement), rounded(model, recipe, placement), atol=close, rtol=1e-4
    )


@pytest.mark.parametrize("transform", ["equalize", "hadamard"])
def test_a_fold_changes_what_is_rounded(model: HFModel, transform: str) -> None:
    """The comparison above would hold of a fold that does nothing, were the transform nothing too."""
    recipe = recipe_of(model, "int4-asym-token", [("none", transform)] * 3, 0)
    apart = rounded(model, plain(recipe), Placement()) - rounded(fold(model, recipe), plain(recipe), Placement())
    assert float(apart.abs().max()) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_plain_transformers_loads_it(name: str, tmp_path: Path) -> None:
    """In float32, without kvgeom and without code of its own; logits are of order 1 to 10."""
    model = tiny_model(name)
    center = "center" if name in BIASED else "none"
    recipe = recipe_of(
        model, "int4-asym-token", [("equalize", center), ("none", "hadamard"), ("equalize", "equalize")], 5
    )
    folder = save_checkpoint(fold(model, recipe), tmp_path / "made", ["equalize of keys", "some of values"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    assert type(loaded) is type(model.hf_model)
    with torch.inference_mode():
        ours, theirs = (each(torch.tensor([IDS])).logits for each in (model.hf_model, loaded))
    assert 0.3 < float(ours.std()) < 30
    torch.testing.assert_close(theirs, ours, atol=1e-4 * max(1.0, float(ours.abs().max())), rtol=0)
    assert not any("custom" in path.name or path.suffix == ".py" for path in folder.iterdir())
    assert list(folder.glob("*.safetensors"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == model.template
    again = kvgeom.load(folder, progress=False)
    assert again.encode(["a b"])[0].ids == model.encode(["a b"])[0].ids
    about = json.loads((folder / MARK).read_text(encoding="utf-8"))
    assert about["transforms"] == ["equalize of keys", "some of values"]


def test_a_checkpoint_with_another_precision_and_template(tmp_path: Path) -> None:
    model = tiny_model()
    own = HFModel(model.hf_model, model.tokenizer, name="tiny", template="{{ messages[0].content }}")
    folder = save_checkpoint(own, tmp_path / "half", dtype=torch.bfloat16)
    assert AutoTokenizer.from_pretrained(folder).chat_template == own.template
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    for name, weight in model.hf_model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.to(torch.bfloat16))


def test_offsets_of_values_need_a_class_with_that_bias() -> None:
    for name in sorted(set(KINDS) - set(BIASED)):
        model = tiny_model(name)
        offsets = Statics.of("o", {(0, "v"): torch.ones(model.geometry.kv_heads, model.geometry.head_dim)})
        recipe = Recipe.uniform(3, Scheme.parse("int4-asym-token+center")).with_statics(offsets=offsets)
        with pytest.raises(ModelError, match=r"o_proj\.bias"):
            fold(model, recipe)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    model = tiny_model()
    folder = save_checkpoint(model, tmp_path / "deep" / "made", ["first"])
    stale = json.loads((folder / MARK).read_text(encoding="utf-8"))
    save_checkpoint(model, folder, ["second"])
    now = json.loads((folder / MARK).read_text(encoding="utf-8"))
    assert (stale["transforms"], now["transforms"]) == (["first"], ["second"])
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"notes\.txt"):
        save_checkpoint(model, folder)
    other = tmp_path / "other"
    tiny_hf_model().save_pretrained(other)
    before = sorted(other.iterdir())
    with pytest.raises(InputError, match="save_checkpoint"):
        save_checkpoint(model, other)
    assert sorted(other.iterdir()) == before
    with pytest.raises(InputError, match="is a file"):
        save_checkpoint(model, folder / "notes.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (save_checkpoint(model, empty) / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "other"]


# --- what cannot be folded, and why ---


def angles(positions: torch.Tensor, rotated: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the definition of rotary embedding, in float64."""
    frequencies = 10000.0 ** (-torch.arange(rotated // 2).double() * 2 / max(rotated, 1))
    angle = positions.double()[:, None] * frequencies
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0, 2, 4, 8]))
def test_what_an_offset_of_keys_does_to_scores(seed: int, rotated: int) -> None:
    """Query m and key n: an offset b before rotation adds q . R(n - m) b, the same for all n only if b is not rotated."""
    generator = torch.Generator().manual_seed(seed)
    q, k, b = (torch.randn(12, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    b = b[:1].expand(12, -1).clone()
    turned = [rotate(x, *angles(torch.arange(12), rotated)) for x in (q, k, k + b)]
    added = turned[0] @ turned[2].T - turned[0] @ turned[1].T
    for m, n in ((0, 5), (3, 8), (11, 2)):
        alone = rotate(b[:1], *angles(torch.tensor([n - m]), rotated))[0]
        torch.testing.assert_close(added[m, n], q[m] @ alone)
    seen = added - added[:, :1]  # softmax does not see what is the same for all keys of a query
    if rotated:
        assert float(seen.abs().max()) > 1e-2
    else:
        torch.testing.assert_close(seen, torch.zeros_like(seen), atol=1e-9, rtol=0)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]))
def test_what_no_change_of_queries_or_biases_undoes(seed: int, rotated: int) -> None:
    """Any other query vector and key bias, at best: what an offset adds is not among what they can add for all keys.

    For keys that differ freely, equal scores for all of them need the same query; then the biases must agree, but for
    what is the same at all distances.
    """
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    q = 0.5 + torch.rand(8, generator=generator, dtype=torch.float64)  # some of every pair
    distances = torch.arange(-4000, 4000, 37)
    unit = torch.eye(8, dtype=torch.float64)[:, None].expand(-1, len(distances), -1)
    can = rotate(unit, *angles(distances, rotated)) @ q  # what each entry of a bias adds, [8, distances]
    added = rotate(b.expand(len(distances), -1), *angles(distances, rotated)) @ q
    seen = (can - can.mean(1, keepdim=True)).numpy()
    np.testing.assert_allclose(seen[rotated:], 0, atol=1e-9)
    weights, *_ = np.linalg.lstsq(seen[:rotated].T, (added - added.mean()).numpy())
    np.testing.assert_allclose(weights, b[:rotated].numpy(), atol=1e-6)


def test_the_key_bias_of_a_rotated_model_is_no_constant_of_attention() -> None:
    """Taking it away changes the logits, whether centers are folded or not; taking values' offset away does not."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        for layer in model._layers:
            layer.self_attn.k_proj.bias.normal_(std=3)  # type: ignore[union-attr, operator]
    logits = model.forward(IDS, all_logits=True)
    bare = edits.copied(model)
    with torch.no_grad():
        for layer in bare._layers:
            layer.self_attn.k_proj.bias.zero_()  # type: ignore[union-attr, operator]
    assert float((bare.forward(IDS, all_logits=True) - logits).abs().max()) > 0.1
    bias = Statics.of("key bias", model.key_biases(), rotary=True)
    recipe = Recipe.uniform(3, Scheme.parse("int4-asym-token+center"), sites=["k"]).with_statics(offsets=bias)
    with pytest.raises(ModelError, match="8 of 8 channels"):
        fold(model, recipe)


def test_the_unrotated_part_of_an_offset() -> None:
    model = tiny_model("gpt_neox")
    g = model.geometry
    mean = Statics.of("mean", {(1, site): torch.full((g.kv_heads, 8), 2.0) for site in ("k", "v")}, rotary=True)  # type: ignore[misc]
    recipe = Recipe.uniform(3, Scheme.parse("int4-asym-token+center")).with_statics(offsets=mean)
    with pytest.raises(ModelError, match="2 of 8 channels"):
        fold(model, recipe)
    part = unrotated(model, mean)
    assert part.vectors[1, "k"][0].tolist() == [0.0] * 2 + [2.0] * 6
    assert torch.equal(part.vectors[1, "v"], mean.vectors[1, "v"])
    folded = fold(model, recipe.with_statics(offsets=part))
    held = []
    for each in (model, folded):
        cache = each.new_cache()
        each.forward(IDS, cache)
        held.append((cache.layers[1].keys, cache.layers[1].values))
    torch.testing.assert_close(held[1][0], held[0][0] - part.vectors[1, "k"][None, :, None], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(held[1][1], held[0][1] - 2.0, atol=1e-3, rtol=1e-4)


def test_what_cannot_be_folded_is_said() -> None:
    model = tiny_model()
    rotated = Recipe.uniform(3, Scheme.parse("int4-asym-token+hadamard"))
    with pytest.raises(ModelError, match="does not commute"):
        fold(model, rotated)
    values = fold(model, rotated, sites=["v"])
    left = plain(rotated, sites=["v"])
    assert {str(k) for k, _ in left} == {"int4-asym-token+hadamard"}
    assert {str(v) for _, v in left} == {"int4-asym-token"}
    assert values.fingerprint != model.fingerprint
    with pytest.raises(InputError, match="has 3 layers"):
        fold(model, Recipe.uniform(2, Scheme(4)))
    with pytest.raises(InputError, match="with_statics"):
        fold(model, Recipe.uniform(3, Scheme.parse("int4-asym-token+equalize")))
    with pytest.raises(InputError, match="some channels"):
        fold(model, Recipe.uniform(3, Scheme.parse("int4-asym-token+hadamard@0-3"), sites=["v"]))
    unpaired = Statics.of("f", {(0, "k"): torch.arange(1.0, 17).view(2, 8)})
    with pytest.raises(InputError, match="rotary pair"):
        fold(model, Recipe.uniform(3, Scheme.parse("int4-asym-token+equalize")).with_statics(factors=unpaired))


def test_the_pairs_of_a_model_are_its_own() -> None:
    """GLM turns neighbouring channels together, so that pairs of halves are the wrong ones."""
    torch.manual_seed(0)
    config = tiny_config("llama") | {"head_dim": 8}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm", **config)).float().eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(10.0) if weight.ndim > 1 else None
    model = HFModel(hf, tiny_tokenizer(), name="tiny-glm")
    sizes = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) * 20 + 0.05

    def recipe(planes: torch.Tensor) -> Recipe:
        factors = Statics.of("f", {(n, "k"): pair_factors(sizes, planes) for n in range(3)})  # type: ignore[misc]
        return Recipe.uniform(3, Scheme.parse("int4-asym-token+equalize")).with_statics(factors=factors)

    own = edits.rotary_planes(model, 0)
    folded, exact = fold(model, recipe(own)), model.new_cache()
    logits = model.forward(IDS, exact, all_logits=True)
    cache = folded.new_cache()
    torch.testing.assert_close(folded.forward(IDS, cache, all_logits=True), logits, atol=1e-3, rtol=1e-3)
    factors = pair_factors(sizes, own)
    torch.testing.assert_close(
        cache.layers[0].keys[0] * factors[:, None], exact.layers[0].keys[0], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(InputError, match="channels 0 and 1"):
        fold(model, recipe(halves(own.numel())))


def test_a_class_that_would_lose_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    edits.offset_values(model, 0, torch.ones(2, 8))
    with pytest.raises(ModelError, match="would not load"):
        save_checkpoint(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    wrapped = kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer(), backend="nnsight")
    with pytest.raises(ModelError, match="backend='hf'"):
        fold(wrapped, Recipe.uniform(3, Scheme(4)))  # type: ignore[arg-type]
