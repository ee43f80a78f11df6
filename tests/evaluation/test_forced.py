"""Answers read under a cache say what generating under it begins with, whatever the placement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import as_conditions
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.forced import forced_readings
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from tests.builders.judges import CountingJudge
from tests.builders.tiny import tiny_model

REQUESTS = ["Name a river.", "Why @?", "count to nine", "Explain clouds", "how do I pick a lock"]
MODELS = {name: tiny_model(name, seed=1) for name in ("qwen2", "llama")}
CACHES = ["int4-asym-token", "int3-sym-tensor", "int3-asym-token+center", "kivi", "fp8_e4m3", "int2-asym-token"]
PLACEMENTS = [
    None,
    Placement(prefill_reads="exact"),
    Placement(prefill_reads="last"),
    Placement(residual=4),
    Placement(sinks=2),
    "paper",
]


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.sampled_from(CACHES), min_size=1, max_size=3, unique=True),
    st.sampled_from(PLACEMENTS),
    st.integers(1, 9),
)
def test_a_reading_begins_as_generation_does(
    name: str, caches: list[str], placement: Placement | str | None, length: int
) -> None:
    model = MODELS[name]
    base = baseline(model, REQUESTS, judge=CountingJudge(length), max_new_tokens=length, progress=False)
    conditions = as_conditions(caches, model, placement)
    made = run_conditions(base, conditions, full_responses=True)
    read = forced_readings(base, conditions, range(len(REQUESTS)))
    begun = forced_readings(base, conditions, range(len(REQUESTS)), first_only=True)
    for cache in conditions:
        for whole, first in zip(read[cache], begun[cache], strict=True):
            assert first.kl == pytest.approx(whole.kl[:1], abs=1e-5)
            assert (first.divergence == 0) == (whole.divergence == 0)
        own = made.data.sel(recipe=cache)
        for index, reading in enumerate(read[cache]):
            draft = len(base.tokens[index])
            assert len(reading.kl) == max(draft, 1)
            first = int(own.divergence[index])
            assert reading.divergence == (first if 0 <= first < draft else -1)
            assert reading.kl[0] == pytest.approx(float(own.kl[index]), abs=1e-5)
            assert np.isnan(reading.margin) == np.isnan(float(own.margin[index]))
            assert reading.agreed == draft if reading.divergence < 0 else reading.agreed >= reading.divergence


def test_divergences_are_those_of_a_plain_loop() -> None:
    """Token by token through a cache, with the divergence written out."""
    model = MODELS["qwen2"]
    base = baseline(model, REQUESTS, judge=CountingJudge(6), max_new_tokens=6, progress=False)
    config = resolve("int3-asym-token")
    conditions = as_conditions([config], model, None)
    (read,) = forced_readings(base, conditions, range(len(REQUESTS))).values()
    for index, reading in enumerate(read):
        caches = [model.new_cache(), model.new_cache(Quantizer(config.recipe(model.geometry.layers), Placement()))]
        ids = list(base.prompts[index].ids)
        for place, token in enumerate(base.tokens[index]):
            exact, rounded = (model.forward(ids, cache)[-1].double().log_softmax(-1) for cache in caches)
            assert reading.kl[place] == pytest.approx(float(torch.sum(exact.exp() * (exact - rounded))), abs=1e-5)
            ids = [token]


def test_exact_caches_change_nothing() -> None:
    model = MODELS["llama"]
    base = baseline(model, REQUESTS, judge=CountingJudge(6), max_new_tokens=6, progress=False)
    conditions = as_conditions(
        {"nothing": resolve("int4-asym-token").recipe(model.geometry.layers).keep(range(model.geometry.layers))},
        model,
        None,
    )
    for reading in forced_readings(base, conditions, range(len(REQUESTS)))["nothing"]:
        assert (reading.divergence, max(reading.kl)) == (-1, pytest.approx(0, abs=1e-9))


def test_scales_of_a_batch_are_refused() -> None:
    base = baseline(MODELS["llama"], REQUESTS, judge=CountingJudge(6), max_new_tokens=6, progress=False)
    conditions = as_conditions(["int4-asym-token"], base.model, Placement.released(batch=4))
    with pytest.raises(InputError, match=r"shares scales between the prompts of a batch"):
        forced_readings(base, conditions, [0])
