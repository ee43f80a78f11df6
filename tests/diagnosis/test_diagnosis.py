"""Intervals, PCR and the transition: against closed forms, against simulation, and at their borders."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.behaviour.curve import locate
from kvgeom.behaviour.pcr import THRESHOLDS, margin_reduction, per_channel_reduction, reduction
from kvgeom.evaluation.baseline import baseline
from kvgeom.stats import bootstrap_means, bootstrap_reduction, mcnemar, reduction_posterior, shares_above, wilson
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_textbook_formula(counts: tuple[int, int]) -> None:
    k, n = counts
    z, p = 1.959963984540054, k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(k, n) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)
    assert np.isnan(wilson(0, 0)).all()


def test_bootstrap_of_means_covers_like_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3.0, 2.0, size=(400, 3))
    low, high = bootstrap_means(rows)
    half = 1.96 * rows.std(0) / np.sqrt(len(rows))
    np.testing.assert_allclose(low, rows.mean(0) - half, atol=0.03)
    np.testing.assert_allclose(high, rows.mean(0) + half, atol=0.03)


@pytest.mark.parametrize(("prompts", "rate", "kept"), [(120, 0.5, 0.4), (30, 0.6, 0.1), (20, 0.3, 0.9)])
def test_intervals_of_pcr_cover_the_truth(prompts: int, rate: float, kept: float) -> None:
    """95 % intervals contain the true PCR in about 95 % of simulated studies, small ones too."""
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(300):
        old = rng.random(prompts) < rate
        new = old & (rng.random(prompts) < kept)
        low, high = np.quantile(reduction_posterior(old, new, samples=2000, seed=study), [0.025, 0.975])
        covered += low <= 1 - kept <= high
    assert covered >= 273


flips = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@settings(max_examples=60)
@given(flips)
def test_pcr(both: tuple[list[bool], list[bool]]) -> None:
    tensor, channel = both
    found = reduction(tensor, channel, layer=3, bits=3)
    counts = tuple(int(found.data[name]) for name in ("flips_tensor", "flips_channel", "prompts"))
    assert counts == (sum(tensor), sum(channel), len(tensor))
    if not any(tensor):
        assert (found.value, found.ci, found.status) == (None, None, "undetermined")
        return
    assert found.value == pytest.approx(1 - sum(channel) / sum(tensor))
    assert found.ci is not None
    low, high = found.ci
    assert low <= found.value + 1e-9
    assert found.value <= high + 1e-9
    assert high <= 1
    if found.status == "determined":
        assert sum(low > t for t in THRESHOLDS) == sum(high > t for t in THRESHOLDS)


@pytest.mark.parametrize(
    ("tensor", "channel", "status"),
    [
        (100, 5, "determined"),  # 95 %: outlier crushes safety
        (100, 95, "determined"),  # 5 %: outlier as safety
        (100, 50, "determined"),  # mixed
        (100, 30, "undetermined"),  # on the border
        (3, 0, "undetermined"),  # three flips of 200 say too little, whatever they say
        (0, 0, "undetermined"),
    ],
)
def test_pcr_decides_only_what_the_data_decides(tensor: int, channel: int, status: str) -> None:
    rows = np.arange(200)
    assert reduction(rows < tensor, rows < channel, layer=0, bits=3).status == status


# --- other statistics ---


@given(flips)
def test_mcnemar_is_the_binomial_test_of_what_differs(both: tuple[list[bool], list[bool]]) -> None:
    one, other = both
    b, c = (
        sum(x and not y for x, y in zip(one, other, strict=True)),
        sum(y and not x for x, y in zip(one, other, strict=True)),
    )
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail) if b + c else 1.0)
    assert mcnemar(one, other) == pytest.approx(mcnemar(other, one))


def test_bootstrap_of_a_reduction_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for study in range(200):
        before = rng.exponential(2.0, size=60)
        after = before * rng.uniform(0, 0.6, size=60)  # truth: 1 - 0.3
        (low, high), usable = bootstrap_reduction(before, after, samples=500, seed=study)
        covered += low <= 0.7 <= high
        assert usable == 1.0
    assert covered >= 178
    assert np.isnan(bootstrap_reduction([0, 0], [0, 1])[0]).all()


def test_pcr_by_margin() -> None:
    rng = np.random.default_rng(0)
    lost = rng.normal(3, 1, 40)
    found = margin_reduction(lost, lost / 4)
    assert found["margin_value"] == pytest.approx(0.75)
    assert found["margin_low"] <= 0.75 + 1e-9
    assert np.isnan(margin_reduction(-lost, lost)["margin_value"])
    hardly = margin_reduction(np.tile([5.0, -4.9], 20), lost)  # hardly any damage to reduce
    assert np.isfinite(hardly["margin_value"])
    assert np.isnan([hardly["margin_low"], hardly["margin_high"]]).all()
    assert np.isnan(margin_reduction([], [])["margin_value"])


# --- the transition ---


WIDTHS = (8, 6, 5, 4, 3, 2)


@pytest.mark.parametrize(
    ("lost", "of", "safe", "onset", "collapse"),
    [
        ((0, 0, 1, 40, 80, 100), 100, (8, 6, 5), (5, 4), (5, 3)),  # 40 of 100 may be one half
        ((0, 0, 0, 0, 0, 0), 100, WIDTHS, (2, None), (2, None)),
        ((0, 0, 0, 0, 0, 0), 10, (), (16, None), (2, None)),
        ((3, 16, 3, 13, 16, 16), 16, (), (16, 6), (16, 6)),
        ((0, 50, 0, 100, 100, 100), 100, (8,), (8, 6), (8, 4)),
        ((0,) * 6, 0, (), (16, None), (16, None)),  # nothing is refused
    ],
)
def test_transition(
    lost: tuple[int, ...], of: int, safe: tuple[int, ...], onset: tuple[int, ...], collapse: tuple[int, ...]
) -> None:
    found = locate(WIDTHS, lost, lost, [0] * 6, refused=of)
    assert (found.safe, found.onset, found.collapse) == (safe, onset, collapse)
    broken = locate(WIDTHS, lost, [0] * 6, lost, refused=of)
    assert (broken.safe, broken.language) == (safe, onset)
    assert broken.onset[1] is None


def test_a_transition_says_no_more_than_was_tried() -> None:
    alone = locate((4,), (50,), (50,), (0,), refused=100)
    assert alone.onset == (16, 4)
    assert locate((8, 4), (0, 50), (0, 50), (0, 0), refused=100).onset == (8, 4)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_sides_are_those_of_exact_tests_with_the_step_down_of_holm(counts: list[int]) -> None:
    n, border = 40, 0.1
    for side, tail in (
        ("above", lambda k: sum(comb(n, j) * border**j * (1 - border) ** (n - j) for j in range(k, n + 1))),
        ("below", lambda k: sum(comb(n, j) * border**j * (1 - border) ** (n - j) for j in range(k + 1))),
    ):
        found = shares_above(counts, n, border)
        rejected, left = set[int](), len(counts)
        for index in sorted(range(len(counts)), key=lambda index: tail(counts[index])):
            if tail(counts[index]) * left > 0.05:
                break
            rejected.add(index)
            left -= 1
        assert {index for index, where in enumerate(found) if where == side} == rejected


def test_a_width_is_wrongly_said_to_break_in_no_more_than_one_curve_of_twenty() -> None:
    """With a true loss of exactly a tenth at each of six widths, and so for "kept"."""
    rng = np.random.default_rng(0)
    for n in (16, 64, 256):
        found = [shares_above(rng.binomial(n, 0.1, size=6).tolist(), n, 0.1) for _ in range(1000)]
        assert np.mean([("above" in sides) for sides in found]) <= 0.06
        assert np.mean([("below" in sides) for sides in found]) <= 0.06


def test_pcr_without_a_critical_layer() -> None:
    base = baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    none = per_channel_reduction(base, None)
    assert none.status == "undetermined"
    assert "no single layer" in none.reason
    some = per_channel_reduction(base, 1)
    assert int(some.data.prompts) == len(base.refused)
    assert some.layer == 1
