"""Margin and directions, against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from kvgeom.evaluation.scores import margin, refusal_tokens
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.separation import folds_of, separation


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_refusal_tokens_begin_refusals(responses: list[tuple[int, bool]]) -> None:
    first, refused = [t for t, _ in responses], [r for _, r in responses]
    found = refusal_tokens(first, refused)
    assert found <= {token for token, is_refusal in responses if is_refusal}

    def sure(token: int) -> float:
        """Probability that more than half are refusals: the chance of no more than so many successes of n + 1 coins."""
        seen = [r for t, r in responses if t == token]
        return float(binom.cdf(sum(seen), len(seen) + 1, 0.5)) if any(seen) else 0.0

    assert found == {t for t in first if sure(t) >= 0.95 - 1e-12}
    silent = refusal_tokens([*first, *[-1] * 9], [*refused, *[True] * 9])
    assert silent == found, "an empty response begins with no token"


def test_a_first_word_seen_once_predicts_nothing() -> None:
    """R held the first tokens of single condemnations ("Sm" of "Smuggling ... is illegal")."""
    often, shared, once, never = 1, 2, 3, 4
    first = [often] * 12 + [shared] * 8 + [once] + [never] * 5
    refused = [True] * 12 + [True] * 4 + [False] * 4 + [True] + [False] * 5
    assert refusal_tokens(first, refused) == {often}
    assert refusal_tokens([once, never], [True, False]) == frozenset()
    assert refusal_tokens([1] * 10, [True] + [False] * 9) == frozenset()
    assert refusal_tokens([-1] * 10, [True] * 10) == frozenset()


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
    assert strong.p == 1 / 1000
    # Without a difference p-values are those of chance: about one in twenty below 0.05, not many more.
    low = [separation(*planted(20, 40, 0.0, seed)[:2]).p <= 0.05 for seed in range(100)]
    assert sum(low) <= 12


@pytest.mark.parametrize("shared", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("few", [24, 18])
def test_chance_is_a_half_where_requests_are_twins(shared: float, few: int) -> None:
    """However much twins share, and if some have none: AUROC 0.5, and p-values no lower than they say."""
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        twins = shared * rng.standard_normal((24, 30)) + rng.standard_normal((2, 24, 30))
        x = np.concatenate([twins[0], twins[1, :few]])
        found.append(separation(x, np.arange(24 + few) < 24, draws=199, seed=seed))
    aurocs = np.array([one.auroc for one in found])
    assert abs(aurocs.mean() - 0.5) < 4 * aurocs.std() / np.sqrt(len(aurocs))
    # More than 11 of 100 would have a chance of 0.4 % where each has one of 5 %.
    assert sum(one.p <= 0.05 for one in found) <= 11


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**31))
def test_separation_is_that_of_a_plain_loop(bad: int, good: int, channels: int, folds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    harmful = rng.permutation(np.arange(bad + good) < bad)
    x = rng.standard_normal((bad + good, channels)) + rng.standard_normal(channels)
    fold = folds_of(harmful, folds, seed)
    scores = []
    for row in range(len(x)):
        others = fold != fold[row]
        bad_mean, good_mean = x[others & harmful].mean(0), x[others & ~harmful].mean(0)
        gap = bad_mean - good_mean
        scores.append((x[row] - (bad_mean + good_mean) / 2) @ gap / np.linalg.norm(gap))
    found = separation(x, harmful, folds=folds, draws=19, seed=seed)
    assert found.auroc == pytest.approx(roc_auc_score(harmful, scores))
    assert found.auroc == separation(x, harmful, folds=folds, draws=0, seed=seed).auroc
    assert 0.05 <= found.p <= 1


@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 8), st.integers(0, 2**31))
def test_twins_share_a_fold(bad: int, good: int, folds: int, seed: int) -> None:
    harmful = np.random.default_rng(seed).permutation(np.arange(bad + good) < bad)
    fold = folds_of(harmful, folds, seed)
    few = min(bad, good)
    np.testing.assert_array_equal(fold[harmful][:few], fold[~harmful][:few])
    # Every fold holds both classes, and about as much of each as the others do.
    for one in (fold[harmful], fold[~harmful]):
        counts = np.bincount(one, minlength=min(folds, few))
        assert len(counts) == min(folds, few)
        assert (counts > 0).all()
        assert counts.max() - counts.min() <= 2


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
