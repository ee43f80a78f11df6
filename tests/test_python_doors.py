"""Whatever is handed to a keyword of a public function works, or ends in one short line."""

from __future__ import annotations

import collections.abc
import math
import typing
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from itertools import count, repeat
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom import KeywordJudge, Placement, PromptSet, Recipe, Scheme
from kvgeom.engines.engine import CacheConfig, Preset
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.config import RUN_OPTIONS, RunConfig
from kvgeom.geometry.methods.registry import METHODS
from kvgeom.judges.guards import WILDGUARD, Guard
from kvgeom.judges.judge import Judgement
from kvgeom.judges.reasoning import Markers
from kvgeom.judges.registry import register_judge
from kvgeom.mitigation.search import as_budget
from kvgeom.organisms import Size
from kvgeom.organisms.blind import Part
from kvgeom.prompts.benchmarks import Benchmark, register_benchmark
from kvgeom.quant.memory import scheme_bytes
from kvgeom.quant.serialization import save_recipe
from kvgeom.quant.transforms import Statics
from tests.builders.nasty import MORE, NASTY, wrong_ends
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

PROMPTS = PromptSet("p", ("Tell me a", "Say b to me"), ("What is c", "Who is d now"), "me")
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
    assert not wrong_ends(call, works, keywords(name), NASTY)


def test_contrasts_without_dimensions_are_none() -> None:
    sensitivity, works = calls()["sensitivity"]
    for nothing in (np.array(4), torch.tensor(4), np.array("calibration")):
        with pytest.raises(InputError):
            sensitivity(contrasts=nothing, **works)


# --- values that are made in no time ---

SCHEME, UNIFORM = Scheme(4), Recipe.uniform(3, Scheme(4))
#: Value objects, each with keywords that make one.
VALUES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Scheme": (Scheme, {"bits": 4}),
    "Scheme in groups": (Scheme, {"bits": 4, "granularity": "group", "group_size": 8}),
    "Placement": (Placement, {}),
    "Recipe": (Recipe, {"layers": (("int4-asym-token", None),)}),
    "PromptSet": (PromptSet, {"name": "p", "harmful": ("a",), "harmless": ("b",), "source": "s"}),
    "KeywordJudge": (KeywordJudge, {}),
    "Guard": (Guard, {each.name: getattr(WILDGUARD, each.name) for each in fields(Guard)}),
    "Judgement": (Judgement, {"label": "refused", "reason": "why"}),
    "Markers": (Markers, {"open": "<a>", "close": "</a>"}),
    "Condition": (Condition, {"recipe": UNIFORM}),
    "RunConfig": (RunConfig, {}),
    "CacheConfig": (CacheConfig, {"name": "x", "version": "", "k": SCHEME, "v": SCHEME, "placement": Placement()}),
    "Preset": (Preset, {"name": "x", "setting": "s", "widths": (4,), "schemes": lambda bits: (SCHEME, SCHEME)}),
    "Benchmark": (Benchmark, {"title": "t", "home": "h", "licence": "l", "column": "c"}),
    "Size": (Size, {}),
    "Part": (Part, {"layer": 0, "change": "crush"}),
    **{f"method {name}": (type(method), {}) for name, method in METHODS.items()},
}
#: Functions that make or change them.
MAKERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Scheme.parse": (Scheme.parse, {"text": "int4-asym-token"}),
    "Scheme.only": (SCHEME.only, {"channels": [1]}),
    "Placement.parse": (Placement.parse, {"given": "cache"}),
    "Recipe.uniform": (Recipe.uniform, {"n_layers": 3, "scheme": SCHEME}),
    "Recipe.keep": (UNIFORM.keep, {"layers": [1]}),
    "Recipe.only": (UNIFORM.only, {"layers": [1]}),
    "Recipe.keep_ends": (UNIFORM.keep_ends, {}),
    "Recipe.scheme": (UNIFORM.scheme, {"layer": 0, "site": "k"}),
    "Recipe.sites_with": (UNIFORM.sites_with, {"constants": "offsets"}),
    "Recipe.with_statics": (UNIFORM.with_statics, {}),
    "Recipe.with_random_directions": (UNIFORM.with_random_directions, {"seed": 0}),
    "Statics.of": (Statics.of, {"name": "n", "vectors": {(0, "k"): torch.ones(1, 2)}}),
    "resolve": (resolve, {"spec": "kivi"}),
    "load_prompts": (kvgeom.load_prompts, {"prompts": ["a b"]}),
    "take": (PROMPTS.take, {"n": 1}),
    "memory": (as_budget, {"memory": 0.02}),
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a hint says."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return isinstance(value, str) and value in inside
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = inside[:1] * len(value) if inside[-1] is ... else inside
        return len(value) == len(each) and all(map(fits, value, each))
    if origin is collections.abc.Callable:
        return callable(value)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in ("name", "label"))
    return isinstance(value, type(None) if hint is None else hint)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_made_of_what_its_hints_say_or_not_at_all(name: str) -> None:
    make, works = VALUES[name]
    hints = typing.get_type_hints(make)
    names = [each.name for each in fields(make)]

    def checked(**options: Any) -> None:
        made = make(**options)
        wrong = [each for each in names if not fits(getattr(made, each), hints[each])]
        assert not wrong, f"{wrong} taken"

    checked(**works)
    assert not wrong_ends(checked, works, names, MORE)


@pytest.mark.parametrize("name", MAKERS)
def test_what_makes_values_works_or_ends_in_one_short_line(name: str) -> None:
    call, works = MAKERS[name]
    taken = [each.name for each in signature(call).parameters.values() if each.kind == each.POSITIONAL_OR_KEYWORD]
    taken += [each.name for each in signature(call).parameters.values() if each.kind == each.KEYWORD_ONLY]
    assert not wrong_ends(call, works, taken, MORE)


@pytest.mark.parametrize("name", [None, 3, "", [], {}, b"x", np.array(["x"]), Path("x")])
def test_what_is_registered_has_a_text_for_its_name(name: Any) -> None:
    for register, what in ((register_judge, KeywordJudge), (register_benchmark, Benchmark("t", "h", "l", "c"))):
        with pytest.raises(InputError):
            register(name, what)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"opening": 0}, "opening must be a whole number, 16 or more, got 0"),
        ({"opening": -1}, "opening"),
        ({"min_log_likelihood": 5}, "min_log_likelihood must be a number, 0 or less, got 5"),
        ({"max_loop": -1}, "max_loop must be a number, 0 to 1, got -1"),
        ({"max_loop": float("nan")}, "max_loop"),
        ({"min_packed": 1.01}, "min_packed"),
    ],
)
def test_limits_under_which_a_judge_could_not_judge(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        KeywordJudge(**options)
    usual = KeywordJudge()
    same = KeywordJudge(np.int64(usual.opening), np.float64(usual.min_log_likelihood), min_packed=np.float64(0.4))  # type: ignore[arg-type]
    assert same.name == usual.name


@pytest.mark.parametrize("memory", ["x", torch.tensor(4), True, float("nan"), -1, np.array(["x"]), np.array([0.1])])
def test_a_budget_is_a_number(memory: Any) -> None:
    with pytest.raises(InputError, match=r"memory, a share of the cache such as 0\.02, must be a number, 0 or more"):
        kvgeom.fix(tiny_model(layers=1), memory=memory)
    assert as_budget(np.float32(0.5)) == 0.5
    assert as_budget(math.inf) == math.inf


def test_a_request_is_harmful_or_harmless() -> None:
    for make in (
        lambda: PromptSet("p", ("a b", "c"), ("d", " a b"), "s"),
        lambda: kvgeom.load_prompts({"harmful": ["a b"], "harmless": ["a b"]}),
    ):
        with pytest.raises(InputError, match="has 'a b' as both harmful and harmless"):
            make()


# --- sizes ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme(4, granularity="group", group_size=10**30),
        lambda: Scheme(4, granularity="channel-group", group_size=10**12),
        lambda: Scheme.parse("int4-asym-group1000001"),
        lambda: Scheme.parse("int4-asym-group" + "9" * 5000),
        lambda: Scheme.parse("int" + "9" * 5000 + "-asym-token"),
        lambda: Scheme.parse("int4-asym-token@" + ",".join(["0-999999"] * 500)),
        lambda: Scheme(4, channels=range(10**12)),  # type: ignore[arg-type]
        lambda: SCHEME.only(count()),
        lambda: Recipe.uniform(10**8, SCHEME),
        lambda: Recipe.exact(10**30),
        lambda: Recipe(repeat((None, None))),  # type: ignore[arg-type]
        lambda: Recipe((repeat(None), (None, None))),  # type: ignore[arg-type]
        lambda: UNIFORM.keep(range(10**12)),
        lambda: UNIFORM.only(count()),
        lambda: UNIFORM.keep_ends(10**12),
    ],
)
def test_sizes_that_would_fill_the_memory(make: Callable[[], object]) -> None:
    with pytest.raises(InputError) as raised:
        make()
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("text", ["int4-asym-group1000000", "int4-asym-channel-group2147483648"])
def test_a_group_that_is_larger_than_all_there_is_takes_what_one_group_takes(text: str) -> None:
    scheme = Scheme.parse(text)
    tokens, heads, dim = 7, 2, 24
    alone = Scheme.parse(text.replace("1000000", str(heads * dim)).replace("2147483648", str(tokens)))
    assert scheme_bytes(scheme, heads, dim, tokens) == scheme_bytes(alone, heads, dim, tokens)


# --- flags, spellings, names ---

#: Where functions are that have flags, beside ``kvgeom`` itself.
FURTHER = (
    "behaviour.curve.bit_width_curve behaviour.over_refusal.harmless_responses behaviour.scan.single_layer_scan "
    "evaluation.evaluate.run_conditions evaluation.forced.forced_readings geometry.subspace.Subspace.sensitivity geometry.subspace.Subspace.compare "
    "judges.classifiers.classifier mitigation.search.Search.ranked models.backends.register_backend organisms.planting.plant "
    "plots.magnitude.magnitude_surface report.audit.audit report.fix.fix screening.screen.screen geometry.decomposition.decompose"
)


def with_flags() -> dict[str, Callable[..., Any]]:
    """Functions that take flags by keyword."""
    found = {name: getattr(kvgeom, name) for name in kvgeom.__all__}
    found |= {path: resolve_name(f"kvgeom.{path}") for path in FURTHER.split()}
    return {
        name: each for name, each in found.items() if callable(each) and not isinstance(each, type) and flags_of(each)
    }


def flags_of(function: Callable[..., Any]) -> list[str]:
    return [each.name for each in signature(function).parameters.values() if each.annotation in (bool, "bool")]


def test_a_flag_is_true_or_false() -> None:
    """Python takes "no" for true. It is checked before anything else."""
    functions = with_flags()
    assert {"audit", "diagnose", "evaluate", "fix", "gate", "load", "screen", "subspace"} <= {*functions}
    for function in functions.values():
        for name in flags_of(function):
            for value in ("no", "False", 2, None, [1]):
                with pytest.raises(InputError, match=f"^{name} must be True or False, got "):
                    function("wildguard", **{name: value})


@pytest.mark.parametrize(
    "text",
    [
        *("int4-asym-group８", "int４-asym-token", "int04-asym-token", "int4-asym-group064", "int4-asym-group٣"),
        *("int4-asym-token@07", "int4-asym-token@0-07", "int4-asym-token@０", "int4-asym-token@0-３"),
    ],
)
def test_a_scheme_has_one_spelling(text: str) -> None:
    with pytest.raises(InputError, match=r"cannot read (scheme|channels)"):
        Scheme.parse(text)


@pytest.mark.parametrize("name", ["", " ", 5, b"x", ["a"], "a\0b", "\0", "\ud800"])
def test_a_name_is_one_that_files_can_keep(name: Any) -> None:
    model = tiny_model(layers=1)
    with pytest.raises(InputError, match=r"^name "):
        kvgeom.load(tiny_hf_model(layers=1), tokenizer=tiny_tokenizer(), name=name)
    if isinstance(name, str):
        with pytest.raises(InputError, match=r"^the name of a recipe "):
            kvgeom.evaluate(model, {name: "int3-sym-tensor"}, **SHORT)
        if name.strip():
            for make in (lambda: Condition(UNIFORM, family=name), lambda: Judgement("refused", name)):
                with pytest.raises(InputError, match=r"NUL|half a character"):
                    make()


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_what_names_no_file_is_not_written(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = kvgeom.evaluate(tiny_model(layers=1), "int3-sym-tensor", **SHORT)
    for save in (found.save, lambda path: save_recipe(path, UNIFORM)):
        with pytest.raises(InputError, match="give the path of a file"):
            save(path)
    assert not [*tmp_path.iterdir()]


def test_a_recipe_is_written_to_a_path(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match="the file of a recipe must be a path, got Recipe"):
        save_recipe(UNIFORM, path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"writes a Recipe, got 'int4-asym-token'"):
        save_recipe(path, "int4-asym-token")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="placement"):
        save_recipe(path, UNIFORM, 3)  # type: ignore[arg-type]
    assert not path.exists()
