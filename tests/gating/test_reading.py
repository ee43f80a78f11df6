"""Plain text that two servers read: what they tell of a real model's distributions, and what is made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

import kvgeom
from kvgeom.evaluation.fidelity import Passages, Window, logits
from kvgeom.gating.client import TOP, Client
from kvgeom.gating.reading import TextRead, compared_text, least_divergence, read_text
from kvgeom.prompts.sets import perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.reading import read
from tests.builders.servers import REFUSAL, completion, fake_server
from tests.builders.tiny import tiny_model

TINY = tiny_model(seed=1)
TEXT = perplexity_text()[:400]
ROUGH = Recipe.uniform(3, Scheme(3))
PLACEMENT = Placement()


def reads(recipe: Recipe | None, most: int = 10_000, top: int = TOP) -> Any:
    """A server of the tiny model under a recipe, whose context holds so many characters."""

    def answer(body: dict[str, Any]) -> Any:
        if len(body["prompt"]) > most:
            return 400, {"error": {"message": "longer than the context"}}
        assert body["echo"]
        ids = TINY.tokens(body["prompt"])
        found = logits(TINY, Window((tuple(ids),), 0), recipe, PLACEMENT).double().log_softmax(-1).numpy()
        best = np.argsort(-found, axis=-1)[:, :top]
        return {
            "choices": [
                {
                    "logprobs": {
                        "tokens": [TINY.decode([token]) for token in ids],
                        "token_logprobs": [
                            None,
                            *(float(row[token]) for row, token in zip(found, ids[1:], strict=True)),
                        ],
                        # Words of a byte tokenizer may look alike: numbers stand for them.
                        "top_logprobs": [
                            None,
                            *({str(t): float(row[t]) for t in each} for row, each in zip(found, best, strict=True)),
                        ],
                    }
                }
            ]
        }

    return answer


def asked(**options: Any) -> TextRead | None:
    with fake_server(lambda body: completion(REFUSAL), **options) as server, Client(server.url + "/v1") as client:
        return read_text(client, "m", TEXT)


@pytest.mark.parametrize("top", [TOP, 10_000])
def test_what_servers_tell_is_what_the_model_does(top: int) -> None:
    exact, rough = asked(reads=reads(None, top=top)), asked(reads=reads(ROUGH, top=top))
    found = compared_text(exact, rough)
    ids = tuple(TINY.tokens(TEXT))
    text = Passages((ids[:201], ids[201:]), len(ids), len(ids))
    expected = read(TINY, text, ROUGH).against(read(TINY, text))
    assert found is not None
    assert found.perplexity_ratio.value == pytest.approx(expected.perplexity_ratio.value, rel=1e-4)
    assert found.top1.value == expected.top1.value
    assert 0 < found.kl.value <= expected.kl.value * (1 + 1e-4)
    assert top == TOP or found.kl.value == pytest.approx(expected.kl.value, rel=1e-3)


def test_as_much_is_read_as_the_server_takes() -> None:
    found = asked(reads=reads(None, most=150))
    assert found is not None
    assert len(found.tokens) == 99
    assert asked(reads=reads(None, most=10)) is None


@pytest.mark.parametrize(
    "answer",
    [
        None,
        lambda body: (400, {"error": {"message": "echo is not known"}}),
        lambda body: completion("one"),
        lambda body: {"choices": [{"text": " and", "logprobs": None}]},
        lambda body: {
            "choices": [{"logprobs": {"tokens": [" and"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}}]
        },
        lambda body: [],
    ],
)
def test_servers_that_tell_nothing(answer: Any) -> None:
    assert asked(reads=answer) is None


@given(
    st.lists(st.floats(-8, 8), min_size=6, max_size=12).flatmap(
        lambda one: st.tuples(st.just(one), st.lists(st.floats(-8, 8), min_size=len(one), max_size=len(one)))
    ),
    st.integers(1, 5),
)
def test_the_divergence_is_never_more_than_the_whole(values: tuple[list[float], list[float]], known: int) -> None:
    p, q = (special.softmax(each) for each in values)
    one, other = ({str(n): float(np.log(each[n])) for n in np.argsort(-each)[:known]} for each in (p, q))
    found = least_divergence(one, other)
    assert -1e-9 <= found <= stats.entropy(p, q) + 1e-9
    everything = [{str(n): float(np.log(value)) for n, value in enumerate(each)} for each in (p, q)]
    assert least_divergence(*everything) == pytest.approx(stats.entropy(p, q), rel=1e-5, abs=1e-9)


def test_other_tokens_are_not_compared() -> None:
    one = TextRead(["a", "b", "c"] * 2, [-1.0] * 6, [{"a": -1.0}] * 6)
    assert compared_text(one, TextRead(["a", "x", "c"] * 2, [-1.0] * 6, one.top)) is None
    assert compared_text(one, None) is None


def test_a_gate_reports_it() -> None:
    prompts = kvgeom.PromptSet("some", tuple(f"harm {n}" for n in range(4)), (), "tests")
    with (
        fake_server(lambda body: completion(REFUSAL), reads=reads(None)) as one,
        fake_server(lambda body: completion(REFUSAL, shift=0.1), reads=reads(ROUGH)) as other,
    ):
        found = kvgeom.gate(one.url, other.url, prompts=prompts, text=TEXT, progress=False)
    text, again = found.text_fidelity(), found.text_fidelity("repeat")
    assert text is not None
    assert again is not None
    assert text.perplexity_ratio.value != 1
    assert (again.perplexity_ratio.value, again.top1.value, again.kl.value) == (1, 1, 0)
    assert f"Of 399 tokens of plain text: perplexity {text.perplexity_ratio.value:.2f}x" in found.to_text()
