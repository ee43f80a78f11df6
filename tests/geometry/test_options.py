"""What the measures of geometry understand, and what they refuse, before any long work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.attention import AttentionError, attention_error, attention_to_request
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.channels import channel_view, outlier_share, stored
from kvgeom.geometry.directions import Directions
from kvgeom.geometry.selection import opening_tokens, select
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.steering import steer
from kvgeom.geometry.subspace import Subspace
from kvgeom.prompts.sets import PromptSet
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

TINY = tiny_model("qwen2")
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def space() -> Subspace:
    return kvgeom.subspace(TINY, PAIRS, **QUIET)


@pytest.fixture(scope="module")
def sensitivity(space: Subspace) -> Sensitivity:
    return space.sensitivity(contrasts=(), **QUIET)


@pytest.fixture(scope="module")
def directions(space: Subspace) -> Directions:
    return space.compare("mean", samples=2, **QUIET)


@pytest.fixture(scope="module")
def errors() -> AttentionError:
    return attention_error(TINY, list(PAIRS.harmful[:1]), **QUIET)


# --- a transformers model ---

LOADED: dict[str, Callable[..., Any]] = {
    "attention_error": lambda model, **o: attention_error(model, PAIRS, **QUIET, **o).data.score_error.values,
    "attention_to_request": lambda model, **o: attention_to_request(model, PAIRS, **o),
    "patch_layers": lambda model, **o: patch_layers(model, PAIRS, "int3-sym-tensor", {5}, **QUIET, **o).data.kl.values,
    "first_order": lambda model, **o: first_order(model, PAIRS, "int4-asym-token", {5}, **QUIET, **o).by_layer.values,
    "opening_tokens": lambda model, **o: sorted(
        opening_tokens(model, PAIRS, ArbitraryJudge(), max_new_tokens=2, **QUIET, **o)
    ),
    "select": lambda model, **o: (
        select(
            model, np.random.default_rng(0).standard_normal((3, 1, 32)), ["x"], PAIRS, PAIRS, {5}, **QUIET, **o
        ).data.bypass.values
    ),
    "steer": lambda model, **o: (
        steer(model, np.arange(32), 1, PAIRS, PAIRS, max_new_tokens=2, **QUIET, **o).data.text.values
    ),
}


@pytest.mark.parametrize("call", LOADED)
def test_a_transformers_model_comes_with_its_tokenizer(call: str) -> None:
    """As in every other function that takes what kvgeom.load takes."""
    found = LOADED[call](tiny_hf_model("qwen2"), tokenizer=tiny_tokenizer())
    np.testing.assert_array_equal(found, LOADED[call](TINY))
    with pytest.raises(InputError, match=r"tokenizer=\.\.\."):
        LOADED[call](tiny_hf_model("qwen2"))


# --- what is understood ---


def test_sets_of_prompts_are_given_by_name(space: Subspace, monkeypatch: pytest.MonkeyPatch) -> None:
    own = PromptSet("some", PAIRS.harmless[:2], PAIRS.harmless[2:4], "")
    monkeypatch.setattr("kvgeom.prompts.load.SHIPPED", {"some": lambda: own, "all": lambda: PAIRS})
    expected = space.sensitivity(contrasts=[own], **QUIET).data
    mapping = {"harmful": list(own.harmful), "harmless": list(own.harmless)}
    for given in (["some"], "some", own):
        assert space.sensitivity(contrasts=given, **QUIET).data.identical(expected)
    found = space.sensitivity(contrasts=mapping, **QUIET).data.contrast_ratio.values
    np.testing.assert_array_equal(found, expected.contrast_ratio.values)
    twice = space.sensitivity(contrasts=[mapping, {**mapping, "harmful": mapping["harmful"][::-1]}], **QUIET).data
    assert list(twice.contrast.values) == ["own prompts", "own prompts 2"]
    few = {"harmful": list(PAIRS.harmful[:3]), "harmless": list(PAIRS.harmless[:3])}
    assert space.refit(prompts="all").data.identical(space.data)
    assert space.refit(prompts=few).prompts.harmful == PAIRS.harmful[:3]


def test_numbers_of_numpy_and_single_names(space: Subspace, directions: Directions) -> None:
    assert directions.data.estimator.values.tolist() == ["mean"]
    expected = space.sensitivity(contrasts=(), noise_pairs=2, seed=1, **QUIET)
    two, one = np.int64(2), np.int64(1)
    found = space.sensitivity(contrasts=(), noise_pairs=two, seed=one, **QUIET)  # type: ignore[arg-type]
    assert found.data.identical(expected.data)
    assert (found.meta, type(found.meta["seed"])) == (expected.meta, int)
    assert space.refit(k=one).meta["k"] == 1  # type: ignore[arg-type]
    assert kvgeom.subspace(TINY, PAIRS, k=two, **QUIET).k == 2  # type: ignore[arg-type]
    some = patch_layers(TINY, PAIRS, "int4-asym-token", np.array([5]), layers=np.array([2, 0]), **QUIET)  # type: ignore[arg-type]
    assert some.data.layer.values.tolist() == [0, 2]
    assert patch_layers(TINY, PAIRS, "int4-asym-token", (), layers=1, **QUIET).data.layer.values.tolist() == [1]


def test_random_subspaces_as_many_as_wanted(space: Subspace) -> None:
    """The method takes what the function takes."""
    few, many = (space.sensitivity(contrasts=(), null_subspaces=n, **QUIET).data for n in (3, 30))
    np.testing.assert_array_equal(few.ratio_low, many.ratio_low)
    assert (few.alignment_null_high.sel(layer=2) < many.alignment_null_high.sel(layer=2)).any()


# --- what is refused ---

REFUSED: dict[str, Callable[..., object]] = {
    "k": lambda value, space: space.refit(k=value),
    "method": lambda value, space: space.refit(method=value),
    "position": lambda value, space: space.refit(position=value),
    "noise_pairs": lambda value, space: space.sensitivity(noise_pairs=value, **QUIET),
    "null_subspaces": lambda value, space: space.sensitivity(null_subspaces=value, **QUIET),
    "seed": lambda value, space: space.sensitivity(seed=value, **QUIET),
    "samples": lambda value, space: space.compare(samples=value, **QUIET),
    "methods": lambda value, space: space.compare(value, **QUIET),
    "positions": lambda value, space: space.compare(positions=value, **QUIET),
    "seed of compare": lambda value, space: space.compare(seed=value, **QUIET),
    "validation": lambda value, space: space.select(validation=value, tokens=[5, 6], **QUIET),
    "tokens": lambda value, space: space.select(tokens=value, **QUIET),
    "positions of select": lambda value, space: space.select(positions=value, **QUIET),
    "layers": lambda value, space: patch_layers(TINY, PAIRS, "int4-asym-token", {5}, layers=value, **QUIET),
    "refusal token": lambda value, space: patch_layers(TINY, PAIRS, "int4-asym-token", value, **QUIET),
    "refusal token of first_order": lambda value, space: first_order(TINY, PAIRS, "kivi", value, **QUIET),
    "layer": lambda value, space: stored(space, value),
    "layer of steer": lambda value, space: steer(TINY, np.ones(32), value, PAIRS, PAIRS, **QUIET),
    "max_new_tokens": lambda value, space: steer(TINY, np.ones(32), 0, PAIRS, PAIRS, max_new_tokens=value, **QUIET),
    "max_new_tokens of opening_tokens": lambda value, space: opening_tokens(TINY, PAIRS, max_new_tokens=value, **QUIET),
    "batch_size": lambda value, space: select(
        TINY, np.ones((3, 1, 32)), ["x"], PAIRS, PAIRS, {5}, batch_size=value, **QUIET
    ),
    "site": lambda value, space: stored(space, 0, value),
    "prompt": lambda value, space: stored(space, 0, row=value),
}


@pytest.mark.parametrize(
    ("what", "value"),
    [
        *((name, value) for name in ("k", "null_subspaces") for value in (None, 1.5, float("nan"), "2", 0)),
        *(("noise_pairs", value) for value in (1.5, float("nan"), "2", 0)),
        *((name, value) for name in ("seed", "seed of compare") for value in (-1, float("nan"), [], "3", None)),
        *(("samples", value) for value in (-1, 1.5)),
        *((name, value) for name in ("method", "position") for value in ([], 0, "kk")),
        *((name, value) for name in ("methods", "positions", "positions of select") for value in (0, [], ["kk"])),
        *(("validation", value) for value in (None, 1.5, 0, 99)),
        *(("layers", value) for value in ([1.5], ["2"], [-1], [], [3], "2")),
        *(
            (name, value)
            for name in ("refusal token", "refusal token of first_order")
            for value in ([10**6], ["2"], "2")
        ),
        *((name, value) for name in ("layer", "layer of steer") for value in (-1, 3, None, "0")),
        *(
            (name, value)
            for name in ("max_new_tokens", "max_new_tokens of opening_tokens", "batch_size")
            for value in (None, 0, 1.5, "2")
        ),
        ("tokens", ["2"]),
        ("site", "kk"),
        ("prompt", -1),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(space: Subspace, what: str, value: object) -> None:
    with pytest.raises(InputError, match=what.split(" of ")[0].rstrip("s")) as raised:
        REFUSED[what](value, space)
    assert "\n" not in str(raised.value)


def test_coordinates_of_results(
    space: Subspace, sensitivity: Sensitivity, directions: Directions, errors: AttentionError
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: sensitivity.channels("kk"),
        lambda: channel_view(sensitivity, "kk"),
        lambda: outlier_share(sensitivity, 0, "kk"),
        lambda: sensitivity.plot("channel_loading", layer=0, site="kk"),
        lambda: sensitivity.plot("ratio_against_null", site="kk"),
        lambda: sensitivity.plot("channel_ratio_map", site="kk"),
        lambda: directions.vectors("kk"),
        lambda: directions.agreement_of_layers("kk"),
        lambda: directions.plot(site="kk"),
        lambda: directions.plot("stability_by_layer", site="kk"),
    ]
    for call in calls:
        with pytest.raises(InputError, match="unknown site 'kk'; did you mean 'k'"):
            call()
    for layer in (99, -1, None, "0"):
        for on_layer in (
            lambda layer=layer: sensitivity.plot("channel_loading", layer=layer),
            lambda layer=layer: outlier_share(sensitivity, layer),
            lambda layer=layer: directions.cosines_of_methods("k", layer),
            lambda layer=layer: directions.agreement_of_sites(layer),
        ):
            with pytest.raises(InputError, match=r"unknown layer .*; choose from 0 to 2"):
                on_layer()
    for name in ("position", "method"):
        for at in (lambda: directions.plot(**{name: "kk"}), lambda: directions.vectors("k", **{name: "kk"})):  # noqa: B023
            with pytest.raises(InputError, match=f"unknown {name} 'kk'; choose from"):
                at()
    with pytest.raises(InputError, match="unknown position"):
        directions.plot("stability_by_layer", position="kk")
    for queries in (lambda: errors.plot(queries="kk"), lambda: errors.by_layer("kk")):
        with pytest.raises(InputError, match="unknown queries 'kk'; choose from all, last"):
            queries()
    assert directions.plot(position=None, method=None).data
    assert sensitivity.plot("channel_loading", layer=np.int64(1), site="resid").data


def test_a_result_beside(space: Subspace) -> None:
    estimate = first_order(TINY, PAIRS, "int4-asym-token", {5}, **QUIET)
    exact = patch_layers(TINY, PAIRS, "int4-asym-token", {5}, **QUIET)
    assert estimate.plot("first_order_against_exact", exact=exact).data
    for other in (3, None, space, estimate):
        with pytest.raises(InputError, match=r"option 'exact'.*'patching', got a"):
            estimate.plot("first_order_against_exact", exact=other)
