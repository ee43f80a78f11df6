"""The signal without bias, its interval and the nulls: closed forms, and rates by simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.geometry.ratio import Contrast, Moments, above_all, null_quantities, quantities, random_bases
from kvgeom.geometry.signal import (
    MOST_UNITS,
    Design,
    chance,
    cross_fit,
    held_out_signal,
    left_out,
    noise_to_signal,
    signal,
)


def design(bad: int, good: int | None = None) -> Design:
    return Design.of(np.repeat([True, False], [bad, bad if good is None else good]))


def within(rate: float, expected: float, count: int, errors: float = 4.0) -> bool:
    """A share that is what it should be, but for the chance of so many draws."""
    return bool(abs(rate - expected) <= errors * np.sqrt(expected * (1 - expected) / count))


def test_the_old_estimate_is_biased_by_what_it_should_be_and_the_new_one_is_not() -> None:
    """Gaussian pairs: E|gap|^2 = |mu|^2 + tr S / n; the cross-fitted one has |mu|^2."""
    rng = np.random.default_rng(0)
    n, spread, mu = 12, np.linspace(0.2, 3, 20), rng.standard_normal(20) * 0.3
    draws = 4000
    g = mu + spread * rng.standard_normal((draws, n, 20))
    old = (g.mean(1) ** 2).sum(-1)
    new = np.array([cross_fit(each @ each.T, design(n)) for each in g])
    assert abs(old.mean() - mu @ mu - (spread**2).sum() / n) < 4 * old.std() / np.sqrt(draws)
    assert abs(new.mean() - mu @ mu) < 4 * new.std() / np.sqrt(draws)
    assert old.mean() > 3 * mu @ mu, "a bias that matters"


def test_cross_fit_is_the_mean_product_of_the_gaps_of_all_halves() -> None:
    g = np.random.default_rng(1).standard_normal((6, 4))
    products = [
        g[list(half)].mean(0) @ g[[row for row in range(6) if row not in half]].mean(0)
        for half in combinations(range(6), 3)
    ]
    assert cross_fit(g @ g.T, design(6)) == pytest.approx(np.mean(products))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(3, 7), st.integers(3, 7))
def test_classes_of_two_sizes(seed: int, bad: int, good: int) -> None:
    """By the definition: products of different requests alone; and every unit left out is as if it had never been."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((bad + good, 5)) + 10
    one = design(bad, good)
    rows = one.rows(x)
    if bad == good:
        g = x[:bad] - x[bad:]
        np.testing.assert_allclose(rows, g)
        expected = np.mean([g[i] @ g[j] for i in range(bad) for j in range(bad) if i != j])
    else:
        a, b = x[:bad], x[bad:]
        expected = (
            np.mean([a[i] @ a[j] for i in range(bad) for j in range(bad) if i != j])
            + np.mean([b[i] @ b[j] for i in range(good) for j in range(good) if i != j])
            - 2 * np.mean(a @ b.T)
        )
    assert cross_fit(rows @ rows.T, one) == pytest.approx(expected)
    np.testing.assert_allclose(one.weights @ rows, x[:bad].mean(0) - x[bad:].mean(0), atol=1e-12)
    deleted = left_out(rows @ rows.T, one)
    for unit in range(len(rows)):
        keep = np.arange(len(rows)) != unit
        less = Design(one.harmful, one.block, one.sign[keep])
        assert deleted[unit] == pytest.approx(cross_fit(rows[keep] @ rows[keep].T, less))


def test_what_twins_share_is_no_signal() -> None:
    """Requests of a pair have most in common; as classes of strangers they would look nearer than they are."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(2000):
        shared = 3 * rng.standard_normal((10, 8))
        x = np.concatenate([shared + 0.1 * rng.standard_normal((10, 8)), shared + 0.1 * rng.standard_normal((10, 8))])
        rows = design(10).rows(x)
        found.append(cross_fit(rows @ rows.T, design(10)))
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_many_pairs_are_blocks_and_the_estimate_stays_unbiased() -> None:
    one = design(150)
    assert len(one.sign) == MOST_UNITS
    rng = np.random.default_rng(3)
    mu, found = np.array([0.1, 0.0, 0.05]), []
    for _ in range(800):
        rows = one.rows(rng.standard_normal((300, 3)) + np.where(one.harmful, 1, 0)[:, None] * mu)
        found.append(cross_fit(rows @ rows.T, one))
    assert abs(np.mean(found) - mu @ mu) < 4 * np.std(found) / np.sqrt(len(found))


#: Dimensions, decay of their spread, pairs, signal over its bias.
SETTINGS = [(1, 0.0, 16, 1.0), (8, 0.0, 16, 3.0), (64, 1.0, 32, 1.0), (64, 1.0, 8, 10.0), (64, 2.0, 16, 3.0), (64, 0.0, 16, 0.0)]  # fmt: skip


def sample(rng: np.random.Generator, channels: int, decay: float, n: int, strength: float, mu: np.ndarray, noise: np.ndarray):  # type: ignore[no-untyped-def]  # fmt: skip
    """Rows of pairs, and the Gram matrices of them and of noise along them."""
    spread = np.arange(1, channels + 1.0) ** -decay
    rows = mu * np.sqrt(strength / n) + rng.standard_normal((n, channels)) * np.sqrt(spread / spread.sum())
    return rows @ rows.T, (rows * noise) @ rows.T


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_intervals_hold_the_truth(setting: tuple[int, float, int, float]) -> None:
    """In nine of ten samples at least where 95 % are asked for, whatever is known of the signal; noise is uneven."""
    channels, decay, n, strength = setting
    rng = np.random.default_rng(4)
    mu = rng.standard_normal(channels)
    mu /= np.linalg.norm(mu)
    noise = np.exp(rng.standard_normal(channels))
    squared = strength / n
    truth = float("inf") if squared == 0 else (mu * noise) @ mu / squared
    one, held, ratio_held, valued = design(n), [], [], []
    dealt = one.dealt(199)
    for _ in range(400):
        gram, along = sample(rng, channels, decay, n, strength, mu, noise)
        found = signal(gram, one)
        held.append(found.low <= squared <= found.high)
        both = noise_to_signal(gram, along, one, found, chance(gram, dealt, one.weights) <= 0.05)
        low, high = both.estimate.low, both.estimate.high
        ratio_held.append(low <= truth and not truth > high)  # NaN is no upper bound
        valued.append(np.isfinite(both.estimate.value))
    assert np.mean(held) >= 0.92
    assert np.mean(ratio_held) >= 0.90
    if strength == 0:
        assert within(float(np.mean(valued)), 0.05, 400)
    if strength == 10:
        assert np.mean(valued) > 0.95


def test_one_dimension_has_the_upper_limit_of_the_mean() -> None:
    from scipy import stats

    g = np.random.default_rng(5).standard_normal((9, 1)) + 0.4
    high = abs(g.mean()) + stats.t.ppf(0.975, 8) * stats.sem(g[:, 0])
    assert signal(g @ g.T, design(9)).high >= high**2 * (1 - 1e-9)


def test_noise_that_misses_the_class_difference_leaves_no_bound() -> None:
    """Along the fitted direction there is some, by what chance adds to it; along the true one there is none."""
    rng, one = np.random.default_rng(11), design(12)
    none = 0
    for _ in range(200):
        rows = np.eye(6)[0] * 2 + rng.standard_normal((12, 6)) * 0.5
        found = signal(rows @ rows.T, one)
        both = noise_to_signal(rows @ rows.T, (rows * np.r_[0, np.ones(5)]) @ rows.T, one, found, True)
        assert not both.estimate.low > 0.02, "no bound that is above what is true, or nearly so"
        none += np.isnan(both.estimate.low)
    assert none > 50


@pytest.mark.parametrize("sizes", [(12, 12), (7, 15)])
def test_labels_that_mean_nothing_are_told_from_chance_in_one_of_twenty(sizes: tuple[int, int]) -> None:
    rng, one = np.random.default_rng(6), design(*sizes)
    dealt = one.dealt(199, seed=1)
    p = []
    for _ in range(1000):
        rows = one.rows(rng.exponential(size=(sum(sizes), 30)) ** 2)
        p.append(chance(rows @ rows.T, dealt, one.weights))
    for level in (0.05, 0.2):
        assert within(float(np.mean(np.array(p) <= level)), level, len(p))


def test_held_out_subspaces_have_an_unbiased_signal() -> None:
    """Fitted to the same requests, a subspace of noise has signal; fitted to others, it has none."""
    rng, harmful = np.random.default_rng(7), np.repeat([True, False], 15)
    found, fixed = [], []
    mu = np.r_[1.0, 0.5, np.zeros(10)]
    for _ in range(400):
        x = rng.standard_normal((30, 12))

        def leading(rows: np.ndarray, x: np.ndarray = x) -> np.ndarray:
            g = x[rows[harmful[rows]]] - x[rows[~harmful[rows]]]
            return np.linalg.svd(g, full_matrices=False)[2][:3].T

        found.append(held_out_signal(x, harmful, leading).value)
        fixed.append(held_out_signal(x + harmful[:, None] * mu, harmful, lambda _: np.eye(12)[:, :2]).value)
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert abs(np.mean(fixed) - mu @ mu) < 4 * np.std(fixed) / 20


def moments_of(rows: np.ndarray, errors: np.ndarray, null: np.ndarray) -> Moments:
    found = Moments.zero(rows.shape[1], len(rows), len(null))
    found.add(errors, errors, rows, None, null)
    return found


def test_null_a_rejects_in_one_of_twenty_where_noise_has_no_aim_and_always_where_it_has() -> None:
    """Directions without relation to the noise: uniformly random ones, and such as requests differ in by chance."""
    rng, one = np.random.default_rng(8), design(32)
    dealt, null = one.dealt(99), random_bases(10, 1, 99)
    random, labels = [], []
    for _ in range(600):
        errors, spread = (
            rng.standard_normal((30, 10)) * np.exp(rng.standard_normal(10)),
            np.exp(rng.standard_normal(10)),
        )
        rows = rng.standard_normal((32, 10)) + rng.standard_normal(10)
        random.append(null_quantities(moments_of(rows, errors, null), Contrast(one, rows, dealt), 1.0)["null_p"])
        rows = (rng.standard_normal((32, 10)) + rng.standard_normal(10)) * spread
        labels.append(null_quantities(moments_of(rows, errors, null), Contrast(one, rows, dealt), 1.0)["dealt_p"])
    assert within(float(np.mean(np.array(random) <= 0.05)), 0.05, 600)
    assert within(float(np.mean(np.array(labels) <= 0.05)), 0.05, 600)
    rows = 3 * np.eye(10)[0] + 0.1 * rng.standard_normal((32, 10))
    aimed = 0.1 * rng.standard_normal((30, 10)) + 5 * np.outer(rng.standard_normal(30), np.eye(10)[0])
    found = null_quantities(moments_of(rows, aimed, null), Contrast(one, rows, dealt), 7.0)
    assert found["null_p"] == pytest.approx(0.01)
    assert found["dealt_p"] == pytest.approx(0.01)
    assert max(found["null_high"], found["dealt_high"]) < 7.0 * 10


def test_null_a_keeps_the_signal() -> None:
    """The same as measuring again after the class difference was turned to each direction, its length kept."""
    rng, one = np.random.default_rng(9), design(14)
    rows = rng.standard_normal((14, 6)) * 0.3 + np.eye(6)[0]
    x = rng.standard_normal((50, 6)) + 2
    errors, null = rng.standard_normal((50, 6)) * np.arange(1, 7), random_bases(6, 1, 40)
    moments = Moments.zero(6, 14, 40)
    moments.add(x, errors, rows, None, null)
    contrast = Contrast(one, rows, one.dealt(99))
    own = quantities(moments, contrast)
    found = null_quantities(moments, contrast, own["signal_gap"])
    squared = cross_fit(rows @ rows.T, one)
    full = (errors**2).sum() / (x**2).sum()
    ratios = [np.mean((errors @ v[:, 0]) ** 2) / (squared / 4) / full for v in null]
    for name, q in (("null_low", 0.025), ("null_median", 0.5), ("null_high", 0.975)):
        assert found[name] == pytest.approx(np.quantile(ratios, q))


@pytest.mark.parametrize(
    "differ", [pytest.param(0.0, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_null_b_is_above_all_19_in_one_of_twenty_at_most(differ: float) -> None:
    """Twenty contrasts of a kind against the same requests, of which one is called safety."""
    rng, one, above, count = np.random.default_rng(10), design(10), [], 500
    for _ in range(count):
        noise, shared = np.exp(rng.standard_normal(20)), rng.standard_normal((10, 20))
        raw = []
        for _ in range(20):
            mu = rng.standard_normal(20) * 0.6 * np.exp(differ * rng.standard_normal())
            rows = mu + rng.standard_normal((10, 20)) - shared
            gram = rows @ rows.T
            raw.append(noise_to_signal(gram, (rows * noise) @ rows.T, one, signal(gram, one), True).raw)
        above.append(above_all(raw[0], np.array(raw[1:])) <= 0.05)
    assert np.mean(above) <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / count)


def test_above_all_counts() -> None:
    assert above_all(3.0, np.arange(3.0)) == 0.25
    assert above_all(3.0, np.array([1.0, np.inf, np.nan, 3.0])) == 0.75
