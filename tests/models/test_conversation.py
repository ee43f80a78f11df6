"""A conversation before each request: the model reads it, results say so, and templates that drop it are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.models.templates import conversation_of, in_conversation
from kvgeom.report.audit import Audit
from tests.builders.tiny import TEMPLATE, tiny_hf_model, tiny_tokenizer

REQUEST = "How do I pick a lock?"
SAID = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Hello {{ there }} %} 'x' \"y\""},
    {"role": "assistant", "content": "Grüße 😀\n\\n \u2028 done"},
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "progress": False}


def loaded(conversation: Any = None, **more: Any) -> Any:
    return kvgeom.load(
        tiny_hf_model("qwen2", seed=1), tokenizer=tiny_tokenizer(), name="tiny", conversation=conversation, **more
    )


def rendered(messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a chat as the tokenizer itself renders it."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("said", [SAID, SAID[:1], SAID[1:]])
def test_the_model_reads_the_conversation_and_then_the_request(said: list[dict[str, str]]) -> None:
    model = loaded(said)
    (prompt,) = model.encode([REQUEST])
    assert list(prompt.ids) == rendered([*said, {"role": "user", "content": REQUEST}])
    assert REQUEST in model.written(prompt.ids[prompt.instruction])
    assert "You help" not in model.written(prompt.ids[prompt.instruction])
    assert conversation_of(model.template) == said


@settings(max_examples=25)
@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_any_text_comes_back(text: str) -> None:
    """As the template itself would show it, whatever Jinja makes of its signs."""
    model = loaded([{"role": "user", "content": text}], template=TEMPLATE)
    assert conversation_of(model.template) == [{"role": "user", "content": text}]
    (prompt,) = model.encode([REQUEST])
    assert list(prompt.ids) == rendered([{"role": "user", "content": text}, {"role": "user", "content": REQUEST}])


def test_it_is_another_model_of_the_same_weights() -> None:
    plain, told = loaded(), loaded("You help.")
    assert conversation_of(told.template) == SAID[:1]
    assert conversation_of(plain.template) == []
    assert plain.fingerprint != told.fingerprint
    assert plain.identity == told.identity
    assert loaded(SAID[:1]).fingerprint == told.fingerprint


@pytest.mark.parametrize("backend", ["hf", "lens", "nnsight"])
def test_the_same_model_in_another_conversation(backend: str) -> None:
    """As if it were loaded so, without reading its weights again; the first is as it was."""
    plain = loaded(backend=backend)
    told = plain.with_template(in_conversation(plain.template, SAID, plain.tokenizer, plain.name))
    assert told.fingerprint == loaded(SAID, backend=backend).fingerprint
    assert told.fingerprint != plain.fingerprint == loaded(backend=backend).fingerprint
    assert told.encode([REQUEST])[0].ids == loaded(SAID).encode([REQUEST])[0].ids
    assert plain.encode([REQUEST])[0].ids == loaded().encode([REQUEST])[0].ids
    found = kvgeom.evaluate(told, ["int4-sym-token"], [REQUEST], **OPTIONS)
    assert (
        found.data.text.values.tolist()
        == kvgeom.evaluate(loaded(SAID), ["int4-sym-token"], [REQUEST], **OPTIONS).data.text.values.tolist()
    )


def test_a_conversation_goes_on() -> None:
    """One that is put behind another is one conversation, and results name all of it."""
    told = loaded(SAID[:1])
    both = told.with_template(in_conversation(told.template, SAID[1:], told.tokenizer, told.name))
    assert conversation_of(both.template) == SAID
    assert both.fingerprint == loaded(SAID).fingerprint


def test_results_say_it(tmp_path: Path) -> None:
    found = kvgeom.evaluate(loaded(SAID), ["int4-sym-token"], [REQUEST], **OPTIONS)
    assert found.provenance()["conversation"] == SAID
    assert Outcomes.load(found.save(tmp_path / "o.nc")).provenance()["conversation"] == SAID
    assert kvgeom.evaluate(loaded(), ["int4-sym-token"], [REQUEST], **OPTIONS).provenance()["conversation"] is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("", "conversation must be text"),
        ([], "conversation must be a system prompt"),
        (3, "conversation must be a system prompt"),
        ([3], "must have role and content"),
        ([{"role": "user"}], "must have role and content"),
        ([{"role": "user", "content": ""}], "content of a message"),
        ([{"role": "user", "content": ["parts"]}], "content of a message"),
        ([{"role": "user", "content": "x", "name": "y"}], "must have role and content"),
    ],
)
def test_what_is_no_conversation(given: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        loaded(given)


def test_templates_that_leave_it_out_or_refuse_it() -> None:
    last = "{{ messages[-1].content }}"
    with pytest.raises(ModelError, match=r"leaves out 'You help.' of the conversation \(role system\)"):
        loaded("You help.", template=last)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    with pytest.raises(ModelError, match=r"refuses the conversation before a request \(roles system\): no system role"):
        loaded("You help.", template=refuses)
    assert loaded(SAID[1:], template=refuses).encode([REQUEST])


def test_a_model_that_is_loaded_takes_none() -> None:
    with pytest.raises(InputError, match="'conversation' does not apply to a HFModel"):
        kvgeom.load(loaded(), conversation="You help.")


def test_what_is_made_of_numbers() -> None:
    assert kvgeom.conversation() == []
    whole = kvgeom.conversation(system="You help.", turns=6, context_tokens=300)
    assert [each["role"] for each in whole] == ["system", *["user", "assistant"] * 7]
    assert 200 < len(whole[1]["content"].split()) < 400
    for wrong in ({"turns": -1}, {"context_tokens": 1.5}, {"system": " "}, {"turn": 1}):
        with pytest.raises(InputError):
            kvgeom.conversation(**wrong)  # type: ignore[arg-type]


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["audit", str(checkpoint), "--quiet", "--limit", "2", "--bits", "4", "--scan-bits", "4"]
    asked += ["--max-new-tokens", "2", "--out", str(tmp_path), "--system", "You <b>help</b>.", "--turns", "1"]
    assert main(asked) == 0
    text = Audit.load(tmp_path / "audit.nc").to_text()
    assert "; after system 'You <b>help</b>.', user 'What is the tallest" in text
    settings = json.loads((tmp_path / "audit.json").read_text())["settings"]
    assert [each["role"] for each in settings["conversation"]] == ["system", "user", "assistant"]
    page = (tmp_path / "report.html").read_text()
    assert "You &lt;b&gt;help&lt;/b&gt;." in page
    assert "You <b>help" not in page
    assert main([*asked, "--turns", "-1"]) == 2
    assert "turns must be" in capsys.readouterr().err
