"""The cache for transformers' own generate: the tokens of kvgeom's passes, and the bytes of the accounting."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvgeom.engines import transformers as export
from kvgeom.errors import InputError
from kvgeom.models.decoder import find_decoder
from kvgeom.models.hf import HFModel
from kvgeom.models.packed import PackedCache, quantized_cache
from kvgeom.models.rotary import RotaryEmbedding
from kvgeom.models.statistics import channel_statistics
from kvgeom.quant.memory import cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.serialization import load_recipe, save_recipe
from kvgeom.quant.transforms import Statics, pair_factors
from tests.builders.tiny import KINDS, tiny_config, tiny_hf_model, tiny_model, tiny_tokenizer

IDS = [1, *range(40, 70)]
NEW = 12
WAITING = Placement(residual=5, sinks=2, prefill_reads="exact")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> HFModel:
    return shifted(tiny_model(request.param))


def shifted(model: HFModel) -> HFModel:
    """With large biases, where there are any, so that an offset matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.hf_model.named_parameters():
            if name.endswith("bias") and ("k_proj" in name or "query_key_value" in name):
                weight.copy_(8 * torch.randn(weight.shape, generator=generator))
    return model


def statics(model: HFModel) -> dict[str, Statics]:
    seen = channel_statistics(model, ["a b c", "hello there", "what is this?"])
    factors = {key: pair_factors(x, seen.planes.get(key)) for key, x in seen.largest.items()}
    return {
        "offsets": Statics.of("mean", seen.mean, rotary=any(map(len, seen.planes.values()))),
        "factors": Statics.of("sizes", factors),  # type: ignore[arg-type]
    }


def recipes(model: HFModel) -> dict[str, Recipe]:
    center, group = Scheme.parse("int4-asym-token+center"), Scheme.parse("int4-asym-group8/f16")
    rotated = Scheme.parse("int5-sym-token-head+hadamard")
    mixed = Recipe(((None, None), (center, group), (Scheme.parse("int3-asym-group16+center"), None)))
    fixed = statics(model)
    return {
        "center": Recipe.uniform(3, center).with_statics(**fixed),
        "mixed": mixed.with_statics(**fixed),
        "channel": Recipe.uniform(3, Scheme.parse("int4-sym-channel+center")).keep([1]).with_statics(**fixed),
        "equalize": Recipe.uniform(3, Scheme.parse("int6-asym-token+equalize")).with_statics(**fixed),
        "rotated": Recipe(((rotated, center), (center, rotated), (group, group))).with_statics(**fixed),
    }


def ours(model: HFModel, recipe: Recipe, placement: Placement) -> list[int]:
    """Greedy tokens of kvgeom's own path."""
    cache = model.new_cache(Quantizer(recipe, placement))
    first = int(model.forward(IDS, cache)[-1].argmax())
    return model.generate([cache], [first], NEW)[0]


def theirs(hf_model: Any, cache: PackedCache) -> list[int]:
    """Greedy tokens of transformers' own generate."""
    output = hf_model.generate(
        torch.tensor([IDS]), past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return [token for token in output[0, len(IDS) :].tolist() if token != 2]


@pytest.mark.parametrize(
    ("which", "placement"),
    [*((name, Placement()) for name in ("center", "mixed", "channel", "equalize", "rotated")), ("mixed", WAITING)],
)
def test_plain_generate_has_the_tokens_of_our_own_path(model: HFModel, which: str, placement: Placement) -> None:
    recipe = recipes(model)[which]
    cache = quantized_cache(model.hf_model, recipe, placement)
    assert theirs(model.hf_model, cache) == ours(model, recipe, placement)
    g = model.geometry
    fed = cache.get_seq_length() - len(IDS)
    assert cache.nbytes == cache_bytes(recipe, placement, g.kv_heads, g.head_dim, len(IDS), fed, exact_bytes=4)


def test_it_stores_what_our_own_pass_stores(model: HFModel) -> None:
    """Keys and values of every layer and token, bit for bit, with no hook left in the model."""
    recipe = recipes(model)["center"]
    packed, simulated = quantized_cache(model, recipe), model.new_cache(Quantizer(recipe))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()]
    assert not any(hooks)
    with torch.inference_mode():
        for ids in (IDS, [44], [12]):
            logits = model.hf_model(torch.tensor([ids]), past_key_values=packed, logits_to_keep=1).logits[0]
            assert torch.equal(logits, model.forward(ids, simulated))
    for mine, known in zip(packed.layers, simulated.layers, strict=True):
        assert torch.equal(mine.stores["k"].values(), known.keys)  # type: ignore[attr-defined]
        assert torch.equal(mine.stores["v"].values(), known.values)  # type: ignore[attr-defined]


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    },
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_rotary_embeddings_that_change_with_length(kind: str) -> None:
    """The prompt is shorter than the original context, what follows is longer."""
    limit = 32 if kind == "dynamic" else 512
    config = tiny_config("llama") | {"rope_parameters": ROPES[kind], "max_position_embeddings": limit}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).float().eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(10.0) if weight.ndim > 1 else None
    model = HFModel(hf, tiny_tokenizer(), name=kind, template="{{ messages[0].content }}")  # a short one for 32 tokens
    offsets = Statics.of("any", {(n, "k"): torch.randn(2, 8) for n in range(3)}, rotary=True)  # type: ignore[misc]
    recipe = Recipe.uniform(3, Scheme.parse("int3-asym-token+center"), sites=["k"]).with_statics(offsets=offsets)
    assert theirs(hf, quantized_cache(hf, recipe)) == ours(model, recipe, Placement())


def test_a_conversation_goes_on_in_the_same_cache(model: HFModel) -> None:
    recipe = recipes(model)["center"]
    cache, simulated = quantized_cache(model, recipe), model.new_cache(Quantizer(recipe))
    with torch.inference_mode():
        for ids in (IDS, IDS[4:13], [9]):
            logits = model.hf_model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0]
            assert torch.equal(logits, model.forward(ids, simulated))


def test_each_layer_type_has_its_own_rotation() -> None:
    """gemma3: sliding and full layers turn by different angles; the definition, computed here."""
    model = tiny_model("gemma3_text", layers=6)
    config = model.hf_model.config
    rotary = RotaryEmbedding(model.hf_model, find_decoder(model.hf_model, "tiny"))
    vector, keys = torch.randn(2, 8), torch.zeros(1, 2, 3, 8)
    assert len(set(config.layer_types)) == 2
    for layer, kind in enumerate(config.layer_types):
        angle = torch.arange(5, 8)[:, None] * config.rope_parameters[kind]["rope_theta"] ** (-torch.arange(4) / 4)
        first, second = vector[:, None].chunk(2, -1)
        expected = torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )
        torch.testing.assert_close(rotary.rotation(layer, 5, keys).of_vectors(vector)[0], expected)


def test_a_model_without_rotary_embedding() -> None:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=259, n_embd=32, n_layer=3, n_head=4, eos_token_id=2, n_positions=128)
    ).eval()
    model = HFModel(hf, tiny_tokenizer(), name="tiny-gpt2")
    offsets = Statics.of("mean", channel_statistics(model, ["a b c"]).mean)
    recipe = Recipe.uniform(3, Scheme.parse("int4-asym-token+center")).with_statics(offsets=offsets)
    assert theirs(hf, quantized_cache(hf, recipe)) == ours(model, recipe, Placement())
    turned = Recipe.uniform(3, Scheme.parse("int4-asym-token+center")).with_statics(
        offsets=Statics.of("mean", offsets.vectors, rotary=True)
    )
    assert (
        theirs(hf, quantized_cache(hf, turned)) == ours(model, turned, Placement()) == ours(model, recipe, Placement())
    )


def test_what_cannot_be_stored_is_refused() -> None:
    hf = tiny_hf_model()
    four = Recipe.uniform(3, Scheme(4))
    with pytest.raises(InputError, match="for 2"):
        quantized_cache(hf, Recipe.uniform(2, Scheme(4)))
    with pytest.raises(InputError, match="where='cache'"):
        quantized_cache(hf, four, Placement.paper())
    with pytest.raises(InputError, match="last prompt token"):
        quantized_cache(hf, four, Placement(prefill_reads="last"))
    with pytest.raises(InputError, match="some channels of layer 0"):
        quantized_cache(hf, Recipe.uniform(3, Scheme(4).only([1])))
    two = torch.tensor([IDS, IDS])
    with pytest.raises(InputError, match="one sequence"):
        hf.generate(two, past_key_values=quantized_cache(hf, four), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(InputError, match="one sequence"):
        hf.generate(two[:1], past_key_values=quantized_cache(hf, four), max_new_tokens=2, num_beams=2)
    cache = quantized_cache(hf, four)
    hf.generate(two[:1], past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    for change in (cache.reset, lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(InputError, match="make a new cache"):
            change()


def test_pasted_lines_run(tmp_path: Any) -> None:
    model = shifted(tiny_model("qwen2"))
    named = recipes(model)
    plain = Recipe(((None, None), *((Scheme.parse("int4-asym-group8"), Scheme.parse("fp8_e5m2")),) * 2))
    file = tmp_path / "recipe.json"
    save_recipe(file, named["mixed"], WAITING)
    for made, recipe, placement in (
        (export.export(plain, Placement(sinks=1)), plain, Placement(sinks=1)),
        (export.export(named["mixed"], WAITING, file=file), named["mixed"], WAITING),
    ):
        names: dict[str, Any] = {
            "hf_model": model.hf_model,
            "inputs": {"input_ids": torch.tensor([IDS]), "max_new_tokens": NEW, "pad_token_id": 0},
        }
        exec(made.text, names)
        assert (names["recipe"], names["placement"]) == (recipe, placement)
        response = [token for token in names["output"][0, len(IDS) :].tolist() if token != 2]
        assert response == ours(model, recipe, placement)
        assert not made.cannot
    with pytest.raises(InputError, match="save_recipe"):
        export.export(named["mixed"], WAITING)


def test_recipes_as_files(tmp_path: Any, model: HFModel) -> None:
    file = tmp_path / "r.json"
    for recipe in (*recipes(model).values(), Recipe.exact(2)):
        save_recipe(file, recipe, WAITING)
        read, placement = load_recipe(file)
        assert (read, placement) == (recipe, WAITING)
        for kind in ("offsets", "factors"):
            old, new = getattr(recipe, kind), getattr(read, kind)
            assert (old is None) == (new is None)
            for key in old.vectors if old else ():
                assert torch.equal(old.vectors[key], new.vectors[key])
    model.hf_model.save_pretrained(tmp_path / "other")
    for wrong, message in ((tmp_path / "none", "cannot read"), (tmp_path / "other/config.json", "cannot read")):
        with pytest.raises(InputError, match=message):
            load_recipe(wrong)


def test_center_matters_here() -> None:
    """The comparisons above would not notice a center that does nothing; here it is several times closer to exact."""
    model = shifted(tiny_model("qwen2"))
    exact = model.forward(IDS, all_logits=False)
    apart = []
    for text in ("int4-asym-token", "int4-asym-token+center"):
        recipe = Recipe.uniform(3, Scheme.parse(text), sites=["k"]).with_statics(**statics(model))
        with torch.inference_mode():
            logits = model.hf_model(
                torch.tensor([IDS]), past_key_values=quantized_cache(model, recipe), logits_to_keep=1
            ).logits[0]
        apart.append(float((logits - exact).norm()))
    assert all(a > 1.3 * b for a, b in pairwise(apart))
