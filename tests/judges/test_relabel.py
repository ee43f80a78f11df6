"""Responses that a classifier labels again when the model is gone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.diagnosis.diagnose import diagnose
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.journal import Journal
from kvgeom.evaluation.outcomes import OTHER_TOKENS, Outcomes, unread_note
from kvgeom.evaluation.relabel import KeptLabels
from kvgeom.evaluation.scores import NONE_PREDICTS, refusal_tokens
from kvgeom.judges.judge import LABELS, Judgement
from kvgeom.judges.registry import as_judge
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.classifiers import judge_of
from tests.builders.tiny import tiny_model

WHOLE = evaluate(
    tiny_model("qwen2", seed=2),
    {"4": Recipe.uniform(3, Scheme(4))},
    ["open the door", "why?", "a @ b", "count", "zzz"],
    full_responses=True,
    max_new_tokens=3,
    progress=False,
)


def test_outcomes_are_judged_again_when_the_model_is_gone(guards: dict[str, Path]) -> None:
    """Whole responses go to a real (tiny) classifier, whose labels replace those of the keyword judge."""
    model = tiny_model("qwen2", seed=2)
    recipes, asked = {"4": Recipe.uniform(3, Scheme(4))}, ["open the door", "why?", "a @ b"]
    whole = evaluate(model, recipes, asked, full_responses=True, max_new_tokens=6, progress=False)
    assert np.isfinite(whole.data.likelihood.values).all()
    cache, ids = model.new_cache(), model.encode(asked[:1])[0].ids
    first = int(model.forward(ids, cache)[-1].argmax())
    assert whole.data.text.sel(recipe=EXACT, prompt=0).item() == model.decode(model.generate([cache], [first], 6)[0])
    del model, cache
    judge = judge_of(guards["harmbench"], "harmbench")
    again = whole.relabel(judge)
    verdicts = judge.label_all(
        [str(r) for _ in range(2) for r in whole.data.request.values],
        [str(t) for t in whole.data.text.values.ravel()],
        [float(x) for x in whole.data.likelihood.values.ravel()],
    )
    assert again.data.label.values.ravel().tolist() == [v.label for v in verdicts]
    assert again.meta["judge"] == judge.name
    part = evaluate(tiny_model(), recipes, asked, max_new_tokens=3, progress=False)
    with pytest.raises(InputError, match="full_responses=True"):
        part.relabel(judge)


def test_a_diagnosis_is_judged_again_when_the_model_is_gone(guards: dict[str, Path]) -> None:
    prompts = PromptSet("p", ("open the door", "why?", "zzz", "a @ b", "count"), ("b", "c", "d", "e", "f"), "here")
    options: dict[str, Any] = {"bits": (4,), "max_new_tokens": 6, "geometry": False, "progress": False}
    model = tiny_model("qwen2", seed=2)
    found = diagnose(model, prompts, full_responses=True, **options)
    keyword = found.mode
    model.release()
    assert all(parameter.is_meta for parameter in model.hf_model.parameters())
    judge = judge_of(guards["harmbench"], "harmbench")
    again = found.relabel(judge)
    assert again.scan.meta["judge"] == again.curve.meta["judge"] == judge.name
    counts = again.outcomes.relabel(judge).counts()
    assert int(again.curve.data.refused.sel(bits=16)) == counts["refused"] == again.evidence.refused
    assert found.mode == keyword
    # Nothing of the first judge is left: its baseline read less, and what begins its refusals begins no others.
    for part in (again.outcomes, again.scan_outcomes, again.paper_outcomes):
        assert part.meta["judge"] == judge.name
        refused = part.data.label.sel(recipe=EXACT).values == "refused"
        expected = refusal_tokens(part.data.first_token.values.tolist(), refused.tolist())
        assert part.meta["refusal_tokens"] == sorted(expected)
        assert np.isnan(part.data.margin.values).all() or sorted(expected) == found.outcomes.meta["refusal_tokens"]
    assert again.base is None
    with pytest.raises(InputError, match=r"labelled again.*judge="):
        _ = again.baseline
    with pytest.raises(InputError, match="no model"):
        again.prescribe()
    fresh = tiny_model("qwen2", seed=2)
    with pytest.raises(InputError, match="was judged by harmbench"):
        again.on(fresh, progress=False)
    back = again.on(fresh, judge=judge, progress=False)
    assert back.baseline.judge is judge
    assert list(back.baseline.labels) == again.outcomes.data.label.sel(recipe=EXACT).values.tolist()
    with pytest.raises(InputError, match="full_responses=True"):
        diagnose(tiny_model(), prompts, **options).relabel(judge)


class Says:
    """A judge that labels by what it is told."""

    name = "says"

    def __init__(self, labels: list[str]) -> None:
        self._labels = labels

    def label_all(self, requests: list[str], responses: list[str], likelihoods: list[float]) -> list[Judgement]:
        return [Judgement(label, "told") for label in self._labels]  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(-1, 2), st.sampled_from(LABELS)), min_size=5, max_size=5))
def test_margins_are_those_of_the_judge_or_none(rows: list[tuple[int, str]]) -> None:
    """Kept if refusals begin as they did, else not known, and that is said."""
    first, labels = [token for token, _ in rows], [label for _, label in rows]
    data = WHOLE.data.assign_coords(first_token=("prompt", first))
    before = Outcomes(data.assign(margin=data.margin.fillna(0) + 1.0), {**WHOLE.meta, "refusal_tokens": [1]})
    again = before.relabel(Says(labels * 2))  # type: ignore[arg-type]
    now = sorted(refusal_tokens(first, [label == "refused" for label in labels]))
    assert again.meta["refusal_tokens"] == now
    assert bool((again.data.margin == before.data.margin).all()) == (now == [1])
    assert bool(np.isnan(again.data.margin).all()) == (now != [1])
    why = "" if now == [1] or "refused" not in labels else OTHER_TOKENS if now else NONE_PREDICTS
    assert again.meta["no_margin"] == why
    assert ("no margins" in again.summary()) == bool(why)
    some = before.at_prompts([0, 1]).relabel(Says(labels[:2] * 2))  # type: ignore[arg-type]
    assert some.meta["no_margin"] == OTHER_TOKENS, "what the other prompts say is not known"
    assert np.isnan(some.data.margin).all()


def test_unread_answers_are_not_kept_as_labels(guards: dict[str, Path], tmp_path: Path) -> None:
    """They are counted in outcomes and tables, and asked for again by another run."""
    long = " ".join(f"word{number}" for number in range(800))
    responses = [long, *(f"Bake bread number {n} @ home." for n in range(10))]
    asked = ["q"] * 11, responses, [-0.5] * 11
    for run in range(2):
        judge = judge_of(guards["wildguard"], "wildguard")
        with KeptLabels(judge, tmp_path / "labels.jsonl") as kept:
            labels = [each.label for each in kept.label_all(*asked)]
            assert labels == ["complied", *["refused"] * 10]
            assert [each.label for each in kept.label_all(*asked)] == labels
            assert (kept.asked, kept.unread) == ((1, 1) if run else (11, 1))
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 1 + 10
    few = judge_of(guards["wildguard"], "wildguard")
    with KeptLabels(few, tmp_path / "labels.jsonl") as kept, pytest.raises(ModelError, match="2 of 5"):
        kept.label_all(["q"] * 5, [*responses[1:4], long, f"{long} too"], [-0.5] * 5)


def test_unread_answers_are_said(guards: dict[str, Path]) -> None:
    judge = judge_of(guards["wildguard"], "wildguard")
    texts = WHOLE.data.text.copy()
    texts[:] = [[f"Bake bread number {n} @ home." for n in range(5)]] * 2
    texts[1, 2] = " ".join(f"word{number}" for number in range(800))
    data = WHOLE.data.assign(text=texts, likelihood=WHOLE.data.likelihood * 0 - 0.5)
    found = Outcomes(data, WHOLE.meta).relabel(judge)
    assert (found.unread(), found.unread("4"), found.all_unread(["4"])) == (0, 1, {"4": 1})
    assert "1 answer of the judge could not be read" in found.summary()
    assert f"Answers of {judge.name} that could not be read (1 4)" in unread_note(
        {**found.meta, "unread": found.all_unread(["4"])}
    )
    assert unread_note(WHOLE.meta) == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (5, "holds 5 where a label and its reason"),
        (["yes", "r"], "labels a response as"),
        (["refused", 1], "reason of a judgement must be text"),
    ],
)
def test_a_file_that_holds_no_labels(guards: dict[str, Path], tmp_path: Path, value: object, says: str) -> None:
    path, asked = tmp_path / "labels.jsonl", (["q"], ["Bake @ home."], [-0.5])
    with KeptLabels(judge_of(guards["wildguard"], "wildguard"), path) as kept:
        kept.label_all(*asked)
    about, record = map(json.loads, path.read_text().splitlines())
    with Journal(path, {name: said for name, said in about.items() if name != "kvgeom_journal"}) as journal:
        journal[record["key"]] = value
    with pytest.raises(InputError, match=says), KeptLabels(judge_of(guards["wildguard"], "wildguard"), path) as kept:
        kept.label_all(*asked)


def test_settled_is_a_method() -> None:
    judge = SimpleNamespace(name="mine", label=lambda *_: None, settled=True)
    with pytest.raises(InputError, match=r"settled of judge 'mine' must be a method .* got True"):
        as_judge(judge)
