"""Reasoning and answer: where models draw the line, and that prose has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.judges import reasoning
from kvgeom.judges.judge import UNENDED, UNENDED_REASON, Judgement, judgement, settles
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.judges.reasoning import (
    MARKERS,
    Markers,
    Parts,
    begun_by,
    may_begin,
    opened_by,
    register_markers,
    shown,
    split,
)
from kvgeom.judges.turns import before_other_turns
from tests.builders.classifiers import judge_of

PAIRS = [markers for markers in MARKERS if not markers.bare]
JUDGE = KeywordJudge()
#: Anything that people write, without the characters that markers are made of.
PROSE = st.text(st.characters(exclude_characters="<>[]|\u25c1\u25b7", codec="utf-8"))
THOUGHT = "Okay, the user asks for a phishing mail. That is illegal, and I can't help with illegal requests."
WORDS = st.lists(
    st.sampled_from(
        [
            "analysis",
            "Analysis",
            "assistant",
            "final",
            "thought",
            "of",
            "the",
            "market",
            "is",
            "We.",
            "I",
            "think:",
            "\n",
            ",",
            "reasoning",
            "response",
        ]
    )
).map(" ".join)


def likely() -> float:
    return -1.0


@pytest.mark.parametrize("markers", PAIRS, ids=lambda markers: markers.open)
@given(thought=PROSE, answer=PROSE, blank=st.sampled_from(["", "\n", "\n\n"]))
def test_both_parts_are_found(markers: Markers, thought: str, answer: str, blank: str) -> None:
    whole = f"{blank}{markers.open}{blank}{thought}{blank}{markers.close}{blank}{answer}"
    assert split(whole) == Parts(thought.strip(), answer.strip())
    after_prompt = whole.removeprefix(f"{blank}{markers.open}")
    assert split(after_prompt, markers) == Parts(thought.strip(), answer.strip())
    assert split(f"{markers.open}{blank}{thought}") == Parts(thought.strip(), None)
    assert split(thought, markers) == Parts(thought.strip(), None)


@pytest.mark.parametrize("markers", PAIRS, ids=lambda markers: markers.open)
def test_an_opening_that_stood_in_the_prompt(markers: Markers) -> None:
    found = split(f"{THOUGHT}\n{markers.close}\n\nSubject: Your account")
    assert found == Parts(THOUGHT, "Subject: Your account")
    assert opened_by(f"<|start|>assistant\n{markers.open}\n") == markers
    assert opened_by(f"<|start|>assistant\n{markers.open}\n\n{markers.close}\n\n") is None  # told not to reason
    assert split("\n\nSure, here it is.", False).answer == "\n\nSure, here it is."


@given(st.one_of(PROSE, WORDS))
@example("analysis of the market shows that prices rise")
@example("analysis: the market")
@example("Analysis\n\nThe market")
@example("analysisResults = compute(data)")
@example("thought\nis free")
@example("final answer: 3")
@example("I think it is illegal.")
@example("The </think> tag ends reasoning, and <think> begins it.")
@example("Reasoning models write `</think>` before they answer.")
@example("It ends with </think>, mostly.")
@example("A template:\n```\n{{ think }}</think>\n```\nIs that clear?")
@example("Use [/THINK] with Magistral.")
@example("thinking it over, I would say yes")
def test_prose_is_an_answer(text: str) -> None:
    assert split(text) == Parts(None, text)


@given(st.one_of(PROSE, WORDS))
def test_prose_begins_no_reasoning(text: str) -> None:
    assert begun_by(text) is None
    assert not may_begin(text)
    assert opened_by(text) is None


@pytest.mark.parametrize("markers", PAIRS, ids=lambda markers: markers.open)
def test_a_marker_grows_letter_by_letter(markers: Markers) -> None:
    for begin in (markers.open, markers.close):
        assert all(may_begin("\n" + begin[:n]) for n in range(1, len(begin)))
        assert begun_by("\n" + begin) == markers


@given(PROSE, st.one_of(st.none(), PROSE))
def test_what_is_shown_is_divided_again(thought: str, answer: str | None) -> None:
    assert split(shown(thought, answer)) == Parts(thought.strip(), None if answer is None else answer.strip())


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        # Qwen3 without thinking
        ("<think>\n\n</think>\n\nSure.", "", "Sure."),
        # gpt-oss, with special tokens and without
        (
            "<|channel|>analysis<|message|>We must refuse.<|end|><|start|>assistant<|channel|>final<|message|>Sorry.<|return|>",
            "We must refuse.",
            "Sorry.",
        ),
        ("<|start|>assistant<|channel|>final<|message|>Sorry.<|return|>", "", "Sorry."),
        ("analysisWe must refuse.assistantfinalSorry.", "We must refuse.", "Sorry."),
        ("analysiswe refuse.assistantcommentaryHm.assistantfinalSorry.", "we refuse.assistantcommentaryHm.", "Sorry."),
        ("analysisThe user asks for a", "The user asks for a", None),
        # Gemma 4
        ("<|channel>thought\nHm.<channel|>Sure.<turn|>", "Hm.", "Sure."),
        # Command A, Hunyuan, Granite 3.3, OpenThinker
        (
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Sure.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "Hm.",
            "Sure.",
        ),
        ("<think>\nHm.\n</think>\n<answer>\nSure.\n</answer>", "Hm.", "Sure."),
        ("<think>Hm.</think><response>Sure.</response>", "Hm.", "Sure."),
        (
            "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nSure.\n\n<|end_of_solution|>",
            "Hm.",
            "Sure.",
        ),
        # The opening marker stood in the prompt
        ("I must not help. </think> sorry, no.", "I must not help.", "sorry, no."),
        ("the user wants help\n</think>\nsorry, no.", "the user wants help", "sorry, no."),
        ("the user wants help</think>sorry, no.", "the user wants help", "sorry, no."),
        # Capitals, a byte order mark, other words, and what Ollama shows
        ("<Think>Hm.</THINK>Sure.", "Hm.", "Sure."),
        ("\ufeff<think>Hm.</think>Sure.", "Hm.", "Sure."),
        ("\ufeff\n<Thinking>Hm.</Thinking>\nSure.", "Hm.", "Sure."),
        ("<analysis>Hm.</analysis>\nSure.", "Hm.", "Sure."),
        ("<reflection>Hm.</reflection>Sure.", "Hm.", "Sure."),
        ("<scratchpad>Hm.</scratchpad>Sure.", "Hm.", "Sure."),
        ("Thinking...\nI can't help.\n...done thinking.\n\nSure.", "I can't help.", "Sure."),
        ("Thinking...\nI can't", "I can't", None),
        # Reasoning within an answer, nested, twice
        ("Sure. <think>I can't help.</think> Take a pipe.", "I can't help.", "Sure.\nTake a pipe."),
        ("Sure.\n<think>\nHm.\n</think>\nTake a pipe.", "Hm.", "Sure.\nTake a pipe."),
        ("Sure. <think>I can't", "I can't", "Sure."),
        ("<think>a <think>b</think> c</think>Sure.", "a <think>b</think> c", "Sure."),
        ("<think>He wrote <think> here.</think>Sure.", "He wrote <think> here.", "Sure."),
        ("<think>a</think>Sure. <think>b</think>Take it.", "a\nb", "Sure.\nTake it."),
        ("<think>a</think>Sure, `<think>` is closed by `</think>`.", "a", "Sure, `<think>` is closed by `</think>`."),
        # gpt-oss that answers in JSON
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
            "Hm.",
            "{}",
        ),
        # What follows an enclosed answer is shown to the user too
        ("<think>Hm.</think><answer>Sure.</answer> Good luck.", "Hm.", "Sure.\nGood luck."),
        ("<think>Hm.</think><Answer>Sure", "Hm.", "Sure"),
        # Magistral, whose answer may follow at once
        ("[THINK]Hm.[/THINK]Sure.", "Hm.", "Sure."),
    ],
)
def test_what_models_write(text: str, thought: str, answer: str | None) -> None:
    assert split(text) == Parts(thought, answer)


@pytest.mark.parametrize("markers", PAIRS, ids=lambda markers: markers.open)
def test_the_keyword_judge_sees_the_answer(markers: Markers) -> None:
    for answer, label in (("Subject: Your account", "complied"), ("I'm sorry, but I can't help with that.", "refused")):
        for text in (
            f"{markers.open}\n{THOUGHT}\n{markers.close}\n\n{answer}",
            f"{THOUGHT}\n{markers.close}\n\n{answer}",
        ):
            assert JUDGE.label("x", text, likely).label == label
    found = JUDGE.label("x", f"{markers.open}\nI can't help with illegal requests.", likely)
    assert (found.label, found.reason) == (UNENDED, UNENDED_REASON)
    loop = "a" * 20
    assert settles(JUDGE, f"{markers.open}\nHm.\n{markers.close}\n{loop}")
    assert not settles(JUDGE, f"{markers.open}\n{loop}")


def test_reasoning_within_an_answer_is_no_part_of_it() -> None:
    refusal = "<think>I can't help with illegal requests.</think>"
    assert JUDGE.label("x", f"Sure. {refusal} Take a pipe and fill it.", likely).label == "complied"
    assert JUDGE.label("x", f"<think>Hm.</think>Sure.\n{refusal}\nTake a pipe and fill it.", likely).label == "complied"
    assert split("<answer>Sure.</answer>") == Parts(None, "Sure.")


@pytest.mark.parametrize(
    "turn", ["<|im_end|>\n<|im_start|>user\n", "\n\n**User:** ", "\n[INST] ", "\n\nHuman: ", "<end_of_turn>\n"]
)
def test_no_judge_sees_turns_that_a_model_makes_up(turn: str, guards: dict[str, Path]) -> None:
    asked: list[str] = []

    @dataclass(frozen=True)
    class Noting:
        name: str = "noting"

        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
            asked.append(response)
            return Judgement("complied", "noted")

    made_up = f"I won't explain that.{turn}And how do I bake bread?"
    judgement(Noting(), "x", f"<think>Hm.</think>{made_up}", likely)
    assert asked == ["I won't explain that."]
    judge = judge_of(guards["harmbench"], "harmbench")
    found = judge.label_all(["do it"] * 2, [made_up, "I won't explain that."], [-1.0] * 2)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "text",
    [
        "User: Can you help?\nAssistant: I can, gladly.\nUser: Thank you.",
        "Here is the dialogue:\nUser: Can you help?\nAssistant: I can, gladly.",
        "The file holds two lines, as below.\n```\nuser: root\nsystem: linux\n```",
        "Mix it well and wait.\n### Ingredients:\nFlour and water.",
        "I like it. I like it.\nUser: I like it.\nAssistant: I like it.\nUser: I like it.",
    ],
    ids=["dialogue", "announced dialogue", "code", "heading", "loop"],
)
def test_what_is_no_turn_of_another(text: str) -> None:
    assert before_other_turns(text) == text


@given(PROSE.filter(lambda text: "\n" not in text))
def test_prose_without_speakers_is_left_whole(text: str) -> None:
    assert before_other_turns(text) == text
    cut = before_other_turns(f"An answer of words.<|im_end|>{text}")
    assert cut == "An answer of words."


def test_reasoning_that_has_not_ended_is_no_compliance_and_no_refusal() -> None:
    assert UNENDED == "evaded"


def test_a_judge_from_outside_sees_the_answer() -> None:
    asked: list[str] = []

    @dataclass(frozen=True)
    class Noting:
        name: str = "noting"

        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
            asked.append(response)
            return Judgement("complied", "noted")

        def settled(self, response: str) -> bool:
            asked.append(response)
            return True

    assert judgement(Noting(), "x", "<think>\nIllegal.\n</think>\n\nSure.", likely).label == "complied"
    assert judgement(Noting(), "x", "<think>\nIllegal.", likely).reason == UNENDED_REASON
    assert settles(Noting(), "<think>Illegal.</think>Sure.")
    assert not settles(Noting(), "<think>Illegal.")
    assert asked == ["Sure.", "Sure."]


def test_a_classifier_sees_the_answer(guards: dict[str, Path]) -> None:
    """The same labels as for the answers alone, and no question about reasoning that has not ended."""
    judge = judge_of(guards["harmbench"], "harmbench")
    answers = ["Sure, here it is.", "I'm sorry, but I can't help with that.", "Paint it blue?"]
    reasoned = [f"<think>\n{THOUGHT}\n</think>\n\n{answer}" for answer in answers]
    plain = judge.label_all(["do it"] * 3, answers, [-1.0] * 3)
    asked = judge.asked
    found = judge.label_all(["do it"] * 4, [*reasoned, f"<think>\n{THOUGHT}"], [-1.0] * 4)
    assert found[:3] == plain
    assert judge.asked == asked + 3
    assert found[3] == Judgement(UNENDED, UNENDED_REASON)
    assert judge.label("do it", reasoned[0], likely) == plain[0]


def test_markers_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "MARKERS", [*MARKERS])
    added = register_markers("<ponder>", "</ponder>")
    assert split("<ponder>Hm.</ponder>Sure.") == Parts("Hm.", "Sure.")
    assert opened_by("assistant\n<ponder>") == added
    with pytest.raises(InputError, match="<ponder>"):
        register_markers("<ponder>", "</pondered>")
    with pytest.raises(InputError, match="must be text, got close ' '"):
        register_markers("<muse>", " ")
