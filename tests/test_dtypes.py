"""The whole pipeline in the dtypes of checkpoints that people serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.models.hf import HFModel
from kvgeom.models.model import Model
from kvgeom.organisms import Size
from tests.builders.judges import ArbitraryJudge
from tests.builders.tiny import tiny_hf_model, tiny_tokenizer

PROMPTS = Size(3).prompts().take(3)


@pytest.fixture(
    scope="module",
    params=[torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=["bfloat16", "float16"],
)
def half_precision(request: pytest.FixtureRequest) -> Model:
    """A random Qwen2 in half precision on the CPU."""
    return kvgeom.load(tiny_hf_model("qwen2", seed=2).to(request.param), tokenizer=tiny_tokenizer(), name="half")


def test_an_audit(half_precision: HFModel, tmp_path: Path) -> None:
    found = kvgeom.audit(
        half_precision, tmp_path, prompts=PROMPTS, judge=ArbitraryJudge(), bits=(8, 3), max_new_tokens=4, progress=False
    )
    told = json.loads((tmp_path / "audit.json").read_text())["model"]
    assert told["dtype"] == told["weights"] == str(half_precision.dtype).removeprefix("torch.")
    assert np.isfinite(found.curve.data.perplexity_ratio).all()
    # The divergence of a distribution from itself is 0, of another above it, in whatever precision it was computed.
    assert (found.outcomes.data.kl.sel(recipe="exact") == 0).all()
    assert float(found.outcomes.data.kl.min()) > -1e-4
    ratio = found.sensitivity.data.ratio_low
    assert np.isfinite(ratio.sel(site=["k", "v"])).any()
    assert (ratio.fillna(1) > 0).all()


def test_what_is_said_under_a_recipe(half_precision: HFModel) -> None:
    """Responses end as they do in plain generation of the transformers model itself."""
    base = kvgeom.baseline(half_precision, PROMPTS.harmful, max_new_tokens=4, progress=False)
    for prompt, tokens, ended in zip(base.prompts, base.tokens, base.ended, strict=True):
        written = half_precision.hf_model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, len(prompt.ids))
        )[0, len(prompt.ids) :].tolist()
        theirs = [token for token in written if token not in half_precision.stop_tokens]
        assert list(tokens) == theirs[: len(tokens)]
        assert ended or len(tokens) <= 4
    outcomes = kvgeom.evaluate(half_precision, ["int4-asym-token", "kivi"], base, placement="cache")
    assert [str(name) for name in outcomes.data.recipe.values] == ["exact", "int4-asym-token", "kivi"]
