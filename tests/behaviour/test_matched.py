"""The width of a scan: the fewest bits, from 8 down without a gap, at which perplexity hardly grows."""

from __future__ import annotations

import numpy as np
import pytest

import kvgeom
from kvgeom.behaviour.matched import LANGUAGE_KEPT, check_scan_bits, scan_width
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model


@pytest.fixture(scope="module")
def base() -> Baseline:
    return baseline(tiny_model("qwen2", seed=2), REQUESTS[:2], judge=ArbitraryJudge(), max_new_tokens=3, progress=False)


@pytest.mark.parametrize("limit", [LANGUAGE_KEPT, 1.0 + 1e-9, 0.0, 1e9])
def test_the_width_is_the_last_before_perplexity_grows(
    base: Baseline, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvgeom.behaviour.matched.LANGUAGE_KEPT", limit)
    expected = 8
    for bits in range(8, 1, -1):
        if base.perplexity(Recipe.uniform(3, Scheme(bits, True, "tensor"))) / base.perplexity() > limit:
            break
        expected = bits
    found = scan_width(base)
    assert (found.scheme, found.matched) == (Scheme(expected, True, "tensor"), True)
    assert found.perplexity_ratio == base.perplexity(Recipe.uniform(3, found.scheme)) / base.perplexity()


def test_a_width_that_is_given(base: Baseline) -> None:
    found = scan_width(base, np.int64(4))  # type: ignore[arg-type]
    assert (str(found.scheme), found.matched) == ("int4-sym-tensor", False)
    for wrong in (16, 1, 3.5):
        with pytest.raises(InputError, match="bits must be"):
            check_scan_bits(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="bits must be"):
            kvgeom.diagnose(base.model, REQUESTS[:2], scan_bits=wrong, progress=False)
