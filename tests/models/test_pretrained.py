"""No weight of a model that is loaded is random, and what is left out is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, QuantoConfig

import kvgeom
from kvgeom.errors import InputError, KvgeomWarning, ModelError
from kvgeom.models.hf import HFModel
from tests.builders.tiny import tiny_config, tiny_hf_model, tiny_tokenizer

Weights = dict[str, Tensor]


def saved(
    folder: Path,
    model: Any = None,
    *,
    weights: Callable[[Weights], Weights] | None = None,
    **config: Any,
) -> Path:
    """A tiny checkpoint, with other weights and entries of its configuration than its own."""
    (tiny_hf_model() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if weights is not None:
        own = load_file(folder / "model.safetensors")
        save_file(weights(own), folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def tied(kind: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**tiny_config(kind), "tie_word_embeddings": True, **options})
    return AutoModelForCausalLM.from_config(config).float().eval()


def load(folder: Path, **options: Any) -> HFModel:
    model = kvgeom.load(folder, progress=False, **options)
    assert isinstance(model, HFModel)
    return model


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda own: {name.replace(old, new, 1) if old else new + name: x for name, x in own.items()}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (renamed("", "_orig_mod."), r"lacks 30 weights .* '_orig_mod\.'"),
        (renamed("", "module."), r"lacks 30 weights .* 'module\.'"),
        (renamed("", "base_model.model."), r"'base_model\.model\.'"),
        (renamed("layers.1.", "layers.1._checkpoint_wrapped_module."), r"lacks 9 .*'_checkpoint_wrapped_module\.'"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), r"lacks 3 .*q_proj\.weight.*'base_layer\.'"),
        (
            lambda own: {name: x for name, x in own.items() if name != "model.layers.1.self_attn.k_proj.weight"},
            r"lacks 1 weight .*: model\.layers\.1\.self_attn\.k_proj\.weight; fetch",
        ),
        (
            lambda own: own | {f"{name}_scale": torch.ones(1) for name in own if "proj" in name},
            r"no quantization_config",
        ),
        (lambda own: own | {"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight: 31, not 32"),
    ],
)
def test_weights_of_other_names_or_shapes(weights: Callable[[Weights], Weights], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load(saved(tmp_path, weights=weights))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 5}, r"lacks 18 weights .*model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"hold layers that its config\.json leaves out \(it has 2\): model\.layers\.2\."),
        ({"num_key_value_heads": 4}, r"other shapes .*k_proj\.weight: 16 x 32, not 32 x 32"),
        ({"num_key_value_heads": 1}, r"other shapes .*k_proj\.weight: 16 x 32, not 8 x 32"),
        ({"vocab_size": 200}, r"other shapes .*lm_head\.weight: 259 x 32, not 200 x 32"),
        ({"vocab_size": 2**35}, r"describes a model of 2,199,023,278,816 weights, and its files hold 39,840"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"does not write text"),
        ({"rms_norm_eps": "x"}, r"'rms_norm_eps' expected float"),
        ({"hidden_act": "nonsense"}, r"'nonsense' is not known"),
    ],
)
def test_a_configuration_of_another_model(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load(saved(tmp_path, **config))


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """A headless save is whole where the head is the embedding."""
    with pytest.raises(InputError, match=r"lacks 1 weight .*lm_head\.weight; it was saved without"):
        load(saved(tmp_path / "untied", tiny_hf_model().model))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load(saved(tmp_path / "lost", tied(), tie_word_embeddings=False))
    whole = load(saved(tmp_path / "tied", tied().model))
    assert torch.equal(whole.hf_model.lm_head.weight, tied().model.embed_tokens.weight)
    assert whole.notes == ()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "phi3"])
def test_whole_checkpoints_load_without_a_word(kind: str, tmp_path: Path) -> None:
    own = tiny_hf_model(kind)
    model = load(saved(tmp_path, own))
    assert model.notes == ()
    assert all(torch.equal(x, own.state_dict()[name]) for name, x in model.hf_model.state_dict().items())


def test_buffers_and_quantized_weights_load(tmp_path: Path) -> None:
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    assert load(saved(tmp_path, weights=lambda own: own | old)).notes == ()
    assert load(tmp_path, quantization_config=QuantoConfig(weights="int8")).weights == "quanto int8"


@pytest.mark.parametrize(
    ("kind", "lost"),
    [("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"), ("phi3", "model.norm.weight")],
)
def test_weights_that_are_joined_while_they_are_read(kind: str, lost: str, tmp_path: Path) -> None:
    whole = tied(kind, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    assert load(saved(tmp_path / "whole", whole)).notes == ()
    with pytest.raises(InputError, match=r"experts or parts|model\.norm\.weight"):
        load(saved(tmp_path / "lost", whole, weights=lambda own: {name: x for name, x in own.items() if name != lost}))


def test_what_is_left_out_is_noted(tmp_path: Path) -> None:
    folder = saved(tmp_path, weights=lambda own: own | {"vision_tower.patch.weight": torch.ones(4)})
    with pytest.warns(KvgeomWarning, match=r"1 weight .* left out: vision_tower\.patch\.weight"):
        model = load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.warns(KvgeomWarning, match="which is not applied"):
        assert len(load(folder).notes) == 2
    assert kvgeom.load(model) is model  # and nothing is said again


def test_a_file_with_zeros_where_something_should_be(tmp_path: Path) -> None:
    """As a download leaves it that made room first: header and length are right."""
    weights = saved(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    middle, end = len(whole) // 2, len(whole) - 512
    weights.write_bytes(whole[:middle] + bytes(end - middle) + whole[end:])
    with pytest.warns(KvgeomWarning, match=r"1?\d weights with zeros where numbers should be"):
        assert len(load(tmp_path).notes) == 2  # norms are among them
    weights.write_bytes(whole[:middle] + bytes(len(whole) - middle))
    with pytest.raises(ModelError, match="same for every token"):  # the last norm is one of them
        load(tmp_path)


def zeroed(name: str, rows: slice = slice(None)) -> Callable[[Weights], Weights]:
    def damaged(own: Weights) -> Weights:
        own[name][rows] = 0
        return own

    return damaged


@pytest.mark.parametrize(
    ("kind", "weights", "says"),
    [
        ("llama", zeroed("model.layers.1.input_layernorm.weight"), r"1 norm .*layers\.1\.input_layernorm"),
        ("qwen3", zeroed("model.layers.0.self_attn.q_norm.weight"), r"1 norm .*layers\.0\.self_attn\.q_norm"),
        ("llama", zeroed("model.layers.2.mlp.up_proj.weight", slice(24, None)), r"up_proj\.weight \(24 of 48 rows\)"),
        ("llama", zeroed("model.embed_tokens.weight", slice(200, None)), r"embed_tokens\.weight \(\d+ of \d+ rows\)"),
        ("llama", zeroed("lm_head.weight", slice(200, None)), r"lm_head\.weight \(\d+ of \d+ rows\)"),
    ],
)
def test_a_part_of_the_weights_is_zero(
    kind: str, weights: Callable[[Weights], Weights], says: str, tmp_path: Path
) -> None:
    with pytest.warns(KvgeomWarning, match=says):
        assert len(load(saved(tmp_path, tiny_hf_model(kind), weights=weights)).notes) == 1


def test_rows_of_no_token_and_norms_that_begin_at_zero(tmp_path: Path) -> None:
    """What vocabularies are filled up with is often zero, and so are the weights of norms that add one to them."""
    own = tiny_hf_model()
    own.resize_token_embeddings(320)
    filled = saved(tmp_path / "filled", own, weights=zeroed("model.embed_tokens.weight", slice(270, None)))
    assert load(filled).notes == ()
    gemma = tiny_hf_model("gemma3_text")
    gemma.model.norm.weight.data.zero_()
    gemma.model.layers[0].input_layernorm.weight.data.zero_()
    assert load(saved(tmp_path / "gemma", gemma)).notes == ()


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_alone(config: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    if not config:
        (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds an adapter .*merge_and_unload"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    """Even in the embedding of a token that no prompt has."""

    def damaged(own: Weights) -> Weights:
        own["model.embed_tokens.weight"][7, 3] = value
        return own

    with pytest.raises(ModelError, match=r"weight model\.embed_tokens\.weight holds NaN or infinity in float32"):
        load(saved(tmp_path, weights=damaged))


def test_weights_that_a_type_does_not_hold(tmp_path: Path) -> None:
    def large(own: Weights) -> Weights:
        return own | {"model.layers.1.mlp.down_proj.weight": own["model.layers.1.mlp.down_proj.weight"] * 1e8}

    folder = saved(tmp_path, weights=large)
    with pytest.raises(
        ModelError, match=r"NaN in float16, first in model\.layers\.1\.mlp\.down_proj.*'bfloat16' or 'float32'"
    ):
        load(folder, dtype="float16")
    assert load(folder).dtype == torch.float32


def test_weights_that_lie_on_a_disk(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    with pytest.raises(ModelError, match=r"9 weights of model without values in memory, such as model\.layers\.1\."):
        load(folder, device_map=places, offload_folder=str(tmp_path / "off"))


def test_whole_numbers_in_the_place_of_weights(tmp_path: Path) -> None:
    """They loaded as if they were the weights themselves."""

    def quantized(own: Weights) -> Weights:
        return {name: (20 * x).to(torch.int8) if name.endswith("q_proj.weight") else x for name, x in own.items()}

    with pytest.raises(InputError, match=r"3 weights in I8 such as model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(saved(tmp_path / "int8", weights=quantized))
    masks = saved(tmp_path / "masks", weights=lambda own: own | {"attn.bias": torch.ones(4, 4, dtype=torch.uint8)})
    with pytest.warns(KvgeomWarning, match="no place for"):
        load(masks)


LAYER = "model.layers.1.self_attn."


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({LAYER + "q_norm.weight": (8,)}, r"1 weight inside its layers that a LlamaForCausalLM .*q_norm\.weight"),
        ({LAYER + "q_proj.bias": (32,)}, r"q_proj\.bias; get the config\.json"),
        ({"model.layers.0.mlp.up_proj.w_scale": (1,)}, r"up_proj\.w_scale"),
        ({LAYER + "q_proj.lora_A.default.weight": (2, 32)}, r"an adapter that is not merged.*merge_and_unload"),
        ({LAYER + "q_proj.lora_A.weight": (2, 32), LAYER + "q_proj.lora_B.weight": (32, 2)}, "2 weights of an adapter"),
    ],
)
def test_weights_that_would_change_what_a_layer_computes(
    more: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    added = {name: torch.ones(shape) for name, shape in more.items()}
    with pytest.raises(InputError, match=says):
        load(saved(tmp_path, weights=lambda own: own | added))


def test_weights_in_eight_bits_without_a_scale(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=r"1 weight in F8_E4M3 such as model\.layers\.0\.mlp\.up_proj"):
        load(saved(tmp_path, weights=lambda own: own | {name: own[name].to(torch.float8_e4m3fn)}))


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    saved(tmp_path)
    tiny_hf_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    with pytest.warns(KvgeomWarning, match=r"holds weights twice: model\.safetensors was read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert load(tmp_path).notes == ()
    first = load_file(shards[0])
    save_file(load_file(shards[1]) | dict([next(iter(first.items()))]), shards[1], metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model-00001.* and model-00002.* both hold .*fetch it again"):
        load(tmp_path)
