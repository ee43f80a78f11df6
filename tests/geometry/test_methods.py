"""Methods of finding directions: closed forms, symmetries, several dimensions, and independent computations of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.bases import agreement, along, oriented
from kvgeom.geometry.estimators import CONCEPTS, bootstrap, estimate, held_out, most_dimensions
from kvgeom.geometry.methods.clusters import Clusters
from kvgeom.geometry.methods.cone import Cone
from kvgeom.geometry.methods.logistic import Logistic
from kvgeom.geometry.methods.mean import difference_of_means, paired_differences
from kvgeom.geometry.methods.registry import METHODS, as_method, from_features
from kvgeom.geometry.methods.som import self_organizing_map
from kvgeom.geometry.methods.whitened import discriminant, shrinkage_of
from kvgeom.geometry.methods.winsorized import Winsorized
from kvgeom.prompts.sets import concept_contrasts
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_model

SEVERAL = ("pca", "clusters", "som")
seeds = st.integers(0, 10**6)


def drawn(seed: int, pairs: int = 12, channels: int = 10, shift: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    harmful = np.arange(2 * pairs) < pairs
    unit = rng.standard_normal(channels)
    x = 5 * rng.standard_normal(channels) + rng.standard_normal((2 * pairs, channels)) * rng.uniform(0.3, 2, channels)
    return x + np.where(harmful, 0.5, -0.5)[:, None] * shift * unit / np.linalg.norm(unit), harmful


def turned(seed: int, channels: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((channels, channels)))[0]  # type: ignore[no-any-return]


# --- what all methods share ---


@settings(max_examples=25, deadline=None)
@example(923, "som", 3)
@given(seeds, st.sampled_from(from_features()), st.integers(1, 5))
def test_bases_are_orthonormal_with_the_harmful_side_positive(seed: int, method: str, k: int) -> None:
    x, harmful = drawn(seed)
    k = min(k, most_dimensions(method, 1, 12))
    basis = estimate(x, harmful, method, k)
    # Neurons of a map, and centres of clusters, may lie on one line: then there are fewer directions.
    least = 1 if method in ("som", "clusters") else k
    assert basis.shape[0] == 10
    assert least <= basis.shape[1] <= k
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)
    assert (difference_of_means(x, harmful) @ basis >= -1e-9).all()


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([name for name in from_features() if name != "winsorized"]), st.integers(1, 3))
def test_subspaces_turn_with_the_space(seed: int, method: str, k: int) -> None:
    x, harmful = drawn(seed)
    k, turn = min(k, most_dimensions(method, 1, 12)), turned(seed, 10)
    found, other = estimate(x, harmful, method, k), estimate(x @ turn.T, harmful, method, k)
    np.testing.assert_allclose(other, turn @ found, atol=2e-3 if method == "logistic" else 1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(from_features()), st.integers(1, 3), st.floats(0.01, 1000))
def test_the_unit_of_length_does_not_matter(seed: int, method: str, k: int, scale: float) -> None:
    x, harmful = drawn(seed)
    k = min(k, most_dimensions(method, 1, 12))
    found, other = estimate(x, harmful, method, k), estimate(scale * x, harmful, method, k)
    np.testing.assert_allclose(other, found, atol=2e-3 if method == "logistic" else 1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([name for name in from_features() if name != "logistic"]), st.integers(1, 3))
def test_the_order_of_the_pairs_does_not_matter(seed: int, method: str, k: int) -> None:
    x, harmful = drawn(seed)
    k = min(k, most_dimensions(method, 1, 12))
    order = np.random.default_rng(seed).permutation(12)
    found, other = estimate(x, harmful, method, k), estimate(x[np.concatenate([order, 12 + order])], harmful, method, k)
    np.testing.assert_allclose(other, found, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_the_order_of_the_pairs_does_not_matter_to_a_probe_of_one_penalty(seed: int) -> None:
    """Which prompts share a fold depends on their order, and so may the penalty that is chosen."""
    x, harmful = drawn(seed)
    order = np.random.default_rng(seed).permutation(12)
    method = Logistic(strength=0.1)
    found = estimate(x, harmful, method)
    np.testing.assert_allclose(estimate(x[np.concatenate([order, 12 + order])], harmful, method), found, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([name for name in from_features() if name != "projected"]), st.integers(1, 3))
def test_where_0_is_does_not_matter(seed: int, method: str, k: int) -> None:
    """But to the difference without its part along the harmless mean."""
    x, harmful = drawn(seed)
    k = min(k, most_dimensions(method, 1, 12))
    offset = 3 * np.random.default_rng(seed).standard_normal(10)
    found, other = estimate(x, harmful, method, k), estimate(x + offset, harmful, method, k)
    np.testing.assert_allclose(other, found, atol=2e-3 if method == "logistic" else 1e-6)


@pytest.mark.parametrize("method", from_features())
def test_classes_that_coincide_have_no_direction(method: str) -> None:
    x, harmful = drawn(0)
    same = np.concatenate([x[:12], x[:12]])
    found = estimate(same, harmful, method)
    assert found.shape == (10, 1)
    assert np.linalg.norm(found) == pytest.approx(0, abs=1e-9) or method in ("logistic", "pca", "whitened", "som")
    assert np.isfinite(found).all()


@pytest.mark.parametrize("method", from_features())
def test_channels_in_the_thousands_and_few_prompts(method: str) -> None:
    """As in a model: the bootstrap in the span of the data, and all channels, find the same direction."""
    x, harmful = drawn(3, pairs=8, channels=200, shift=12.0)
    basis, drawn_again = bootstrap(x, harmful, method, samples=6)
    assert abs(float(basis[:, 0] @ estimate(x, harmful, method)[:, 0])) == pytest.approx(1, abs=1e-4)
    by_hand = []
    rng = np.random.default_rng(0)
    fixed = as_method(method).resampled(x, harmful)
    for _ in range(6):
        rows = rng.integers(0, 8, 8)
        again = estimate(x[np.concatenate([rows, 8 + rows])], harmful, fixed)
        by_hand.append(float(again[:, 0] @ estimate(x, harmful, fixed)[:, 0]))
    np.testing.assert_allclose(drawn_again, by_hand, atol=2e-3)


# --- each method ---


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_projected_off_the_harmless_mean(seed: int) -> None:
    x, harmful = drawn(seed)
    found, mean = estimate(x, harmful, "projected")[:, 0], x[~harmful].mean(0)
    assert float(found @ mean) == pytest.approx(0, abs=1e-9)
    # Of all directions across the mean, the one along which the classes differ most: least squares, by another way.
    gap = difference_of_means(x, harmful)
    rest = gap - mean * np.linalg.lstsq(mean[:, None], gap, rcond=None)[0]
    np.testing.assert_allclose(found, rest / np.linalg.norm(rest), atol=1e-9)


def test_projecting_takes_an_offset_out() -> None:
    """A constant that grows with harm, as a massive activation does, is along the mean."""
    rng = np.random.default_rng(0)
    x, harmful = rng.standard_normal((40, 30)), np.arange(40) < 20
    x[harmful, 3] += 6
    x[:, 0] += np.where(harmful, 1100, 1000)
    mean, projected = (estimate(x, harmful, name)[:, 0] for name in ("mean", "projected"))
    assert mean[0] > 0.99
    assert projected[3] > 0.9
    assert abs(projected[0]) < 0.02


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 20), st.integers(2, 40))
def test_shrinkage_is_that_of_scikit_learn(seed: int, rows: int, channels: int) -> None:
    from sklearn.covariance import LedoitWolf

    x = np.random.default_rng(seed).standard_normal((rows, channels)) * np.random.default_rng(1).uniform(
        0.1, 3, channels
    )
    shrinkage, variance = shrinkage_of(x)
    fitted = LedoitWolf(assume_centered=True, store_precision=False).fit(x)
    assert shrinkage == pytest.approx(fitted.shrinkage_, abs=1e-8)
    assert variance == pytest.approx(np.trace(x.T @ x) / rows / channels)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(3, 12), st.integers(3, 40))
def test_whitened_is_the_inverse_covariance_times_the_difference(seed: int, pairs: int, channels: int) -> None:
    from sklearn.covariance import LedoitWolf

    x, harmful = drawn(seed, pairs, channels)
    within = np.concatenate([x[rows] - x[rows].mean(0) for rows in (harmful, ~harmful)])
    covariance = LedoitWolf(assume_centered=True).fit(within).covariance_
    by_hand = np.linalg.solve(covariance, difference_of_means(x, harmful))
    found = discriminant(x, harmful)
    np.testing.assert_allclose(found / np.linalg.norm(found), by_hand / np.linalg.norm(by_hand), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_in_the_population(seed: int) -> None:
    """Gaussian classes: the inverse covariance times the shift, which separates better than the shift itself.

    Standard deviations from 0.3 to 3: what is shrunk of a variance of almost 0 matters at any number of rows.
    """
    rng = np.random.default_rng(seed)
    mixing, shift = turned(seed, 12) * np.geomspace(0.3, 3, 12), rng.standard_normal(12)
    harmful = np.arange(40_000) < 20_000
    x = rng.standard_normal((40_000, 12)) @ mixing.T + np.where(harmful, 0.5, -0.5)[:, None] * shift
    covariance = mixing @ mixing.T
    best = np.linalg.solve(covariance, shift)
    found = estimate(x, harmful, "whitened")[:, 0]
    separation = [float(u @ shift) / np.sqrt(float(u @ covariance @ u)) for u in (best, found, shift)]
    assert separation[1] == pytest.approx(separation[0], rel=0.01)
    assert separation[1] > 1.2 * separation[2]


def test_clusters_are_the_kinds_of_harm() -> None:
    """Three planted kinds, each with a direction of its own: the largest first, spanning what was planted."""
    rng = np.random.default_rng(0)
    planted = np.linalg.qr(rng.standard_normal((40, 3)))[0].T
    kind = np.repeat([0, 1, 2], [20, 12, 8])
    twins = 4 * rng.standard_normal((40, 40))
    x = np.concatenate([twins + 6 * planted[kind] + 0.3 * rng.standard_normal((40, 40)), twins])
    harmful = np.arange(80) < 40
    for method, least in (("clusters", 0.99), ("pca", 0.99)):
        assert agreement(estimate(x, harmful, method, 3), planted.T) > least
    centres = Clusters().directions(x, harmful, 3)
    cosines = planted @ (centres / np.linalg.norm(centres, axis=0))
    np.testing.assert_allclose(np.diag(cosines), 1, atol=0.02)
    one = estimate(x, harmful, "clusters")[:, 0]
    np.testing.assert_allclose(one, estimate(x, harmful, "mean")[:, 0], atol=1e-9)


def test_a_map_finds_the_kinds_of_harm() -> None:
    rng = np.random.default_rng(1)
    planted = np.linalg.qr(rng.standard_normal((40, 4)))[0].T
    kind = np.repeat([0, 1, 2, 3], 12)
    x = np.concatenate([8 * planted[kind], np.zeros((48, 40))]) + 0.3 * rng.standard_normal((96, 40)) + 50
    harmful = np.arange(96) < 48
    assert agreement(estimate(x, harmful, "som", 4), planted.T) > 0.97
    np.testing.assert_allclose(estimate(x, harmful, "som"), estimate(x, harmful, "mean"), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 7))
def test_a_map_is_a_fixed_point_of_its_rule(seed: int, neurons: int) -> None:
    """After many rounds of one width every neuron is the weighted mean of the rows, by loops over definitions."""
    rows = np.random.default_rng(seed).standard_normal((20, 4))
    units, counts = self_organizing_map(rows, neurons, rounds=300)
    height = max(side for side in range(1, neurons + 1) if neurons % side == 0 and side * side <= neurons)
    place = [(i, j) for i in range(height) for j in range(neurons // height)]
    best = [min(range(neurons), key=lambda u: float(((row - units[u]) ** 2).sum())) for row in rows]
    assert counts.sum() == len(rows)
    for unit in range(neurons):
        near = [np.exp(-((np.subtract(place[unit], place[b]) ** 2).sum()) / (2 * 0.5**2)) for b in best]
        np.testing.assert_allclose(units[unit], np.average(rows, axis=0, weights=near), atol=0.15)


def test_options_of_methods() -> None:
    x, harmful = drawn(0)
    np.testing.assert_allclose(estimate(x, harmful, Winsorized(share=0.0)), estimate(x, harmful, "mean"), atol=1e-9)
    assert Winsorized(share=0.0).options == {"share": 0.0}
    assert Winsorized().options == {}
    assert as_method("winsorized", {"share": 0.2}) == Winsorized(0.2)
    assert next(iter(METHODS)) == "mean"
    for bad in (
        lambda: Winsorized(share=0.5),
        lambda: Clusters(seed=-1),
        lambda: Cone(steps=0),
        lambda: Cone(start="zero"),  # type: ignore[arg-type]
        lambda: Cone(weights=(1.0, -1.0, 0.0)),
        lambda: Cone(rate=float("nan")),
        lambda: as_method("winsorized", {"portion": 1}),
        lambda: as_method("winsorised"),
        lambda: estimate(x, harmful, "cone"),
    ):
        with pytest.raises(InputError):
            bad()


# --- subspaces ---


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_agreement_by_principal_angles(seed: int, one: int, other: int) -> None:
    from scipy.linalg import subspace_angles

    rng = np.random.default_rng(seed)
    a, b = (np.linalg.qr(rng.standard_normal((9, k)))[0] for k in (one, other))
    by_hand = np.sqrt((np.cos(subspace_angles(a, b)) ** 2).mean())
    assert abs(agreement(a, b)) == pytest.approx(by_hand, abs=1e-9)
    turn = np.linalg.qr(rng.standard_normal((one, one)))[0]
    if one > 1:
        assert agreement(a @ turn, b) == pytest.approx(agreement(a, b))
        assert agreement(a, a @ turn) == pytest.approx(1)


def test_directions_that_depend_on_each_other_are_one() -> None:
    gap = np.array([1.0, -1, 0])
    found = oriented(np.array([[2.0, 0, 0], [-1, 0, 0], [0, 0, 3]]).T, gap)
    np.testing.assert_allclose(found, [[1, 0], [0, 0], [0, 1]])
    np.testing.assert_allclose(along(gap, found), [1, 0, 0])
    x, harmful = drawn(0, pairs=4)
    x[:4] = x[4:] + np.eye(10)[0]  # every pair differs alike
    assert estimate(x, harmful, "clusters", 3).shape == (10, 1)
    assert not along(gap, np.zeros((3, 1))).any()


@pytest.mark.parametrize("method", from_features())
def test_held_out_separation_of_nothing_and_of_much(method: str) -> None:
    """Classes that do not differ: chance on average; far apart: 1."""
    nothing = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((24, 15)) + 10 * rng.standard_normal(15)
        nothing.append(held_out(x, np.arange(24) < 12, method))
    assert np.mean(nothing) == pytest.approx(0.5, abs=0.09)
    x, harmful = drawn(0, shift=30.0)
    assert held_out(x, harmful, method) == 1


def test_held_out_separation_of_the_mean_is_that_of_the_separation() -> None:
    from kvgeom.geometry.separation import separation

    for seed in range(5):
        x, harmful = drawn(seed, shift=1.0)
        assert held_out(x, harmful, "mean") == pytest.approx(separation(x, harmful, draws=0).auroc)


def test_paired_differences_leave_out_who_has_no_partner() -> None:
    x = np.arange(10.0)[:, None]
    assert paired_differences(x, np.arange(10) < 6)[:, 0].tolist() == [-6, -6, -6, -6]


# --- on a model ---


@pytest.fixture(scope="module")
def space() -> Any:
    return kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)


@pytest.mark.parametrize(
    ("method", "k"),
    [
        pytest.param(name, 3 if name in SEVERAL else 1, marks=pytest.mark.slow if name == "logistic" else ())
        for name in from_features()
    ],
)
def test_every_method_by_name(space: Any, method: str, k: int, tmp_path: Any) -> None:
    found = kvgeom.subspace(space.model, MORE_PAIRS, method=method, k=k, progress=False)
    again = space.refit(method=as_method(method), k=k)
    for key, direction in found.directions.items():
        np.testing.assert_allclose(direction.basis, again.directions[key].basis, atol=1e-5)
        if direction.defined:
            size = direction.basis.shape[1]
            np.testing.assert_allclose(direction.basis.T @ direction.basis, np.eye(size), atol=1e-5)
    two = concept_contrasts()[:2]  # all of them take a minute where probes are fitted
    sensitivity = found.sensitivity(contrasts=two, progress=False)
    cell = sensitivity.data.sel(layer=2, site="v")
    assert np.isfinite(cell.ratio_plugin)
    assert (cell.status.item() == "ok") == bool(np.isfinite(cell.ratio))
    loaded = type(found).load(found.save(tmp_path / "space.nc"))
    assert (loaded.method, loaded.k) == (method, k)


def test_methods_with_options_are_written_down(space: Any, tmp_path: Any) -> None:
    found = space.refit(method=Winsorized(share=0.0))
    np.testing.assert_allclose(
        found.directions[2, "resid"].basis, space.refit(method="mean").directions[2, "resid"].basis
    )
    assert found.meta["method_options"] == {"share": 0.0}
    contrast = next(iter(found.contrasted("held-out").values()))
    assert contrast.meta["method_options"] == {"share": 0.0}
    assert type(found).load(found.save(tmp_path / "s.nc")).meta["method_options"] == {"share": 0.0}


def test_concepts_are_positions_by_their_meaning(space: Any) -> None:
    for concept, position in CONCEPTS.items():
        found = kvgeom.subspace(space.model, MORE_PAIRS, concept=concept, progress=False)
        other = space.refit(position=position)
        assert found.tried == (position,)
        assert found.data.equals(other.data)
        assert space.refit(concept=concept).data.equals(other.data)
    with pytest.raises(InputError, match="concept 'refusal' is read at 'template-1'"):
        kvgeom.subspace(space.model, MORE_PAIRS, concept="refusal", position="instruction")
    with pytest.raises(InputError, match="unknown concept 'harm"):
        space.refit(concept="harmfullness")


def test_compare_with_dimensions_and_heads(space: Any) -> None:
    found = space.compare(["mean", "pca", "som"], k=3, heads=True, samples=3, progress=False)
    assert found.data.sizes["head"] == space.model.geometry.kv_heads
    x = space.features(2, "v")[:, space.positions.index("template-1")]
    size = space.model.geometry.head_dim
    part = x[:, size : 2 * size]
    gap = difference_of_means(part, space.is_harmful)
    at = {"layer": 2, "kv": "v", "position": "template-1", "head": 1}
    np.testing.assert_allclose(
        found.data.direction_head.sel(at | {"estimator": "mean"}), gap / np.linalg.norm(gap), atol=1e-5
    )
    basis = estimate(part, space.is_harmful, "pca", 3)
    np.testing.assert_allclose(found.data.direction_head.sel(at | {"estimator": "pca"}), along(gap, basis), atol=1e-5)
    assert float(found.data.head_cosine_with_mean.sel(at | {"estimator": "mean"})) == pytest.approx(1)
    assert float(found.data.head_auroc.sel(at | {"estimator": "mean"})) == float(
        found.data.head_separation.sel(at | {"estimator": "mean"})
    )
    by_hand = float(along(gap, basis) @ gap) / np.linalg.norm(gap)
    assert float(found.data.head_cosine_with_mean.sel(at | {"estimator": "pca"})) == pytest.approx(by_hand)
    frame = found.overview()
    assert list(frame.method.unique()) == ["mean", "pca", "som"]
    assert (frame[frame.method == "mean"].cosine_with_mean.dropna() > 1 - 1e-9).all()
    assert len(found.to_frame("heads")) == 3 * 2 * 3 * 2 * 2
    between = found.cosines_of_positions("resid", 2)
    both = [found.vectors("resid", "mean", p)[2] for p in found.data.position.values]
    assert float(between[0, 1]) == pytest.approx(both[0] @ both[1], abs=1e-6)
    with pytest.raises(InputError, match="each with another name"):
        space.compare(["mean", "mean"], progress=False)
