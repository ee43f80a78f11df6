"""Partial rank correlations: against textbook formulas, and the coverage of their intervals by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from kvgeom.errors import InputError
from kvgeom.geometry.prediction import Units, partial_rank_correlation, residuals


def drawn(
    rng: np.random.Generator, units: int, rho: float, noise: float = 0.0, prompts: int = 16
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Two sides that share three controls, and ``rho`` beside them."""
    controls = rng.normal(size=(4, units))
    a, b = rng.normal(size=(2, units))
    x, y = a + controls[:3].sum(0), rho * a + np.sqrt(1 - rho**2) * b + controls[:3].sum(0)
    seen = (side[:, None] + noise * rng.normal(size=(units, prompts)) for side in (x, y))
    return (*seen, list(controls))  # type: ignore[return-value]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_one_control_by_the_textbook(seed: int) -> None:
    """``(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2))`` of Spearman's correlations."""
    x, y, z = np.random.default_rng(seed).normal(size=(3, 12))
    xy, xz, yz = (float(spearmanr(*pair).statistic) for pair in ((x, y), (x, z), (y, z)))
    found = partial_rank_correlation(Units(x, y, [z]), samples=5)
    assert found.value == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-9)
    assert found.plain == pytest.approx(xy, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_what_is_left_has_nothing_of_the_controls(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    x, y, *controls = rng.normal(size=(2 + count, 15))
    left = residuals(x, y, controls)
    assert left is not None
    for side in left:
        assert abs(side.sum()) < 1e-9
        for control in controls:
            assert abs(side @ rankdata(control)) < 1e-8


def test_a_measure_that_says_what_the_controls_say_is_undetermined() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    found = partial_rank_correlation(Units(np.exp(x), y, [x]))
    assert np.isnan([found.value, found.low]).all()
    assert not found.beyond
    assert "undetermined" in str(found)
    assert found.plain == pytest.approx(float(spearmanr(x, y).statistic))
    # As is one over hardly more units than controls.
    assert np.isnan(partial_rank_correlation(Units(*rng.normal(size=(2, 6)), list(rng.normal(size=(4, 6))))).value)


def test_intervals_cover_and_nulls_hold() -> None:
    """Units and prompts drawn anew in each study; the truth is that of 20,000 units."""
    for units, rho, noise in ((18, 0.0, 2.0), (24, 0.6, 2.0), (96, 0.6, 0.0)):
        x, y, controls = drawn(np.random.default_rng(5), 20_000, rho, noise)
        left = residuals(x.mean(1), y.mean(1), controls)
        assert left is not None
        truth = float(left[0] @ left[1] / np.sqrt((left[0] @ left[0]) * (left[1] @ left[1])))
        rng, covered, beyond = np.random.default_rng(7), 0, 0
        for study in range(60):
            found = partial_rank_correlation(Units(*drawn(rng, units, rho, noise)), samples=60, seed=study)  # type: ignore[arg-type]
            covered += found.low <= truth <= found.high
            beyond += found.beyond
        assert covered >= 54  # of 57 expected; 53 or fewer has a chance of 3 %
        assert beyond <= 5 if rho == 0 else beyond >= 10


def test_units_that_come_together_are_one_sample() -> None:
    """Eight copies of each unit are no eight samples."""
    rng = np.random.default_rng(1)
    narrower = 0
    for _ in range(5):
        x, y = rng.normal(size=(2, 20))
        y = x + y
        once = partial_rank_correlation(Units(x, y), samples=200)
        copies = Units(x.repeat(8), y.repeat(8), clusters=np.arange(20).repeat(8))
        together = partial_rank_correlation(copies, samples=200)
        assert together.value == pytest.approx(once.value, abs=0.02)
        assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.25)
        naive = partial_rank_correlation(Units(x.repeat(8), y.repeat(8)), samples=200)
        narrower += naive.high - naive.low < 0.6 * (together.high - together.low)
    assert narrower == 5


def test_models_are_ranked_one_by_one() -> None:
    """A model whose damage and predictors are all larger makes no correlation."""
    rng = np.random.default_rng(0)
    parts = [Units(*(rng.normal(size=(2, 200)) + shift)) for shift in (0, 50)]
    found = partial_rank_correlation(parts, samples=100)
    assert abs(found.value) < 0.15
    assert (found.units, found.clusters) == (400, 400)


def test_what_does_not_go_together() -> None:
    with pytest.raises(InputError, match="shape"):
        Units(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="same prompts"):
        Units(np.ones((3, 5)), np.ones(3), [np.ones((3, 4))])
    with pytest.raises(InputError, match="clusters"):
        Units(np.ones(3), np.ones(3), clusters=np.arange(2))
    with pytest.raises(InputError, match="at least one model"):
        partial_rank_correlation([])
    with pytest.raises(InputError, match="level"):
        partial_rank_correlation(Units(np.ones(3), np.ones(3)), level=95)
