"""Responses that a classifier labels again when the model is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvgeom.diagnosis.diagnose import diagnose
from kvgeom.errors import InputError
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.classifiers import judge_of
from tests.builders.tiny import tiny_model


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
    with pytest.raises(InputError, match="full_responses=True"):
        diagnose(tiny_model(), prompts, **options).relabel(judge)
