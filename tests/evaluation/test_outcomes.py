"""Outcomes put together, cut, saved and traced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.condition import EXACT, Condition
from kvgeom.evaluation.evaluate import evaluate, run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)
CONDITIONS = {
    "a": Condition(Recipe.uniform(3, Scheme(3, True, "tensor")), family="granularity", granularity="tensor", bits=3),
    "b": Condition(Recipe.uniform(3, Scheme(2)), Placement.paper(), family="bits", bits=2),
    "c": Condition(Recipe.uniform(3, Scheme(2), layers=[0]), family="layer", layer=0, bits=2, draw=0),
}


@pytest.fixture(scope="module")
def base() -> Baseline:
    return baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=5, progress=False)


@pytest.fixture(scope="module")
def whole(base: Baseline) -> Outcomes:
    return run_conditions(base, CONDITIONS)


def test_joined_over_recipes(base: Baseline, whole: Outcomes) -> None:
    one = run_conditions(base, {name: CONDITIONS[name] for name in ("a", "b")})
    other = run_conditions(base, {name: CONDITIONS[name] for name in ("b", "c")})
    both = one.joined(other)
    xr.testing.assert_identical(both.data, whole.data)
    assert both.meta == whole.meta
    assert both.name(family="layer", layer=0, draw=0) == "c"
    assert both.names(bits=2) == ["b", "c"]


def test_joined_over_prompts(base: Baseline, whole: Outcomes) -> None:
    """In the order of the prompts, whichever part comes first; what both have is there once."""
    odd, rest = (run_conditions(base, CONDITIONS, prompts=chosen) for chosen in ([1, 3, 5], [0, 1, 2, 4, 6, 7]))
    for both in (odd.joined(rest), rest.joined(odd)):
        np.testing.assert_array_equal(both.data.prompt, range(len(REQUESTS)))
        xr.testing.assert_identical(both.data, whole.data)
        assert both.meta == whole.meta


def test_recipes_of_other_prompts_are_not_joined(base: Baseline) -> None:
    one, other = (
        run_conditions(base, {name: CONDITIONS[name]}, prompts=chosen) for name, chosen in (("a", [0, 1]), ("b", [2]))
    )
    with pytest.raises(InputError, match="prompts"):
        one.joined(other)


def test_what_differs_is_not_joined(base: Baseline, whole: Outcomes) -> None:
    """One name for other recipes, one number for other requests, other models and judges."""
    recipe = CONDITIONS["a"].recipe
    meta = {name: (name, {name: "other"}) for name in ("fingerprint", "judge", "max_new_tokens", "full_responses")}
    others = {
        **{word: Outcomes(whole.data, {**whole.meta, **change}) for word, change in meta.values()},
        "recipe 'a' is int3": run_conditions(
            base, {**CONDITIONS, "a": replace(CONDITIONS["a"], recipe=recipe.keep([0]))}
        ),
        "placement of recipe 'a'": run_conditions(base, {"a": replace(CONDITIONS["a"], placement=Placement(sinks=1))}),
        "layer of recipe 'c' is 0": run_conditions(base, {"c": replace(CONDITIONS["c"], layer=1)}),
        "request of prompt 0": Outcomes(
            whole.data.assign_coords(request=whole.data.request[::-1].variable), whole.meta
        ),
    }
    for word, other in others.items():
        with pytest.raises(InputError, match=word):
            whole.joined(other)
    turned = whole.at_recipes(["c", "b", "a"])
    xr.testing.assert_identical(whole.at_prompts([1]).joined(turned).data, whole.data)


def test_parts(base: Baseline, whole: Outcomes) -> None:
    part = whole.at_recipes(["c"]).at_prompts([2, 0])
    assert part.data.recipe.values.tolist() == [EXACT, "c"]
    assert part.data.prompt.values.tolist() == [2, 0]
    assert list(part.meta["recipes"]) == ["c"]
    assert whole.of_refused().data.prompt.values.tolist() == list(base.refused)


def test_coordinates_and_provenance_are_saved(whole: Outcomes, tmp_path: Path) -> None:
    again = Outcomes.load(whole.save(tmp_path / "outcomes.nc"))
    xr.testing.assert_identical(again.data, whole.data)
    assert again.meta == whole.meta
    assert again.names(family="granularity", granularity="tensor") == ["a"]
    assert again.names(layer=None, draw=None) == ["a", "b"]
    known = again.provenance()
    assert known == whole.provenance()
    assert (known["model"], known["fingerprint"]) == (TINY.name, TINY.fingerprint)
    assert (known["judge"], known["max_new_tokens"], known["seed"]) == ("arbitrary", 5, 0)
    assert {"kvgeom", "torch", "transformers"} <= {*known["versions"]}


def test_coordinates_of_what_is_one_scheme(base: Baseline) -> None:
    """A uniform recipe stands at its width and granularity, unless its condition says otherwise."""
    uniform, part = Recipe.uniform(3, Scheme(4)), Recipe.uniform(3, Scheme(4), layers=[1])
    given = {
        "scheme": "int4-asym-token",
        "said": Condition(uniform, granularity="mine", bits=7),
        "part": part,
        "keys": Recipe.uniform(3, Scheme(4), sites="k"),
    }
    data = evaluate(TINY, given, base, progress=False).data
    for name, bits, granularity in (
        ("scheme", 4, "token"), ("said", 7, "mine"), ("part", -1, ""), ("keys", -1, ""), (EXACT, -1, ""),
    ):  # fmt: skip
        assert (data.bits.sel(recipe=name), data.granularity.sel(recipe=name)) == (bits, granularity)


def test_what_results_share_of_where_they_come_from(whole: Outcomes) -> None:
    assert whole.made_by(["b"])["placement"] == str(Placement.paper())
    assert str(Placement()) in whole.made_by()["placement"]
    assert str(Placement.paper()) in whole.made_by()["placement"]


def test_of_equal_conditions_one_is_run(base: Baseline) -> None:
    twice = evaluate(TINY, {"a": CONDITIONS["a"], "again": CONDITIONS["a"].recipe}, base, progress=False)
    one, other = (twice.data[["label", "text", "kl"]].sel(recipe=name) for name in ("a", "again"))
    for column in one.data_vars:
        np.testing.assert_array_equal(one[column].values, other[column].values)
    assert twice.names(family="granularity") == ["a"]  # coordinates are not shared


def test_no_prompts_are_saved_with_the_types_of_some(whole: Outcomes, tmp_path: Path) -> None:
    none = whole.at_prompts([])
    again = Outcomes.load(none.save(tmp_path / "none.nc"))
    xr.testing.assert_identical(again.data, none.data)
    types = {name: variable.dtype for name, variable in whole.data.variables.items()}
    for column in ("label", "text", "request", "placement", "family"):
        assert again.data[column].dtype == types[column] == np.dtype(object)


def test_recipes_that_are_not_there(whole: Outcomes) -> None:
    """By any method, one line that says which there are; where several are taken, one may be given alone."""
    one = (
        *(whole.flips, whole.flipped, whole.counts, whole.gains, whole.unended, whole.unread, whole.all_unread),
        *(whole.at_recipes, whole.margin_drops, whole.made_by, whole.flip_columns),
    )
    for method in one:
        for wrong in ("zzz", None, 3, np.array(["a", "b"]) if method is whole.flips else ["a", "zzz"]):
            with pytest.raises(InputError, match=r"unknown recipe .*choose from exact, a, b, c"):
                method(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown label 'complied to'; did you mean 'complied'"):
        whole.flipped("a", "complied to")  # type: ignore[arg-type]
    assert whole.at_recipes("b").data.identical(whole.at_recipes(["b", EXACT]).data)
    assert whole.at_prompts(1).data.identical(whole.at_prompts([1]).data)
    with pytest.raises(InputError, match=f"unknown prompt {len(REQUESTS)}; choose from 0 to {len(REQUESTS) - 1}"):
        whole.at_prompts([0, len(REQUESTS)])
    with pytest.raises(InputError, match="joined with other Outcomes, got None"):
        whole.joined(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"give kvgeom\.classifier"):
        whole.relabel("minos")  # type: ignore[arg-type]


def test_an_error_names_no_more_recipes_than_fit(whole: Outcomes) -> None:
    many = whole.data.isel(recipe=[0, *[1] * 200]).assign_coords(recipe=[EXACT, *(f"layer {n}" for n in range(200))])
    with pytest.raises(InputError, match=r"choose from exact, layer 0, .*\(201 in all\)") as raised:
        Outcomes(many, whole.meta).flips("?")
    assert len(str(raised.value)) < 200
