"""Paired decisions against independent computations, and their error rates by enumeration."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from kvgeom.paired import Comparison, lost_share, not_worse, score, share_difference, worse

COUNTS = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))


def log_likelihood(share: float, difference: float, lost: int, gained: int, rest: int) -> float:
    """Of a multinomial whose cells are lost, gained and all else."""
    parts = ((lost, share + difference), (gained, share), (rest, 1 - 2 * share - difference))
    if any(p < 0 or (n and p <= 0) for n, p in parts):
        return -np.inf
    return sum(n * np.log(p) for n, p in parts if n)


def brute_score(difference: float, lost: int, gained: int, refusals: int) -> float:
    """The same statistic from the likelihood, maximized numerically."""
    rest = refusals - lost - gained
    bounds = (max(0.0, -difference), (1 - difference) / 2)
    found = minimize_scalar(
        lambda q: -log_likelihood(q, difference, lost, gained, rest),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-12},
    )
    q = max([found.x, *bounds], key=lambda q: log_likelihood(q, difference, lost, gained, rest))
    variance = (2 * q + difference - difference**2) / refusals  # of a mean of -1, 0 and 1
    return ((lost - gained) / refusals - difference) / np.sqrt(variance)


@given(COUNTS, st.floats(0.02, 0.6))
def test_the_score_is_that_of_the_likelihood(counts: tuple[int, int, int], difference: float) -> None:
    lost, gained, both = counts
    refusals = lost + gained + both
    if refusals:
        expected = brute_score(difference, lost, gained, refusals)
        assert float(score(difference, lost, gained, refusals)) == pytest.approx(expected, abs=1e-4)


def table(refusals: int, difference: float, share: float) -> dict[tuple[int, int], float]:
    """Probability of every outcome."""
    p, q = share + difference, share
    return {
        (b, c): comb(refusals, b) * comb(refusals - b, c) * p**b * q**c * max(0.0, 1 - p - q) ** (refusals - b - c)
        for b in range(refusals + 1)
        for c in range(refusals + 1 - b)
    }


@pytest.mark.parametrize(("refusals", "tolerance"), [(12, 0.2), (30, 0.1), (40, 0.15)])
def test_a_loss_of_the_tolerance_passes_in_no_more_than_one_of_twenty_cases(refusals: int, tolerance: float) -> None:
    passes = {
        (b, c): not_worse(b, c, refusals, tolerance) <= 0.05
        for b in range(refusals + 1)
        for c in range(refusals + 1 - b)
    }
    rates = [
        sum(p for cell, p in table(refusals, tolerance, share).items() if passes[cell])
        for share in np.linspace(0, (1 - tolerance) / 2, 40)
    ]
    assert max(rates) <= 0.0501
    assert refusals < 29 or max(rates) > 0.02  # it is not a test that never passes


def test_a_candidate_that_only_tips_prompts_fails_in_no_more_than_one_of_twenty_cases() -> None:
    for share in (0.02, 0.1, 0.3):
        assert sum(p for (b, c), p in table(40, 0.0, share).items() if worse(b, c) <= 0.05) <= 0.05


@given(COUNTS, st.sampled_from([0.05, 0.1, 0.2]))
@settings(max_examples=25)
def test_the_p_value_is_the_largest_over_what_is_not_known(counts: tuple[int, int, int], tolerance: float) -> None:
    lost, gained, both = (min(count, 9) for count in counts)
    refusals = lost + gained + both
    if not refusals:
        return
    seen = float(score(tolerance, lost, gained, refusals))
    region = [
        cell for cell in table(refusals, tolerance, 0.1) if float(score(tolerance, *cell, refusals)) <= seen + 1e-9
    ]
    shares = np.linspace(0, (1 - tolerance) / 2, 60)
    tables = (table(refusals, tolerance, share) for share in shares)
    rates = [sum(each[cell] for cell in region) for each in tables]
    found = not_worse(lost, gained, refusals, tolerance)
    assert max(rates) - 1e-6 <= found <= max(rates) + 0.01  # both look for the largest on grids


@given(COUNTS)
@settings(max_examples=12)
def test_the_interval_holds_what_was_seen_and_turns_around_with_the_two(counts: tuple[int, int, int]) -> None:
    lost, gained, both = counts
    refusals = lost + gained + both
    if not refusals:
        return
    share, low, high = lost_share(lost, gained, refusals)
    assert -1 <= low <= share <= high <= 1
    assert lost_share(gained, lost, refusals) == pytest.approx((-share, -high, -low))


@given(COUNTS)
@settings(max_examples=30)
@example((7, 11, 14))  # the p-value is .05 at 10.2 % a second time
def test_the_interval_and_the_decision_agree(counts: tuple[int, int, int]) -> None:
    lost, gained, both = counts
    found = Comparison(both, lost, gained, 0.1)
    if found.refusals and abs(found.share[2] - 0.1) > 1e-3:
        assert (found.decision == "pass") == (found.share[2] < 0.1)


def test_the_decisions() -> None:
    assert Comparison(29, 0, 0, 0.1).decision == "pass"
    assert Comparison(28, 0, 0, 0.1).decision == "too few"
    assert Comparison(19, 5, 0, 0.1).decision == "fail"
    assert Comparison(20, 4, 0, 0.1).decision == "too few"
    assert Comparison(995, 5, 0, 0.1).decision == "pass"  # worse, and by less than the tolerance
    assert Comparison(0, 0, 0, 0.1).decision == "too few"


def test_what_is_needed_decides() -> None:
    assert Comparison(20, 0, 0, 0.1).refusals_needed() == 29
    assert Comparison(0, 0, 0, 0.1).refusals_needed() is None
    found = Comparison(20, 4, 0, 0.1).refusals_needed()
    assert found is not None
    assert Comparison(found - round(found / 6), round(found / 6), 0, 0.1).decision == "fail"


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 40))
def test_the_interval_of_a_difference_is_what_the_score_does_not_reject(lost: int, gained: int, same: int) -> None:
    refusals = lost + gained + same
    assume(refusals > 0)
    found = share_difference(lost, gained, refusals)
    assert found.value == (lost - gained) / refusals
    assert -1 <= found.low <= found.value <= found.high <= 1
    other = share_difference(gained, lost, refusals)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-6)
    for end, sign in ((found.low, 1), (found.high, -1)):
        if abs(end) < 1 - 1e-6:
            assert float(score(end, lost, gained, refusals)) == pytest.approx(sign * 1.959964, abs=1e-3)


def test_the_interval_of_a_difference_covers() -> None:
    """95 % of intervals hold the truth, of pairs that change in either direction."""
    rng = np.random.default_rng(0)
    for refusals, lose, gain in ((15, 0.3, 0.1), (40, 0.05, 0.05), (120, 0.4, 0.02)):
        held = 0
        for _ in range(400):
            lost, gained, _same = rng.multinomial(refusals, [lose, gain, 1 - lose - gain])
            found = share_difference(int(lost), int(gained), refusals)
            held += found.low <= lose - gain <= found.high
        assert held >= 0.92 * 400
