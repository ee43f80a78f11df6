"""Sequences that are decoded together say what they say alone, however long the longest of them is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.models.decoder import batches_up_to, max_context
from kvgeom.models.hf import HFModel
from tests.builders.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SWITCH = 40
FACTORS = {"long_factor": [9.0, 7.0, 5.0, 3.0], "short_factor": [1.0] * 4}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": SWITCH, "rope_theta": 10000.0, **FACTORS}
#: Models whose sequences would change with their neighbours.
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"max_position_embeddings": 512, "original_max_position_embeddings": SWITCH, "rope_parameters": LONGROPE},
    "roformer": {"is_decoder": True, "embedding_size": 32, "max_position_embeddings": 512},
    "llama4_text": {
        "max_position_embeddings": 512,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 0, 1],
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "attn_scale": 0.9,
    },
}
REQUESTS = [
    "Why?",
    "Name a river.",
    "a b c " * 8,
    "Tell me all that there is to be told about rivers, and then some more of it.",
]


def made(kind: str) -> HFModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0) if weight.ndim > 1 else None
    return HFModel(model, tiny_tokenizer(), name=f"tiny-{kind}")


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_says_what_its_sequences_say_alone(kind: str) -> None:
    model = made(kind)
    together, apart = (
        evaluate(
            model,
            ["int4-asym-token"],
            REQUESTS,
            full_responses=True,
            max_new_tokens=12,
            batch_size=rows,
            progress=False,
        )
        for rows in (16, 1)
    )
    assert together.data.text.equals(apart.data.text)
    assert len({*together.data.text.values.ravel().tolist()}) > 2


def test_batches_end_where_a_neighbour_decides() -> None:
    """Below the switch sequences are decoded together, and beyond one by one."""
    model = made("phi3")
    assert model.decoder.batches_up_to == SWITCH
    assert any(f"more than {SWITCH} tokens" in note for note in model.notes)
    caches = [model.new_cache() for _ in range(2)]
    for cache, length in zip(caches, (5, 20), strict=True):
        model.forward(list(range(3, 3 + length)), cache)
    assert not model.decoder.alone(caches, SWITCH - 20)
    assert model.decoder.alone(caches, SWITCH - 19)


def test_what_a_model_has_read_is_no_change_of_it() -> None:
    """LongRoPE writes its frequencies anew for a long sequence."""
    model = made("phi3")
    before = model.fingerprint
    model.forward([5] * (SWITCH + 9), model.new_cache())
    assert kvgeom.load(model).fingerprint == before
    assert made("phi3").fingerprint == before


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"rope_parameters": {"rope_type": "default"}}, 2**31),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 90}, 90),
        ({"rope_parameters": {"full": {"rope_type": "default"}, "sliding": dict(LONGROPE)}}, SWITCH),
        ({"attn_temperature_tuning": True, "floor_scale": 8192}, 8192),
        ({"attn_temperature_tuning": False, "floor_scale": 8192}, 2**31),
    ],
)
def test_where_a_configuration_has_its_switch(settings: dict[str, Any], limit: int) -> None:
    class Settings:
        def __init__(self) -> None:
            self.__dict__.update(settings)

    assert batches_up_to(Settings()) == limit


def test_contexts_by_other_names() -> None:
    assert max_context(AutoConfig.for_model("mpt", max_seq_len=77)) == 77
    assert max_context(AutoConfig.for_model("gpt2", n_positions=88)) == 88
    assert max_context(AutoConfig.for_model("bloom")) == 2**31
