"""Tiny random models of real architectures, and a small byte-level tokenizer with a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvgeom.models.hf import HFModel

KINDS = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt_neox")
SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "<|start|>system\nBe brief.<|end|>\n{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=SPECIAL[1:2]
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(kind: str, layers: int = 3) -> dict[str, object]:
    config: dict[str, object] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    if kind in ("qwen3", "gemma3_text"):
        config["head_dim"] = 8
    if kind in ("gemma3_text", "mistral"):
        config["sliding_window"] = 12
    if kind == "gpt_neox":
        config["num_key_value_heads"] = 4
    return config


def tiny_hf_model(kind: str = "llama", seed: int = 0, layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tiny_config(kind, layers)))
    with torch.no_grad():
        for parameter in model.parameters():  # random weights of the default size leave attention almost uniform
            parameter.mul_(10.0) if parameter.ndim > 1 else None
    return model.float().eval()


def tiny_model(kind: str = "llama", seed: int = 0, layers: int = 3) -> HFModel:
    return HFModel(tiny_hf_model(kind, seed, layers), tiny_tokenizer(), name=f"tiny-{kind}")


def wide_model() -> HFModel:
    """Two KV heads of 64 channels, which the block formats of engines divide, and a key bias."""
    torch.manual_seed(0)
    config = tiny_config("qwen2") | {"hidden_size": 128, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **config)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_() if name.endswith("k_proj.bias") else weight.mul_(4.0) if weight.ndim > 1 else None
    return HFModel(model, tiny_tokenizer(), name="tiny-wide")


def write_tiny_gguf(
    path: Path,
    kind: str = "F32",
    file_type: int | None = None,
    *,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: str = "",
    architecture: str = "llama",
    model: PreTrainedModel | None = None,
    shift: float = 0.0,
    merge: str = "a b",
) -> None:
    """A whole tiny llama, with tokenizer and template, as a GGUF file; matrices whose rows are whole blocks are of ``kind``.

    ``more`` adds to it; the weight that is called ``without`` is left out. Of another ``architecture`` the ``model`` is given, and
    ``shift`` is what its files add to the weights of norms.
    """
    hf, tokenizer = model or tiny_hf_model(), tiny_tokenizer()
    layers = int(hf.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    if model is None:
        writer.add_layer_norm_rms_eps(hf.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    # transformers insists on a merge, and a merge on its product: the last byte token makes room.
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(258))), merge.replace(" ", "")])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges([merge])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(str(tokenizer.chat_template))
    kinds = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], layers)
    for name, weight in hf.named_parameters():
        if name == without:
            continue
        ours = weight.detach().numpy().astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            ours = ours + np.float32(shift)
        if architecture == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # GGUF keeps the halves of a rotation interleaved
            heads = ours.shape[0] // 8
            ours = ours.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(ours.shape)
        stored = gguf.GGMLQuantizationType[kind if ours.ndim > 1 and ours.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")), gguf.quants.quantize(ours, stored), raw_dtype=stored
        )
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
