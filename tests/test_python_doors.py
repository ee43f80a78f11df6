"""Whatever is handed to a keyword of a public function works, or ends in one short line."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvgeom
from kvgeom.errors import KvgeomError
from kvgeom.evaluation.config import RUN_OPTIONS
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 1.5, float("nan"), "", "x", b"x", [], {}, object(), 10**30, "a" * 5000, np.array([1])),
    *(Path("nope"), [None], ["x", 3], {"x": 1}, "\udcff", "~nobody/x", {1, 2}, 2 + 3j, [[]]),
)
PROMPTS = kvgeom.PromptSet("p", ("Tell me a", "Say b to me"), ("What is c", "Who is d now"), "me")
SHORT = {"prompts": ["Hi you"], "max_new_tokens": 2, "progress": False}


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each function, and keywords with which it works."""
    model, space = tiny_model(layers=2), kvgeom.subspace(tiny_model(layers=2), PROMPTS, progress=False)
    return {
        "load": (lambda **options: kvgeom.load(tiny_hf_model(layers=1), **options), {"tokenizer": tiny_tokenizer()}),
        "baseline": (lambda **options: kvgeom.baseline(model, **options), SHORT),
        "evaluate": (lambda **options: kvgeom.evaluate(model, **options), {**SHORT, "recipes": "int3-sym-tensor"}),
        "subspace": (lambda **options: kvgeom.subspace(model, **options), {"prompts": PROMPTS, "progress": False}),
        "sensitivity": (space.sensitivity, {"progress": False}),
    }


def keywords(name: str) -> list[str]:
    target = kvgeom.Subspace.sensitivity if name == "sensitivity" else getattr(kvgeom, name)
    taken = [each.name for each in signature(target).parameters.values() if each.kind == each.KEYWORD_ONLY]
    return [*dict.fromkeys([*taken, *(RUN_OPTIONS if name in ("baseline", "evaluate") else ())])]


@pytest.mark.parametrize("name", ["load", "baseline", "evaluate", "subspace", "sensitivity"])
def test_whatever_is_given_works_or_ends_in_one_short_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, works = calls()[name]
    call(**works)
    long = []
    for keyword in keywords(name):
        for value in NASTY:
            try:
                call(**works | {keyword: value})
            except KvgeomError as error:
                if len(str(error)) > 800 or "\n" in str(error):
                    long.append((keyword, str(error)))
    assert not long
