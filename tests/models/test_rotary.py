"""Every layer's own rotary embedding, against the function that the model's attention calls."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import kvgeom
from kvgeom.errors import ModelError
from kvgeom.models.hf import HFModel
from kvgeom.models.modules import attention_of
from kvgeom.models.rotary import TokenRotation
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_config, tiny_tokenizer

IDS = [5, 9, 11, 40, 3, 77, 21, 60, 13]
#: Options of an architecture, and the layers that turn nothing although they are handed an embedding.
MODELS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "llama": ({}, set()),
    "smollm3": ({"no_rope_layers": [1, 1, 1, 0]}, {3}),
    "exaone4": ({"sliding_window": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}, {3}),
    "cohere2": ({"sliding_window": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}, {3}),
    "gpt_oss": ({"head_dim": 8, "sliding_window": 64}, set()),
    "cohere": ({}, set()),
    "ernie4_5": ({"head_dim": 8}, set()),
    "glm4": ({"head_dim": 16}, set()),
    "helium": ({"head_dim": 8}, set()),
    "nanochat": ({}, set()),
}


def tiny(kind: str, **options: Any) -> HFModel:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, **{**tiny_config("llama"), **experts, "num_hidden_layers": 4, **options})
    hf = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.mul_(6.0) if weight.ndim > 1 else weight.normal_(0, 0.5) if name.endswith("bias") else None
    return HFModel(hf, tiny_tokenizer(), name=f"tiny-{kind}")


def turning(model: HFModel, layer: int, tokens: int) -> torch.Tensor:
    """The matrices ``[tokens, head_dim, head_dim]`` that the function of the model's own file makes of unit vectors."""
    found: list[Any] = []
    handle = attention_of(model._layers[layer]).register_forward_pre_hook(
        lambda _module, _args, kwargs: found.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.inference_mode():
        model.hf_model(input_ids=torch.full((1, tokens), 7))
    handle.remove()
    size = model.geometry.head_dim
    unit = torch.eye(size)[None, :, None].repeat(1, 1, tokens, 1)  # one "head" for each unit vector
    turned = sys.modules[type(model.hf_model).__module__].apply_rotary_pos_emb(unit, unit, *found[0])[1]
    return turned[0].permute(1, 2, 0)


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_turns_as_the_model_does(kind: str) -> None:
    options, still = MODELS[kind]
    model = tiny(kind, **options)
    rotations: dict[int, TokenRotation] = {}
    model.forward(IDS, on_rotation=rotations.__setitem__)
    keys = torch.randn(2, len(IDS), model.geometry.head_dim)
    for layer in range(4):
        if layer in still:
            assert torch.equal(rotations[layer].rotate(keys), keys)
            continue
        expected = torch.einsum("tij,htj->hti", turning(model, layer, len(IDS)), keys)
        torch.testing.assert_close(rotations[layer].rotate(keys), expected)
        torch.testing.assert_close(rotations[layer].unrotate(expected), keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_ratio_of_keys_is_the_straight_computation(kind: str) -> None:
    """SPEC 3, for one direction at the instruction, 3 bits per tensor: turned back by the inverse of :func:`turning`."""
    options, still = MODELS[kind]
    model = tiny(kind, **options)
    space = kvgeom.subspace(model, PAIRS, position="instruction", progress=False)
    found = space.sensitivity(contrasts=(), progress=False).data.ratio_plugin.sel(site="k").values
    for layer in range(4):
        means, rows, harmful = [], [], []
        for label in ("harmful", "harmless"):
            for prompt in model.encode(getattr(PAIRS, label)):
                cache = DynamicCache(config=model.hf_model.config)
                with torch.inference_mode():
                    model.hf_model(input_ids=torch.tensor([prompt.ids]), past_key_values=cache)
                keys = cache.layers[layer].keys[0].double()
                step = keys.abs().max() / 3
                error = (keys / step).round().clamp(-3, 3) * step - keys
                if layer not in still:
                    back = torch.linalg.inv(turning(model, layer, len(prompt)).double())
                    keys, error = (torch.einsum("tij,htj->hti", back, x) for x in (keys, error))
                keys, error = (x.permute(1, 0, 2).flatten(1)[prompt.instruction].numpy() for x in (keys, error))
                means.append(keys.mean(0))
                rows.append((keys, error))
                harmful.append(label == "harmful")
        at = np.array(harmful)
        gap = np.array(means)[at].mean(0) - np.array(means)[~at].mean(0)
        unit = gap / np.linalg.norm(gap)
        keys, error = (np.concatenate(x) for x in zip(*rows, strict=True))
        safety = ((error @ unit) ** 2).mean() / ((gap @ unit) ** 2 / 4)
        np.testing.assert_allclose(found[layer], safety / ((error**2).sum() / (keys**2).sum()), rtol=1e-3)


def test_what_cannot_be_proven_is_refused_and_the_rest_works() -> None:
    """Moshi turns keys by a rotary embedding that nothing is handed."""
    model = tiny("moshi", max_position_embeddings=128)
    with pytest.raises(ModelError, match=r"keys in layer 0 .* depend on their position .*placement='paper'"):
        kvgeom.subspace(model, PAIRS, progress=False)
    kvgeom.subspace(model, PAIRS, placement="paper", progress=False)
    recipe = Recipe.uniform(4, Scheme.parse("int4-asym-token"))
    assert kvgeom.evaluate(model, recipe, ["open the door"], max_new_tokens=2, progress=False)
    with pytest.raises(ModelError, match="depend on their position"):
        kvgeom.evaluate(model, "int4-asym-token+center", ["open the door"], max_new_tokens=2, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("longer", [False, True])
def test_rounding_of_the_number_format_is_no_signal(dtype: torch.dtype, longer: bool) -> None:
    """Keys and values of layer 0 at a token of the template depend on token and position alone."""
    hf = tiny("llama").hf_model.to(dtype)
    model = HFModel(hf, tiny_tokenizer(), name="half")
    harmful = tuple(f"{text}, and do it right now" if longer else text for text in PAIRS.harmful)
    pairs = kvgeom.PromptSet("small", harmful, PAIRS.harmless, "here")
    for position in ("template-1", "template-2"):
        space = kvgeom.subspace(model, pairs, position=position, progress=False)
        status = space.sensitivity(contrasts=(), progress=False).data.status
        assert [str(status.sel(layer=0, site=site).values) for site in ("k", "v")] == ["undefined", "undefined"]
        assert space.data.defined.sel(layer=[1, 2, 3]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["glm4", "ernie4_5", "llama"])
def test_large_keys_do_not_hide_how_others_turn(kind: str, dtype: torch.dtype) -> None:
    """A bias makes channels large, turned or not; in few digits another layout must not pass beside them."""
    options = {**MODELS[kind][0], "attention_bias": True, "use_bias": True}
    plain = tiny(kind, **options)
    with torch.no_grad():
        biases = [weight for name, weight in plain.hf_model.named_parameters() if name.endswith("k_proj.bias")]
        assert biases
        for bias in biases:
            bias.zero_().view(-1, plain.geometry.head_dim)[:, -1] = 300.0
    exact = {
        layer: found.planes.tolist()
        for layer, found in HFModel(plain.hf_model, tiny_tokenizer(), name="a")._rotary.layers.items()
    }
    few = HFModel(plain.hf_model.to(dtype), tiny_tokenizer(), name="b")
    assert {layer: found.planes.tolist() for layer, found in few._rotary.layers.items()} == exact
    assert all(exact.values())


def test_no_beginning_is_shared_where_the_frequencies_follow_the_length() -> None:
    """LongRoPE turns the first token of a long prompt otherwise than that of a short one."""
    size = 4
    rope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 40,
        "rope_theta": 10000.0,
        "short_factor": [1.0] * size,
        "long_factor": [1.0 + n for n in range(size)],
    }
    model = tiny("phi3", rope_parameters=rope, head_dim=2 * size, max_position_embeddings=512, pad_token_id=0)
    space = kvgeom.subspace(model, PAIRS, progress=False)
    prompt = max(space.activations.prompts, key=len)
    assert len(prompt) > 40
    cache = model.new_cache()
    model.forward(prompt.ids, cache)
    index = space.activations.prompts.index(prompt)
    for found in space.activations.layers(index):
        torch.testing.assert_close(found.k, cache.layers[found.layer].keys, rtol=1e-4, atol=1e-4)
