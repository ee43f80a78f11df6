"""The benchmark of what explains damage: its units, its numbers, and the tables that it makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import explained, explains
from kvgeom.geometry.causal import first_order
from kvgeom.geometry.decomposition import decompose
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.rounding import Rounding
from kvgeom.models.reading import read
from kvgeom.prompts.sets import PromptSet
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_model

R = frozenset((7, 40, 41))


def test_units_round_what_they_say() -> None:
    model = tiny_model("qwen2")
    loudest = np.array([[3, 4], [5, 6], [7, 8]])
    found = explains.units(model, loudest, random.Random(0))
    assert {level for level, *_ in found.values()} == {*explained.LEVELS}
    (prompt,) = model.encode(["burn it all down"])
    for level, recipe, where in found.values():
        rounding = Rounding.of(model, recipe)
        for one in read(model, prompt):
            site, channels = where[one.layer]
            for name, x in (("k", one.k), ("v", one.v)):
                moved = (rounding(one.layer, name, x, one.rotation) != x)[0].any(1).flatten()  # type: ignore[arg-type]
                allowed = set(channels) if name in site else set()
                assert set(moved.nonzero().flatten().tolist()) <= allowed, level
                assert not allowed or moved.any()
    assert found["channels of keys: loudest"][2] == [("k", (3,)), ("k", (5,)), ("k", (7,))]


def test_numbers_are_those_of_the_public_measures() -> None:
    model = tiny_model("qwen2")
    prompts = model.encode(["burn it all down", "how to steal the car"])
    pairs = PromptSet("pairs", PAIRS.harmful, PAIRS.harmless, "")
    raw = explains._by_channel(model, prompts, R, pairs)
    units = explains.units(
        model, raw["magnitudes"].data.max_abs.mean("prompt").argmax("channel").values, random.Random(0)
    )
    by_name = {name: explains._numbers(model, raw, where) for name, (_, _, where) in units.items()}
    truth = first_order(model, prompts, explains.SCHEME, R, progress=False).data
    parts = decompose(model, prompts, explains.SCHEME, R, points=explains.POINTS, progress=False)
    paths = follow_errors(model, prompts, explains.SCHEME, R, progress=False).data
    for level, site in (("keys", "k"), ("values", "v")):
        predictors = by_name[f"{level}: all"]["predictors"]
        np.testing.assert_allclose(predictors["first order"].T, truth.margin_drop.sel(site=site), atol=1e-5)
        np.testing.assert_allclose(predictors["integrated"].T, parts.by_site.sel(site=site), atol=1e-5)
        drop = paths.margin_drop.sel(site=site).sum("query_head")
        np.testing.assert_allclose(predictors["margin drop"].T, drop, atol=1e-5)
        heads = [by_name[f"heads of {level}: {head}"]["predictors"]["first order"] for head in (0, 1)]
        np.testing.assert_allclose(sum(heads), predictors["first order"], atol=1e-5)
    np.testing.assert_allclose(by_name["layers: all"]["predictors"]["integrated"].T, parts.by_layer, atol=1e-5)
    score = np.sqrt((paths.score_error**2).mean("query_head"))
    np.testing.assert_allclose(by_name["keys: all"]["predictors"]["error"].T, score, atol=1e-6)
    controls = by_name["keys: all"]["controls"]
    for column, prompt in enumerate(prompts):
        for one in read(model, prompt):
            assert controls["max"][one.layer, column] == pytest.approx(float(one.k.abs().max()), rel=1e-5)
    biases = [float(bias.norm()) for bias in model.key_biases().values()]
    np.testing.assert_allclose(controls["bias"], biases, rtol=1e-5)
    (channel,) = units["channels of values: 0"][2][1][1]
    one = by_name["channels of values: 0"]["predictors"]["first order"][1]
    np.testing.assert_allclose(one.mean(), truth.channel_drop.sel(layer=1, site="v", channel=channel), atol=1e-5)


def synthetic(seed: int, units: int = 60) -> dict[str, Any]:
    """One predictor that says something beside the size, one that only repeats it, and one of nothing."""
    rng = np.random.default_rng(seed)
    size, more, nothing = rng.normal(size=(3, units, 1))
    seen, unseen = rng.normal(size=(2, units, 8))
    return {
        "layer": np.arange(units),
        "controls": {"max": size + 0.1 * seen, "layer": np.arange(units), "bias": np.zeros(units)},
        "predictors": {
            "first order": size + more + 0.1 * seen,
            "error": size + 0.3 * rng.normal(size=(units, 1)) + 0.1 * seen,
            "ratio": nothing[:, 0],
        },
        "damage": {"margin lost": size + more + 0.1 * unseen, "KL": np.abs(size + more) + 0.1 * unseen},
    }


def test_what_says_something_beyond_is_found_and_nothing_else(tmp_path: Path) -> None:
    models = {name: {"layers": synthetic(seed)} for seed, name in enumerate(("demo", "gemma"))}
    found = explained.correlations(models, "layers", "margin lost")
    assert [name for name, one in found.items() if one.beyond] == ["first order"]
    assert found["error"].plain > 0.4  # the size is a good predictor by itself
    assert found["first order"].units == 120
    signed = explained.correlations(models, "layers", "KL")
    assert signed["first order"].beyond  # by its size: the divergence has no sign
    assert explained.trivial(models, "layers", "margin lost")["max"] > 0.4
    for name, own in models.items():
        explained.keep(tmp_path, name, own, {"model": name})
    levels, meta = explained.kept(tmp_path, "demo") or ({}, {})
    assert meta == {"model": "demo"}
    np.testing.assert_array_equal(levels["layers"]["damage"]["KL"], models["demo"]["layers"]["damage"]["KL"])
    assert explained.kept(tmp_path, "smollm2") is None


def test_the_page_says_what_was_measured() -> None:
    page = (explained.DOCS / "explains.md").read_text(encoding="utf-8")
    measured = json.loads((explained.DOCS / "explains.json").read_text(encoding="utf-8"))
    assert page.split("<!-- measured -->\n\n")[1] == explained.markdown(measured["rows"], measured["models"])
