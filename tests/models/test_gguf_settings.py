"""Settings of a GGUF file are those of the converted model, or are noted, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from kvgeom.errors import InputError
from kvgeom.models.hf import HFModel
from tests.builders.tiny import tiny_config, write_tiny_gguf

More = Callable[[gguf.GGUFWriter], Any]


def loaded(path: Path, more: More = lambda writer: None, **options: Any) -> HFModel:
    write_tiny_gguf(path, more=more, **options)
    model = kvgeom.load(path, progress=False)
    assert isinstance(model, HFModel)
    return model


def off(kind: str, path: Path, more: More, *, shift: float = 0.0, **config: Any) -> float:
    """How far logits of a converted file are from those of the model that it was made of, of the largest."""
    torch.manual_seed(0)
    hf = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**tiny_config(kind, 2), **config}))
        .float()
        .eval()
    )
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        for weight in hf.parameters():
            weight.mul_(10) if weight.ndim > 1 else None
        ours = loaded(path, more, architecture=kind, model=hf, shift=shift).hf_model(ids).logits
        theirs = hf(ids).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


def rms(w: gguf.GGUFWriter) -> None:
    w.add_layer_norm_rms_eps(1e-5)


def plain(w: gguf.GGUFWriter) -> None:
    w.add_layer_norm_eps(1e-5)


@pytest.mark.parametrize(
    ("kind", "more", "config"),
    [
        ("phi3", lambda w: (rms(w), w.add_rope_dimension_count(8)), {}),
        ("phi3", lambda w: (rms(w), w.add_rope_dimension_count(4)), {"partial_rotary_factor": 0.5}),
        ("phi3", lambda w: (rms(w), w.add_rope_dimension_count(8), w.add_sliding_window(4)), {"sliding_window": 4}),
        ("stablelm", lambda w: (plain(w), w.add_rope_dimension_count(2)), {}),
        ("stablelm", lambda w: (plain(w), w.add_rope_dimension_count(8)), {"partial_rotary_factor": 1.0}),
        ("nemotron", lambda w: (plain(w), w.add_rope_dimension_count(4)), {"shift": 1.0}),
        ("nemotron", lambda w: (plain(w), w.add_rope_dimension_count(8)), {"shift": 1.0, "partial_rotary_factor": 1.0}),
        ("nemotron", lambda w: (w.add_layer_norm_eps(1e-2), w.add_rope_dimension_count(4)), {"shift": 1.0, "norm_eps": 1e-2}),
    ],
)  # fmt: skip
def test_the_converted_model_is_the_one_of_the_file(
    kind: str, more: More, config: dict[str, Any], tmp_path: Path, own_cache: Path
) -> None:
    assert off(kind, tmp_path / "m.gguf", more, **config) < 1e-4


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attention=st.sampled_from([None, 3.0, 50.0]), final=st.sampled_from([None, 2.0, 30.0]), window=st.integers(3, 24)
)
def test_caps_and_windows(
    attention: float | None, final: float | None, window: int, tmp_path: Path, own_cache: Path
) -> None:
    config = {"head_dim": 8, "sliding_window": window}

    def more(w: gguf.GGUFWriter) -> None:
        w.add_layer_norm_rms_eps(1e-6)
        w.add_unk_token_id(0)
        w.add_key_length(8)
        w.add_value_length(8)
        w.add_sliding_window(window)
        for cap, add, name in (
            (attention, w.add_attn_logit_softcapping, "attn_logit_softcapping"),
            (final, w.add_final_logit_softcapping, "final_logit_softcapping"),
        ):
            if cap is not None:
                add(cap)
                config[name] = cap  # type: ignore[assignment]

    config |= {"attn_logit_softcapping": attention or 50.0, "final_logit_softcapping": final or 30.0}  # type: ignore[dict-item]
    assert off("gemma2", tmp_path / "m.gguf", more, shift=1.0, **config) < 1e-4


def test_tokens_that_end_a_turn_end_a_response(tmp_path: Path, own_cache: Path) -> None:
    assert loaded(tmp_path / "a.gguf").stop_tokens == {2}
    model = loaded(tmp_path / "b.gguf", lambda w: (w.add_eot_token_id(70), w.add_eom_token_id(71)))
    assert model.stop_tokens == {2, 70, 71}


@pytest.mark.parametrize(
    ("rule", "tokens", "noted"),
    [
        ("llama-bpe", ["12"], False),  # up to three digits
        ("tekken", ["1", "2"], False),
        ("smollm", ["1", "2"], False),
        ("gpt-2", ["12"], False),
        ("no-such-rule", ["12"], True),
    ],
)
def test_text_is_split_as_the_file_says(
    rule: str, tokens: list[str], noted: bool, tmp_path: Path, own_cache: Path
) -> None:
    model = loaded(tmp_path / "m.gguf", lambda w: w.add_tokenizer_pre(rule), merge="1 2")
    assert model.tokenizer.convert_ids_to_tokens(model.tokens("12")) == tokens
    assert any(rule in note for note in model.notes) is noted
    again = kvgeom.load(tmp_path / "m.gguf", progress=False)  # from the conversion that was kept
    assert (again.notes, again.fingerprint) == (model.notes, model.fingerprint)


def test_what_is_not_read_is_noted(tmp_path: Path, own_cache: Path) -> None:
    def more(w: gguf.GGUFWriter) -> None:
        w.add_float32("llama.some.new_scale", 2.0)
        w.add_sliding_window(4)  # a llama has none
        w.add_chat_template([{"name": "tool_use", "template": "{{ messages }}"}])

    (settings_, templates) = (note for note in loaded(tmp_path / "m.gguf", more).notes if "the file" in note)
    assert "llama.some.new_scale" not in settings_
    assert "some.new_scale = 2.0" in settings_
    assert "attention.sliding_window = 4" in settings_
    assert templates.endswith("not used: tool_use")
    assert not [note for note in loaded(tmp_path / "plain.gguf").notes if "the file" in note]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (lambda w: w.add_bool("llama.attention.causal", False), "reads ahead"),
        (lambda w: w.add_type("adapter"), "of type adapter, not a model"),
        (lambda w: w.add_uint16("split.count", 2), "one of 2 parts"),
    ],
)
def test_what_is_no_whole_model_is_refused(more: More, says: str, tmp_path: Path, own_cache: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", more=more)
    with pytest.raises(InputError, match=says):
        kvgeom.load(tmp_path / "m.gguf", progress=False)
