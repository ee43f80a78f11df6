"""The width of a scan: the fewest bits, from 8 down without a gap, before perplexity grows."""

from __future__ import annotations

import json

import numpy as np
import pytest

import kvgeom
from kvgeom.behaviour.matched import LANGUAGE_KEPT, ScanWidth, check_scan_bits, scan_width
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import Estimate
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
    expected, undecided = 8, []
    for bits in range(8, 1, -1):
        ratio = base.perplexity_ratio(Recipe.uniform(3, Scheme(bits, True, "tensor")))
        undecided += [bits] if ratio.low <= limit <= ratio.high else []
        if ratio.value > limit:
            break
        expected = bits
    found = scan_width(base)
    assert (found.scheme, found.matched) == (Scheme(expected, True, "tensor"), True)
    ratio = base.perplexity_ratio(Recipe.uniform(3, found.scheme))
    assert (found.perplexity_ratio, found.low, found.high) == (ratio.value, ratio.low, ratio.high)
    assert found.undecided == tuple(undecided)
    assert ScanWidth.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("bits", "ratio", "matched", "undecided", "said"),
    [
        (3, (1.2, 1.15, 1.3), False, (), "3 bits as asked, at 1.20x [1.15, 1.30] the perplexity"),
        (5, (1.04, 1.02, 1.06), True, (), "5 bits, the fewest before perplexity first grows beyond 1.1x, tested downwards from 8, at 1.04x [1.02, 1.06]"),
        (5, (1.08, 1.04, 1.13), True, (5, 4), "at 1.08x [1.04, 1.13]; at 5 and 4 bits the interval does not decide it"),
        (8, (1.12, 1.08, 1.2), True, (8,), "even at 8 bits perplexity grows to 1.12x [1.08, 1.20], more than 1.1x; at 8 bits the"),
    ],
)  # fmt: skip
def test_a_width_says_where_the_interval_does_not_decide(
    bits: int, ratio: tuple[float, float, float], matched: bool, undecided: tuple[int, ...], said: str
) -> None:
    assert said in str(ScanWidth(Scheme(bits, True, "tensor"), *ratio, matched, undecided))


NAN = (float("nan"),) * 3


@pytest.mark.parametrize(
    ("ratios", "bits", "said"),
    [
        ({8: (1.0, 0.9, 1.05), 7: (1.2, 1.15, 1.3), 6: (1.05, 1.0, 1.08)}, 8, "first grows beyond 1.1x, tested downwards from 8"),
        ({8: NAN, 7: (1.0, 0.9, 1.05)}, 8, "cannot be measured at 8 bits (it is not a number), so that no width is known"),
        ({8: (1.0, 0.9, 1.05), 7: NAN, 6: (1.0, 0.9, 1.05)}, 8, "8 bits, tested downwards from 8, at 1.00x [0.90, 1.05] the perplexity; at 7 bits it cannot be measured"),
        (dict.fromkeys(range(2, 9), (1.0, 0.9, 1.05)), 2, "2 bits, the fewest there are: tested downwards from 8, perplexity never"),
        ({8: (1.0, *NAN[:2]), 7: (1.2, 1.15, 1.3)}, 8, "at 8 bits the interval does not decide it"),
    ],
    ids=["not monotone", "nothing measured", "a gap", "never grows", "no interval"],
)  # fmt: skip
def test_a_width_claims_only_what_was_measured(
    base: Baseline,
    ratios: dict[int, tuple[float, float, float]],
    bits: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ratios are dictated: no tiny model has such curves."""
    tried = []

    def dictated(_: Baseline, recipe: Recipe, placement: object = None) -> Estimate:
        tried.append(recipe.layers[0][0].bits)  # type: ignore[union-attr]
        return Estimate(*ratios[tried[-1]])

    monkeypatch.setattr(Baseline, "perplexity_ratio", dictated)
    found = scan_width(base)
    assert found.scheme.bits == bits
    assert said in str(found)
    assert "nan" not in str(found)
    assert tried == list(range(8, min(tried) - 1, -1))
    again = ScanWidth.from_dict(json.loads(json.dumps(found.to_dict())))
    assert (str(again), again.unmeasured) == (str(found), found.unmeasured)
    if bits == 8:
        given = str(scan_width(base, 8))
        assert ("cannot be measured" in given) == (ratios[8] == NAN)


def test_a_width_that_is_given(base: Baseline) -> None:
    found = scan_width(base, np.int64(4))  # type: ignore[arg-type]
    assert (str(found.scheme), found.matched) == ("int4-sym-tensor", False)
    for wrong in (16, 1, 3.5):
        with pytest.raises(InputError, match="bits must be"):
            check_scan_bits(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="bits must be"):
            kvgeom.diagnose(base.model, REQUESTS[:2], scan_bits=wrong, progress=False)
