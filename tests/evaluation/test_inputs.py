"""What users write where a model, recipes, prompts and options are due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import kvgeom
from kvgeom.behaviour.ablation import ablate, channel_magnitudes, channel_subsets, whole_cache
from kvgeom.behaviour.curve import bit_width_curve
from kvgeom.behaviour.pcr import per_channel_reduction
from kvgeom.behaviour.scan import single_layer_scan
from kvgeom.behaviour.widths import at_widths
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import EXACT, Condition, as_conditions, with_model_constants
from kvgeom.evaluation.evaluate import evaluate, run_conditions
from kvgeom.judges.judge import Judgement
from kvgeom.models.hf import HFModel
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import PAIRS, REQUESTS
from tests.builders.tiny import tiny_model, wide_model

OPTIONS: dict[str, Any] = {"judge": ArbitraryJudge(), "max_new_tokens": 3, "progress": False}


@pytest.fixture(scope="module")
def tiny() -> HFModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def biased() -> HFModel:
    return wide_model()


@pytest.mark.parametrize(
    "prompts",
    [
        list(PAIRS.harmful),
        pd.Series(PAIRS.harmful),
        np.array(PAIRS.harmful),
        PAIRS,
        {"harmful": list(PAIRS.harmful)},
        pd.DataFrame({"prompt": PAIRS.harmful}),
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_prompts_however_they_are_given(checkpoint: Path, tiny: HFModel, prompts: object) -> None:
    """A folder stands for its model, a string for its scheme; the result is that of the objects themselves."""
    found = evaluate(str(checkpoint), ["int4-asym-token"], prompts, placement="paper", **OPTIONS)
    recipe = Recipe.uniform(3, Scheme.parse("int4-asym-token"))
    expected = evaluate(tiny, {"int4-asym-token": recipe}, PAIRS, placement=Placement.paper(), **OPTIONS)
    assert list(found.data.recipe.values) == [EXACT, "int4-asym-token"]
    assert (found.data.request.values == list(PAIRS.harmful)).all()
    assert (found.data.placement.sel(recipe="int4-asym-token") == str(Placement.paper())).all()
    for column in ("label", "text", "divergence", "tokens"):
        np.testing.assert_array_equal(found.data[column].values, expected.data[column].values)
    np.testing.assert_allclose(found.data.margin.values, expected.data.margin.values, atol=1e-4)
    np.testing.assert_allclose(found.data.kl.values, expected.data.kl.values, atol=1e-4)


def test_a_named_set_of_prompts(tiny: HFModel) -> None:
    found = evaluate(tiny, "int4-asym-token", "held-out", judge=ArbitraryJudge(), max_new_tokens=1, progress=False)
    assert found.data.sizes["prompt"] == len(kvgeom.load_prompts("held-out").harmful)


def test_recipes_however_they_are_given(tiny: HFModel) -> None:
    """A scheme, its name, a condition and a recipe are one and the same; a preset brings its placement."""
    base = baseline(tiny, REQUESTS[:3], **OPTIONS)
    scheme, recipe = Scheme(3, True, "tensor"), Recipe.uniform(3, Scheme(3, True, "tensor"))
    given = {
        "scheme": scheme,
        "name": str(scheme),
        "recipe": recipe,
        "condition": Condition(recipe, family="mine", layer=2, draw=1),
        "kivi": "kivi",
    }
    found = evaluate(tiny, given, base, progress=False)
    for name in ("scheme", "name", "condition"):
        for column in ("label", "text", "margin", "kl"):
            one, other = (found.data[column].sel(recipe=which).values for which in (name, "recipe"))
            np.testing.assert_array_equal(one, other)
    assert found.names(family="mine") == ["condition"]
    assert found.name(layer=2, draw=1) == "condition"
    assert str(found.data.placement.sel(recipe="kivi").values) != str(found.data.placement.sel(recipe="name").values)
    listed = evaluate(tiny, [scheme, "kivi"], base, progress=False)
    assert list(listed.data.recipe.values) == [EXACT, str(scheme), "kivi"]
    with pytest.raises(InputError, match="sorts"):
        found.names(sorts=3)
    with pytest.raises(InputError, match="family"):
        found.name(family="nothing like it")


@pytest.mark.parametrize(
    ("recipes", "placement", "word"),
    [
        ("int4-asym-tokn", None, "tokn"),
        ("kiwi", None, "kivi"),
        ("asym-token", None, "int4-asym-token"),
        ("int4-asym-token", "papr", "paper"),
        ({"mine": Recipe.exact(5)}, None, "mine"),
        ({"mine": Condition(Recipe.exact(5))}, None, "mine"),
        ({"mine": 4}, None, "int"),
        ({EXACT: "kivi"}, None, EXACT),
        ([resolve("kivi", bits=2), resolve("kivi", bits=4)], None, "'kivi'; give a mapping"),
        ({3: "int3-asym-token", "3": "int4-asym-token"}, None, "two different caches have the name '3'"),
    ],
)
def test_recipes_that_cannot_be_used(tiny: HFModel, recipes: object, placement: str | None, word: str) -> None:
    with pytest.raises(InputError, match=word):
        evaluate(tiny, recipes, REQUESTS[:1], placement=placement, **OPTIONS)


def test_a_list_loses_no_recipe(tiny: HFModel) -> None:
    """Two that round the same widths at other sites, layers or times are two; one that is given twice is one."""
    a, b = Scheme(4), Scheme(3)
    given = [
        Recipe(((a, b),) * 3),
        Recipe(((b, a),) * 3),
        Recipe(((a, a), (b, b), (a, a))),
        Recipe(((b, b), (a, a), (b, b))),
        Condition(Recipe(((a, b),) * 3), Placement.paper()),
        Recipe(((a, b),) * 3),
    ]
    found = evaluate(tiny, given, REQUESTS[:1], **OPTIONS)
    assert found.data.sizes["recipe"] == 1 + 5
    assert len(np.unique(found.data.kl.values[1:])) == 5


def test_an_explicit_placement_takes_the_place_of_all_others(tiny: HFModel) -> None:
    recipe = Recipe.uniform(3, Scheme(3))
    given = {
        "kivi": "kivi",
        "config": resolve("kivi"),
        "bare": recipe,
        "condition": Condition(recipe, Placement(sinks=1)),
    }
    found = evaluate(tiny, given, REQUESTS[:1], placement="paper", **OPTIONS)
    assert {*found.data.placement.values[1:]} == {str(Placement.paper())}
    assert resolve("kivi", placement="paper").version == (
        f"{resolve('kivi').version}; with another placement: {Placement.paper()}"
    )
    assert resolve("kivi", placement=resolve("kivi").placement) == resolve("kivi")


def test_integers_of_numpy_can_be_written(tiny: HFModel, tmp_path: Path) -> None:
    """Whatever is accepted reaches the journal and the file as numbers of Python."""
    condition: Any = Condition(Recipe.uniform(3, Scheme(3)), layer=np.int64(1), bits=np.int64(3), draw=np.int64(0))
    seed: Any = np.int64(5)
    base = baseline(tiny, REQUESTS[:2], journal=tmp_path / "journal.jsonl", seed=seed, **OPTIONS)
    given = {"condition": condition, "preset": resolve("kivi", bits=np.int64(4))}  # type: ignore[arg-type]
    found = run_conditions(base, as_conditions(given, tiny, None), prompts=np.array([1]))
    base.journal.close()
    again = type(found).load(found.save(tmp_path / "outcomes.nc"))
    assert again.meta["seed"] == 5
    assert again.name(layer=1) == "condition"


@pytest.mark.parametrize(
    ("returned", "word"),
    [
        (lambda: Judgement("REFUSED", "says no"), "refused, complied, evaded, degenerate; got 'REFUSED'"),  # type: ignore[arg-type]
        (lambda: Judgement("refused", None), "must be text"),  # type: ignore[arg-type]
        (lambda: "refused", "'mine' must return a Judgement, got 'refused'"),
        (lambda: None, "got None"),
    ],
)
def test_what_a_judge_returns_is_checked(tiny: HFModel, returned: Callable[[], Any], word: str) -> None:
    class Mine:
        name = "mine"

        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Any:
            return returned()

    with pytest.raises(InputError, match=word):
        baseline(tiny, REQUESTS[:1], **{**OPTIONS, "judge": Mine()})


CALLS: dict[str, Callable[..., object]] = {
    "evaluate": lambda **options: evaluate("nowhere", "int4-asym-token", REQUESTS, **options),
    "baseline": lambda **options: baseline("nowhere", REQUESTS, **options),
    "diagnose": lambda **options: kvgeom.diagnose("nowhere", PAIRS, **options),
    "audit": lambda **options: kvgeom.audit("nowhere", prompts=PAIRS, **options),
    "fix": lambda **options: kvgeom.fix("nowhere", prompts=PAIRS, verify_prompts="held-out", **options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("option", "meant"), [("max_new_token", "max_new_tokens"), ("journl", "journal"), ("dtpye", "dtype")]
)
def test_unknown_options_are_named(call: str, option: str, meant: str) -> None:
    """Before anything is loaded: that the model does not exist does not matter."""
    with pytest.raises(InputError, match=f"{option}.*{meant}"):
        CALLS[call](**{option: 3})


@pytest.mark.parametrize(
    ("call", "option", "meant"),
    [("audit", "scan_bit", "scan_bits"), ("fix", "control", "controls"), ("evaluate", "refuse_only", "refused_only")],
)
def test_own_keywords_of_a_function_are_suggested_too(call: str, option: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"'{option}'.*'{meant}'"):
        CALLS[call](**{option: 3})


def test_options_of_the_run_belong_to_the_baseline(tiny: HFModel) -> None:
    base = baseline(tiny, REQUESTS[:1], **OPTIONS)
    with pytest.raises(InputError, match="max_new_tokens"):
        evaluate(tiny, "int4-asym-token", base, max_new_tokens=5)
    with pytest.raises(InputError, match="'full_responses'"):
        evaluate(tiny, "int4-asym-token", base, full_response=True)
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(InputError, match=name):
            baseline(tiny, REQUESTS, **{name: 0})


def test_a_baseline_is_of_one_model(tiny: HFModel) -> None:
    base = baseline(tiny, REQUESTS[:1], **OPTIONS)
    expected = evaluate(tiny, "int4-asym-token", base, progress=False)
    for same in (None, tiny.hf_model, tiny_model("llama")):
        assert evaluate(same, "int4-asym-token", base, progress=False).data.identical(expected.data)
    with pytest.raises(InputError, match="baseline is of tiny-llama, got the model tiny-qwen2"):
        evaluate(tiny_model("qwen2"), "int4-asym-token", base)


def test_a_journal_that_was_closed_is_opened_again(tiny: HFModel, tmp_path: Path) -> None:
    base = baseline(tiny, REQUESTS[:1], journal=tmp_path / "journal.jsonl", **OPTIONS)
    base.journal.close()
    found = evaluate(tiny, ["int4-asym-token"], base, progress=False)
    base.journal.close()
    assert evaluate(tiny, ["int4-asym-token"], base, progress=False).data.identical(found.data)
    base.journal.close()


def test_constants_that_a_transform_needs(biased: HFModel) -> None:
    """``+center`` works without them: they are read off the model, or measured."""
    scheme = Scheme.parse("int4-asym-token+center")
    base = baseline(biased, REQUESTS[:3], **OPTIONS)
    keys = Recipe.uniform(3, scheme, sites="k")
    offsets = Statics.of("key bias", biased.key_biases(), rotary=True)
    given = {"none": keys, "own": keys.with_statics(offsets=offsets)}
    found = evaluate(biased, given, base, progress=False).data
    np.testing.assert_array_equal(found.kl.sel(recipe="none").values, found.kl.sel(recipe="own").values)
    plain = evaluate(biased, {"plain": Recipe.uniform(3, Scheme(4), sites="k")}, base, progress=False).data
    assert (plain.kl.sel(recipe="plain").values != found.kl.sel(recipe="none").values).any()
    curve, outcomes = bit_width_curve(base, at_widths("asym-token+center", [4, 3]))
    assert curve.data.bits.values.tolist() == [16, 4, 3]
    assert np.isfinite(curve.data.perplexity_ratio).all()
    whole = evaluate(biased, ["int4-asym-token+center"], base, progress=False).data
    np.testing.assert_allclose(
        outcomes.data.kl.sel(recipe="4-bit").values, whole.kl.sel(recipe="int4-asym-token+center").values, atol=1e-5
    )


def test_constants_are_measured_once(tiny: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all conditions that need the same; what a recipe brings is kept, and what needs nothing is left alone."""
    passes: list[int] = []
    forward = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda ids, *a, **k: (passes.append(len(ids)), forward(ids, *a, **k))[1])
    scheme = Scheme.parse("int4-asym-token+center")
    own = Statics.of("mine", {(layer, s): torch.zeros(2, 8) for layer in range(3) for s in "kv"}, rotary=True)  # type: ignore[misc]
    given = {
        "two": Condition(Recipe.uniform(3, scheme)),
        "three": Condition(Recipe.uniform(3, Scheme.parse("int3-asym-token+center"))),
        "own": Condition(Recipe.uniform(3, scheme).with_statics(offsets=own)),
        "bare": Condition(Recipe.uniform(3, Scheme(4))),
    }
    found = with_model_constants(tiny, given)
    assert len(passes) == 64
    assert found["two"].recipe.offsets == found["three"].recipe.offsets
    assert found["two"].recipe.offsets is not None
    assert found["own"] == given["own"]
    assert found["bare"] == given["bare"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("seed", value) for value in (-1, 1.5, float("nan"), [], "3")),
        *((name, value) for name in ("max_new_tokens", "batch_size") for value in (0, 1.5, "3", True)),
        ("text", 3),
        ("journal", 0),
    ],
)
def test_values_that_cannot_be_used(option: str, value: object) -> None:
    for call in CALLS.values():
        with pytest.raises(InputError, match=f"{option} must be"):
            call(**{option: value})


def test_numbers_of_numpy(tiny: HFModel) -> None:
    given = {**OPTIONS, "max_new_tokens": np.int64(3), "seed": np.uint8(2)}
    base = baseline(tiny, REQUESTS[:1], **given)
    assert (base.max_new_tokens, base.run.seed) == (3, 2)
    assert {type(base.max_new_tokens), type(base.run.seed)} == {int}
    for bits in (np.int64(4), [np.int64(4)], np.array([4])):
        series = at_widths("asym-token", bits)  # type: ignore[arg-type]
        assert [(width, type(width)) for width in series.configs] == [(4, int)]
    for wrong in (1.5, float("nan"), "4", [4.0], ["4"], 1, 9):
        with pytest.raises(InputError, match="bits must be"):
            at_widths("asym-token", wrong)  # type: ignore[arg-type]


def test_folders_that_are_no_paths(tiny: HFModel) -> None:
    for function in (kvgeom.audit, kvgeom.fix):
        with pytest.raises(InputError, match="the output folder must be a path, got 3"):
            function(tiny, 3, progress=False)  # type: ignore[operator]


def test_parts_of_a_set() -> None:
    assert PAIRS.take(np.int64(2)).harmful == PAIRS.harmful[:2]  # type: ignore[arg-type]
    for wrong in (None, 1.5, "3", 0):
        with pytest.raises(InputError, match="number of requests must be a whole number, 1 or more"):
            PAIRS.take(wrong)  # type: ignore[arg-type]


def test_a_misspelt_option_is_none_of_the_baseline(tiny: HFModel) -> None:
    base = baseline(tiny, REQUESTS[:1], **OPTIONS)
    with pytest.raises(InputError, match="unknown option 'jugde'; did you mean 'judge'"):
        evaluate(tiny, "int4-asym-token", base, jugde=1)


@pytest.mark.parametrize("placement", ["paper", "cache"])
def test_a_placement_by_name(tiny: HFModel, placement: str) -> None:
    """Where conditions are made, as where they are run."""
    own, recipe = Placement.parse(placement), Recipe.uniform(3, Scheme(3, True, "tensor"))
    assert Condition(recipe, placement) == Condition(recipe, own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="papr"):
        Condition(recipe, "papr")  # type: ignore[arg-type]
    base = baseline(tiny, REQUESTS[:2], **OPTIONS)
    for one, other in (
        (single_layer_scan(base, placement=where)[0] for where in (placement, own)),
        (per_channel_reduction(base, 1, placement=where) for where in (placement, own)),
    ):
        assert one.data.identical(other.data)
        assert one.meta == other.meta
    conditions = whole_cache(3, Scheme(3, True, "tensor"), placement)
    assert conditions == whole_cache(3, Scheme(3, True, "tensor"), own)
    found = ablate(base, conditions, reference="all layers")
    assert found.meta["placement"] == str(own)
    magnitudes = channel_magnitudes(base, placement)
    np.testing.assert_array_equal(magnitudes["k"], channel_magnitudes(base, own)["k"])
    drawn = channel_subsets(magnitudes, Scheme(3), [1], placement)
    assert {each.placement for each in drawn.values()} == {own}


def test_a_scan_needs_one_scheme(tiny: HFModel) -> None:
    base = baseline(tiny, REQUESTS[:1], **OPTIONS)
    for given in (Recipe.uniform(3, Scheme(3)), resolve("kivi"), 3):
        with pytest.raises(InputError, match=f"got a {type(given).__name__}; give a Scheme"):
            single_layer_scan(base, given)  # type: ignore[arg-type]
