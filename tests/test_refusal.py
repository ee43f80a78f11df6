"""Margin and directions, against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kvgeom.refusal.direction import difference_of_means, separation
from kvgeom.refusal.margin import margin, refusal_tokens


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_refusal_tokens_begin_refusals(responses: list[tuple[int, bool]]) -> None:
    first, refused = [t for t, _ in responses], [r for _, r in responses]
    found = refusal_tokens(first, refused)
    assert bool(found) == any(refused)

    def share(token: int) -> float:
        return float(np.mean([r for t, r in responses if t == token]))

    clear = {t for t, r in responses if r and share(t) >= 0.5}
    assert found == clear or (not clear and all(share(t) == max(map(share, first)) for t in found))


@given(st.integers(0, 2**31), st.integers(1, 20), st.floats(0.1, 30))
def test_margin_is_log_odds(seed: int, size: int, spread: float) -> None:
    logits = spread * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    tokens = list(range(size))
    p = logits.double().softmax(-1)
    expected = p[:, tokens].sum(-1).log() - p[:, size:].sum(-1).log()
    torch.testing.assert_close(margin(logits, tokens).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(margin(logits + 7, tokens), margin(logits, tokens), atol=1e-4, rtol=1e-4)


def test_a_certain_margin_is_finite() -> None:
    logits = torch.full((5,), -100.0)
    logits[2] = 100.0
    assert margin(logits, [2]) == pytest.approx(200 - np.log(4), abs=1e-3)


def planted(prompts: int, channels: int, effect: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(channels)
    direction /= np.linalg.norm(direction)
    harmful = np.arange(2 * prompts) < prompts
    return rng.standard_normal((2 * prompts, channels)) + effect * np.outer(harmful, direction), harmful, direction


def test_difference_of_means() -> None:
    x, harmful, direction = planted(400, 32, 8.0, seed=0)
    gap = difference_of_means(x, harmful)
    np.testing.assert_allclose(
        gap, np.array([x[harmful][:, c].sum() / 400 - x[~harmful][:, c].sum() / 400 for c in range(32)])
    )
    assert gap @ direction / np.linalg.norm(gap) > 0.99


def test_separation_finds_what_is_there_and_only_that() -> None:
    x, harmful, _ = planted(60, 20, 4.0, seed=1)
    strong = separation(x, harmful)
    assert strong.auroc > 0.95
    assert strong.p < 1e-6
    # Without a difference p-values are those of chance: about one in twenty below 0.05, not many more.
    low = [separation(*planted(20, 40, 0.0, seed)[:2]).p < 0.05 for seed in range(100)]
    assert sum(low) <= 12


def test_separation_is_the_area_under_the_curve() -> None:
    """One feature in which the classes do not overlap but for one pair."""
    x = np.array([[5.0], [6.0], [7.0], [0.5], [0.0], [1.0], [2.0], [0.6]])
    harmful = np.arange(8) < 4
    found = separation(x, harmful, folds=4)
    assert found.auroc == pytest.approx(roc_auc_score(harmful, x[:, 0]), abs=0.13)


def test_separation_is_held_out() -> None:
    """With more channels than prompts any classes are separable in sample; out of sample they are not."""
    x, harmful, _ = planted(10, 2000, 0.0, seed=3)
    gap = difference_of_means(x, harmful)
    assert roc_auc_score(harmful, x @ gap) == 1.0
    assert separation(x, harmful).auroc < 0.9
