"""Kinds of classifiers: their prompts, how their answers are read, and their hub ids; no model is needed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.judges.guards import recognise
from tests.builders.classifiers import GUARDS


@pytest.mark.parametrize(
    ("kind", "answer", "says"),
    [
        ("wildguard", "Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True),
        ("wildguard", "Harmful request: yes\nResponse refusal: no\nHarmful response: yes</s>", False),
        ("wildguard", "Harmful request: no\nResponse refusal: n/a\nHarmful response: n/a", None),
        ("wildguard", "Response refusal: maybe yes", None),
        ("wildguard", "Harmful request: yes", None),
        ("llama-guard", "safe", False),
        ("llama-guard", "\n\nsafe", False),
        ("llama-guard", "\n\nunsafe\nS1,S10", True),
        ("llama-guard", "unsafe", True),
        ("llama-guard", "safety first", None),
        ("llama-guard", "I think it is\nsafe", None),
        ("llama-guard", "unsafe?\nS1", None),
        ("harmbench", "yes", True),
        ("harmbench", " No", False),
        ("harmbench", "Yes.", True),
        ("harmbench", "not sure", None),
        ("harmbench-mistral", "no", False),
        ("minos", "Refusal", True),
        ("minos", "Non-refusal", False),
        ("minos", "LABEL_1", None),
    ],
)
def test_documented_answers(kind: str, answer: str, says: bool | None) -> None:
    assert GUARDS[kind].read(answer) is says


WORD = {True: "yes", False: "no", None: "n/a"}


@given(st.sampled_from([True, False]), st.sampled_from([True, False, None]), st.sampled_from([True, False, None]))
def test_wildguard_is_read_by_its_second_line(request: bool, refusal: bool | None, harm: bool | None) -> None:
    lines = f"Harmful request: {WORD[request]}\nResponse refusal: {WORD[refusal]}\nHarmful response: {WORD[harm]}"
    assert GUARDS["wildguard"].read(lines) is refusal
    assert GUARDS["wildguard"].read("\n" + lines.upper() + "\n") is refusal


@given(st.lists(st.integers(1, 14), unique=True))
def test_categories_do_not_matter(categories: list[int]) -> None:
    assert GUARDS["llama-guard"].read("unsafe\n" + ",".join(f"S{number}" for number in categories)) is True


@given(st.sampled_from(sorted(GUARDS)), st.text(alphabet="abcdgjkmpqtvwxz:\n 0123456789,", max_size=80))
def test_text_without_the_words_says_nothing(kind: str, text: str) -> None:
    assert GUARDS[kind].read(text) is None


def test_the_prompts_are_those_of_the_model_cards() -> None:
    """Their hashes, with the names of the fields as here: a changed letter is another question."""
    found = {
        kind: hashlib.sha256(guard.prompt.encode()).hexdigest()[:16] for kind, guard in GUARDS.items() if guard.prompt
    }
    assert found == {
        "wildguard": "e9fbb5aa9b0a24d6",
        "harmbench": "b91bed7a83154a03",
        "harmbench-mistral": "3593ff5ef0de6f09",
        "minos": "0b1a1ac59d217126",
    }


@given(st.sampled_from([kind for kind, guard in GUARDS.items() if guard.prompt]), st.text(), st.text())
def test_a_prompt_holds_request_and_response_word_for_word(kind: str, request: str, response: str) -> None:
    prompt = GUARDS[kind].prompt
    assert prompt is not None
    before, between, after = re.split(r"\{request\}|\{response\}", prompt)
    assert prompt.format(request=request, response=response) == before + request + between + response + after


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("allenai/wildguard", "wildguard"),
        ("meta-llama/LlamaGuard-7b", "llama-guard"),
        ("meta-llama/Meta-Llama-Guard-2-8B", "llama-guard"),
        ("meta-llama/Llama-Guard-3-8B", "llama-guard"),
        ("meta-llama/Llama-Guard-3-1B", "llama-guard"),
        ("meta-llama/Llama-Guard-4-12B", "llama-guard"),
        ("meta-llama/Llama-3.1-8B", None),
        ("meta-llama/Prompt-Guard-86M", None),
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
        ("cais/HarmBench-Mistral-7b-val-cls", "harmbench-mistral"),
        ("cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors", None),
        ("NousResearch/Minos-v1", "minos"),
        ("someone/wildguard", None),
    ],
)
def test_known_ids(name: str, kind: str | None) -> None:
    found = recognise(name)
    assert (found.kind if found else None) == kind


def test_the_table_in_the_docs_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    rows = {row[0]: row for row in re.findall(r"^\| `([\w-]+)` \| `([^`]+)`.*\| ([^|]+) \| ([^|]+) \|$", page, re.M)}
    assert set(rows) == set(GUARDS)
    for kind, name, yes, no in rows.values():
        assert recognise(name) is GUARDS[kind]
        refusal = GUARDS[kind].says == "refusal"
        assert (yes, no) == (
            ("refused", "complied, or evaded by keywords")
            if refusal
            else ("complied", "refused by keywords, else evaded")
        )
