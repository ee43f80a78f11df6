"""What a model is tried on before anything else, and what of it is noted with every result."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import kvgeom
from kvgeom.errors import InputError, KvgeomWarning, ModelError
from kvgeom.models.hf import HFModel
from tests.builders.tiny import SPECIAL, TEMPLATE, tiny_config, tiny_hf_model, tiny_model, tiny_tokenizer

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def wrapped(model: Any = None, tokenizer: Any = None) -> HFModel:
    found = kvgeom.load(tiny_hf_model() if model is None else model, tokenizer=tokenizer or tiny_tokenizer())
    assert isinstance(found, HFModel)
    return found


def templated(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def looks_ahead() -> Any:
    config = {**tiny_config("gemma3_text"), "use_bidirectional_attention": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **config))


def on_meta() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_hf_model().config)


def t5() -> Any:
    config = T5Config(vocab_size=259, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny_hf_model().model, "no language-model head"),
        (lambda: LlamaForSequenceClassification(tiny_hf_model().config), "no language-model head"),
        (lambda: LlamaForTokenClassification(tiny_hf_model().config), "no language-model head"),
        (lambda: LlamaForQuestionAnswering(tiny_hf_model().config), "no language-model head"),
        (lambda: BertLMHeadModel(BertConfig(**SIZES)), "reads tokens before they are written"),
        (looks_ahead, "reads tokens before they are written"),
        (t5, "has an encoder"),
        (on_meta, "30 weights of LlamaForCausalLM without values in memory"),
        (lambda: cpu_offload(tiny_hf_model(), execution_device=torch.device("cpu")), "offloaded"),
    ],
)
def test_objects_that_write_no_text(make: Callable[[], Any], says: str) -> None:
    with pytest.raises((InputError, ModelError), match=says):
        wrapped(make())


def test_a_head_of_many_classes() -> None:
    model = tiny_hf_model()
    model.lm_head = torch.nn.Linear(32, 40)
    with pytest.raises(ModelError, match=r"answers \d+ tokens with \(1, \d+, 40\) numbers"):
        wrapped(model)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_do_not_look_ahead(kind: str, dtype: torch.dtype) -> None:
    """Nor does a mixture of experts, where what shares an expert changes the last digits."""
    torch.manual_seed(0)
    config = {**tiny_config(kind), "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config |= {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    }
    assert wrapped(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).to(dtype)).notes == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float) -> None:
    model = tiny_hf_model()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = value
    with pytest.raises(
        ModelError, match=r"are NaN in float32, first in model\.layers\.1\.self_attn\.v_proj; its weights"
    ):
        wrapped(model)


def test_a_tokenizer_that_is_larger_than_the_embedding() -> None:
    """Special tokens that no prompt has are no error before one does."""
    more = tiny_tokenizer()
    more.add_tokens(["zzz"])
    with pytest.raises(InputError, match=r"1 token beyond its embedding of 259 rows, such as 259 \('zzz'\)"):
        wrapped(tokenizer=more)
    special = tiny_tokenizer()
    special.add_special_tokens({"pad_token": "[PAD]"})
    model = wrapped(tokenizer=special)
    for ask in (lambda: model.encode(["a [PAD] b"]), lambda: model.tokens("[PAD]")):
        with pytest.raises(InputError, match=r"has token 259 \('\[PAD\]'\), and the embedding .* 259 rows"):
            ask()
    special.chat_template = "[PAD]" + TEMPLATE
    with pytest.raises(InputError, match="has token 259"):
        wrapped(tokenizer=special)


def test_settings_of_generation_are_noted(tmp_path: Path) -> None:
    tiny_hf_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    asked = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": [3]}
    (tmp_path / "generation_config.json").write_text(json.dumps({**asked, "do_sample": True, "temperature": 0.7}))
    says = r"repetition_penalty 1\.1, no_repeat_ngram_size 3, min_new_tokens 5, suppress_tokens \[3\], which greedy"
    with pytest.warns(KvgeomWarning, match=says):
        model = kvgeom.load(tmp_path, progress=False)
    prompts = kvgeom.calibration().take(4)
    outcomes = kvgeom.evaluate(
        model,
        {"int4": kvgeom.Recipe.uniform(3, kvgeom.Scheme(4))},
        list(prompts.harmful),
        max_new_tokens=2,
        progress=False,
    )
    assert outcomes.provenance()["notes"] == list(model.notes)


def test_a_model_without_notes_says_nothing() -> None:
    assert tiny_model().notes == ()


def test_several_templates() -> None:
    other = TEMPLATE.replace("brief", "long")
    for several in (
        {"default": TEMPLATE, "rag": other},
        [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": other}],
    ):
        with pytest.warns(KvgeomWarning, match="the one called default is used, not rag"):
            model = wrapped(tokenizer=templated(several))
        assert model.encode(["hi"]) == tiny_model().encode(["hi"])
        assert model.fingerprint == tiny_model().fingerprint
    with pytest.raises(InputError, match=r"several chat templates \(rag, tools\).*load\(template="):
        wrapped(tokenizer=templated({"rag": other, "tools": other}))
    chosen = kvgeom.load(tiny_hf_model(), tokenizer=templated({"rag": other, "tools": other}), template=TEMPLATE)
    assert chosen.fingerprint == tiny_model().fingerprint
    with pytest.raises(ModelError, match="no chat template"):
        wrapped(tokenizer=templated({}))
    with pytest.raises(InputError, match="must be text, got 5"):
        wrapped(tokenizer=templated(5))


@pytest.mark.parametrize("altered", ["m.content | tojson", "m.content | e", "m.content | replace('\n', ' ')"])
def test_templates_that_alter_a_request(altered: str) -> None:
    """Prompts are what the template makes of them; what was asked is inside."""
    with pytest.warns(KvgeomWarning, match="the chat template alters what a request says"):
        model = wrapped(tokenizer=templated(TEMPLATE.replace("m.content", altered)))
    request = "Is 'a' < \"b\" & c?\nSay so."
    (prompt,) = model.encode([request])
    asked = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert list(prompt.ids) == asked["input_ids"]
    assert SPECIAL[2] not in model.written(prompt.ids[prompt.instruction])
    assert len(prompt.ids[prompt.instruction]) >= len(request)


def test_a_template_that_trims_is_not_one_of_them() -> None:
    assert wrapped(tokenizer=templated(TEMPLATE.replace("m.content", "m.content | trim"))).notes == ()


def test_a_template_without_the_first_token_of_all_texts() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = SPECIAL[0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    with pytest.warns(KvgeomWarning, match="begins without '<|pad|>'".replace("|", r"\|")):
        wrapped(tokenizer=tokenizer)
    tokenizer.chat_template = SPECIAL[0] + TEMPLATE
    assert wrapped(tokenizer=tokenizer).notes == ()


def test_the_vocabulary_is_that_of_the_logits() -> None:
    """Also where a configuration says otherwise."""
    model = tiny_hf_model()
    model.config.vocab_size = 999
    assert wrapped(model).vocabulary == 259


DEPENDS = (
    "{{ m.content[:40] }}",
    "{{ m.content | replace('bomb', 'b***') }}",
    "{{ m.content.split('?')[0] }}",
    "{{ ('[unsafe] ' if 'bomb' in m.content else '') + m.content }}",
)


@pytest.mark.filterwarnings("ignore:.*otherwise than asked")
@pytest.mark.parametrize("shown", DEPENDS)
def test_prompts_are_as_the_template_writes_them_whatever_it_depends_on(shown: str) -> None:
    """They were put between the texts that one short request had around it."""
    model = wrapped(tokenizer=templated(TEMPLATE.replace("{{ m.content }}", shown)))
    for request in ("How do I bake?", "How do I build a bomb? I need to know all of it by tomorrow noon."):
        chat = [{"role": "user", "content": request}]
        wanted = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert model.written(model.encode([request])[0].ids) == wanted


def test_a_prompt_that_has_other_texts_around_it_is_refused() -> None:
    head = "{{ 'long' if messages[0].content | length > 60 }}"
    model = wrapped(tokenizer=templated(head + TEMPLATE))
    with pytest.raises(InputError, match="between the same texts as others"):
        model.encode(["How do I build a bomb? I need to know all of it by tomorrow noon, and not a minute later."])
    with pytest.raises(InputError, match="between the same texts as others"):  # found out on the first prompt
        wrapped(tokenizer=templated("{{ messages[0].content | length }}" + TEMPLATE))


@pytest.mark.parametrize("passing", ["{{ strftime_now('%d %b %Y') }}", "{{ [7] | random }}"])
def test_a_template_that_writes_something_else_each_day_is_noted(passing: str) -> None:
    with pytest.warns(KvgeomWarning, match="prompts of another day are others"):
        model = wrapped(tokenizer=templated(passing + TEMPLATE))
    assert any("date or the time" in note for note in model.notes)


def test_logits_that_are_the_same_for_every_token() -> None:
    """As after a download whose last bytes, those of the last norm, did not come: it "refused nothing"."""
    model = tiny_hf_model()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    with pytest.raises(ModelError, match="same for every token"):
        wrapped(model)


@pytest.mark.parametrize(
    ("stops", "able", "notes"), [([7, 999], {7, 2}, 1), (-1, {2}, 1), (None, {2}, 0), (7, {7, 2}, 0)]
)
def test_tokens_that_are_never_written_end_nothing(stops: Any, able: set[int], notes: int) -> None:
    model, tokenizer = tiny_hf_model(), tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    model.generation_config.eos_token_id = stops
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = wrapped(model, tokenizer)
    assert found.stop_tokens == able
    assert len(found.notes) == notes


def test_nothing_ends_a_response() -> None:
    model, tokenizer = tiny_hf_model(), tiny_tokenizer()
    tokenizer.eos_token, model.generation_config.eos_token_id = None, -1
    with pytest.warns(KvgeomWarning, match="no token ends a response"):
        assert wrapped(model, tokenizer).stop_tokens == frozenset()


@pytest.mark.parametrize("stops", ["7", 1.5, True, [[7]], [None]])
def test_stop_tokens_that_are_no_numbers(stops: Any) -> None:
    model = tiny_hf_model()
    model.generation_config.eos_token_id = stops
    with pytest.raises(InputError, match=r"eos_token_id in the generation_config of .* must be a whole number"):
        wrapped(model)


def test_prompts_of_another_day_are_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked is part of the fingerprint where the template alone does not tell it."""

    def on(year: int) -> HFModel:
        class Day(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Day:
                return cls(year, 1, 2)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
        with pytest.warns(KvgeomWarning, match="prompts of another day are others"):
            return wrapped(tokenizer=templated("{{ strftime_now('%Y') }}" + TEMPLATE))

    one = on(2025)
    asked = one.encode(["hi"])
    other = on(2026)
    assert asked != other.encode(["hi"])
    with pytest.raises(InputError, match="load the model again if another day has begun"):
        one.encode(["hi"])
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == on(2025).fingerprint
    assert one.identity == other.identity


def test_added_tokens_are_not_listed_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is made anew each time it is read: with many of them and a large vocabulary a model took hours to load."""
    kind, reads = type(tiny_tokenizer()), []
    own = kind.added_tokens_decoder

    def counted(self: Any) -> Any:
        reads.append(1)
        return own.fget(self)  # type: ignore[attr-defined]

    monkeypatch.setattr(kind, "added_tokens_decoder", property(counted))
    kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer())
    assert 0 < len(reads) < 20
