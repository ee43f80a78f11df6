"""Directions: planted ones are found again, their stability is honest, and selection does what it says."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.errors import InputError
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.directions import compare
from kvgeom.geometry.estimators import bootstrap, estimate
from kvgeom.geometry.interventions import CacheDirections, Change, ablate, add
from kvgeom.geometry.methods.logistic import logistic_weights
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import from_features
from kvgeom.geometry.methods.winsorized import difference_of_winsorized_means
from kvgeom.geometry.selection import Selection, select
from kvgeom.geometry.steering import Steering, steer
from kvgeom.models.model import Model
from kvgeom.prompts.sets import PromptSet
from tests.builders.geometry import refusing
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_model


def planted(
    seed: int, n: int, channels: int, shift: float, spread: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes at +-shift/2 along a random unit direction, around a large common mean, with Gaussian spread."""
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal(channels)
    unit /= np.linalg.norm(unit)
    harmful = np.arange(2 * n) < n
    x = 20 * rng.standard_normal(channels) + np.where(harmful, 0.5, -0.5)[:, None] * shift * unit
    return x + spread * rng.standard_normal((2 * n, channels)), harmful, unit


@pytest.mark.parametrize("method", from_features())
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_found(method: str, seed: int) -> None:
    """Cosine above 0.99 in 64 channels: with 100 prompts a class that are 12 standard deviations apart, for all but the
    probe, which looks at few prompts when classes are that far apart; for it 10,000 a class, 2 standard deviations apart.
    """
    x, harmful, unit = planted(seed, 10_000, 64, 2.0) if method == "logistic" else planted(seed, 100, 64, 12.0)
    if method == "projected":  # finds what of it is not along the harmless mean
        mean = x[~harmful].mean(0)
        unit = unit - mean * (mean @ unit) / (mean @ mean)
        unit /= np.linalg.norm(unit)
    assert float(estimate(x, harmful, method)[:, 0] @ unit) > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_expected_cosine_of_the_difference_of_means(seed: int) -> None:
    """E[cos^2] = shift^2 / (shift^2 + C * 2/n) up to second order: sampling noise of the means, in closed form."""
    cosines = [
        float(estimate(x, harmful, "mean")[:, 0] @ unit) ** 2
        for x, harmful, unit in (planted(1000 * seed + run, 32, 128, 4.0) for run in range(40))
    ]
    assert np.mean(cosines) == pytest.approx(16 / (16 + 127 * 2 / 32), abs=0.03)


def test_outliers_move_the_mean_and_not_the_winsorized_mean() -> None:
    x, harmful, unit = planted(0, 100, 64, 12.0)
    x[:3, 5] += 1000
    cosine = {method: float(estimate(x, harmful, method)[:, 0] @ unit) for method in ("mean", "winsorized")}
    assert cosine["mean"] < 0.5
    assert cosine["winsorized"] > 0.98


def test_winsorized_mean_by_scipy() -> None:
    from scipy.stats.mstats import winsorize

    x, harmful, _ = planted(3, 101, 7, 1.0)  # 101: the quantiles are single values of the sample
    means = [np.asarray(winsorize(x[rows], limits=(0.1, 0.1), axis=0)).mean(0) for rows in (harmful, ~harmful)]
    np.testing.assert_allclose(difference_of_winsorized_means(x, harmful), means[0] - means[1], atol=1e-9)


def test_a_probe_turns_away_from_spread() -> None:
    """With anisotropic spread the best direction is inverse covariance times shift: the probe finds it, means do not."""
    spread = np.where(np.arange(16) < 8, 4.0, 0.5)
    x, harmful, unit = planted(5, 4000, 16, 2.0, spread)
    best = unit / spread**2
    best /= np.linalg.norm(best)
    assert float(estimate(x, harmful, "logistic")[:, 0] @ best) > 0.97
    assert float(estimate(x, harmful, "mean")[:, 0] @ unit) > 0.97
    assert float(unit @ best) < 0.9


def test_probe_is_that_of_the_whole_space() -> None:
    """Solving in the span of the data gives the weights that scikit-learn finds with all channels."""
    from sklearn.linear_model import LogisticRegression

    x, harmful, _ = planted(1, 20, 60, 2.0)
    weights, strength = logistic_weights(x, harmful, strength=0.1)
    centred = x - x.mean(0)
    _, s, _ = np.linalg.svd(centred, full_matrices=False)
    scaled = centred / np.sqrt((s**2).mean() / len(s))
    direct = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(scaled, harmful).coef_[0]
    assert strength == 0.1
    cosine = float(weights @ direct / np.linalg.norm(weights) / np.linalg.norm(direct))
    assert cosine == pytest.approx(1, abs=1e-4)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "pca", "logistic"]))
def test_directions_turn_with_the_space(seed: int, method: str) -> None:
    x, harmful, _ = planted(seed, 12, 10, 3.0)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((10, 10)))[0]
    np.testing.assert_allclose(
        estimate(x @ turn.T, harmful, method)[:, 0], turn @ estimate(x, harmful, method)[:, 0], atol=1e-3
    )


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=20)
def test_principal_differences_by_eigenvectors(seed: int, k: int) -> None:
    x, harmful, _ = planted(seed, 12, 10, 3.0)
    basis = estimate(x, harmful, "pca", k)
    differences = x[harmful] - x[~harmful]
    _, vectors = np.linalg.eigh(differences.T @ differences)
    np.testing.assert_allclose(basis.T @ basis, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(basis * vectors[:, ::-1][:, :k], 0)), 1, atol=1e-6)
    assert (difference_of_means(x, harmful) @ basis >= 0).all()


@pytest.mark.parametrize("method", from_features())
def test_stability_tells_much_data_from_little(method: str) -> None:
    firm, weak = (
        bootstrap(*planted(2, n, 40, shift)[:2], method, samples=30)[1] for n, shift in ((100, 8.0), (8, 0.5))
    )
    # Whitening estimates a covariance besides, of 40 channels from 200 rows.
    assert np.median(firm) > (0.94 if method == "whitened" else 0.97)
    assert np.median(weak) < 0.9
    assert firm.max() <= 1 + 1e-9


@pytest.mark.parametrize("method", from_features())
def test_bootstrap_keeps_the_direction(method: str) -> None:
    """Also where it works in the span of the data, because there are fewer prompts than channels."""
    x, harmful, _ = planted(4, 12, 60, 4.0)
    direction, cosines = bootstrap(x, harmful, method, samples=0)
    assert len(cosines) == 0
    assert float(direction[:, 0] @ estimate(x, harmful, method)[:, 0]) == pytest.approx(1, abs=1e-4)


def test_bad_methods() -> None:
    x, harmful, _ = planted(0, 5, 4, 1.0)
    with pytest.raises(InputError, match="median"):
        estimate(x, harmful, "median")
    with pytest.raises(InputError, match="use method='pca'"):
        estimate(x, harmful, "mean", 2)
    with pytest.raises(InputError, match="got k=6"):
        estimate(x, harmful, "pca", 6)


# --- on models ---


@pytest.fixture(scope="module")
def space() -> kvgeom.geometry.subspace.Subspace:  # type: ignore[name-defined]
    return kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)


def test_refit_needs_no_model(space, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Methods, dimensions, positions, and ratios of any scheme come from what was kept."""
    fresh = {
        options: kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False, **dict(options))
        for options in ((("method", "pca"), ("k", 3)), (("method", "winsorized"),), (("position", "template-1"),))
    }
    space.sensitivity(progress=False)
    monkeypatch.setattr(type(space.model), "forward", None)
    for options, other in fresh.items():
        again = space.refit(**dict(options))
        for key, direction in again.directions.items():
            np.testing.assert_allclose(direction.basis, other.directions[key].basis, atol=1e-6)
        assert again.sensitivity(progress=False).data.sizes["contrast"] == 19


def test_recording_leaves_with_its_owner() -> None:
    import gc

    found = kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)
    descriptor = found.activations._file.fileno()
    held = os.fstat(descriptor)
    assert held.st_size > 12 * 1000
    assert held.st_nlink == 0, "a process that is killed leaves nothing behind"
    del found
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_no_room_on_disk_changes_nothing(space, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kvgeom.geometry.activations.DISK_SHARE", 0.0)
    other = kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)
    assert os.fstat(other.activations._file.fileno()).st_size == 0
    a, b = (one.sensitivity(contrasts=(), progress=False).data for one in (space, other))
    np.testing.assert_array_equal(a.ratio, b.ratio)


def test_compare(space) -> None:  # type: ignore[no-untyped-def]
    found = compare(space, samples=10, progress=False)
    assert list(found.data.estimator.values) == from_features()
    for layer, site in ((1, "k"), (2, "resid")):
        index = space.positions.index("template-1")
        x = space.features(layer, site)[:, index]
        unit = found.vectors(site, "mean", "template-1")[layer]
        gap = difference_of_means(x, space.is_harmful)
        np.testing.assert_allclose(unit, gap / np.linalg.norm(gap), atol=1e-5)
    # Keys of layer 0 are the same at a template token whatever was asked.
    assert np.isnan(found.data.stability.sel(layer=0, site="k", position="template-1")).all()
    between = found.cosines_of_methods("resid", 2)
    np.testing.assert_allclose(np.diag(between), 1, atol=1e-5)
    layers = found.cosines_of_layers()
    np.testing.assert_allclose(layers, layers.T)
    sites = found.agreement_of_sites(2)
    assert np.nanmax(np.abs(sites)) <= 1 + 1e-9
    by_hand = [
        found.data.score.sel(estimator="mean", position="template-1", layer=2, site=s).values for s in ("k", "v")
    ]
    harmful = found.data.harmful.values
    by_hand = [np.concatenate([s[harmful] - s[harmful].mean(), s[~harmful] - s[~harmful].mean()]) for s in by_hand]
    assert float(sites.sel(site="k", other_site="v")) == pytest.approx(np.corrcoef(*by_hand)[0, 1], abs=1e-4)
    with pytest.raises(InputError, match="template-99"):
        compare(space, positions=["template-99"])


def test_scores_of_candidates(space) -> None:  # type: ignore[no-untyped-def]
    """Every candidate again, alone, with an intervention written from the paper's formulas."""
    model: Model = space.model
    tokens = {5, 9, 30}
    harmful, harmless = model.encode(["burn a car", "rob him"]), model.encode(["wash a car", "help him"])
    rng = np.random.default_rng(0)
    candidates = rng.standard_normal((3, 2, model.geometry.d_model))
    candidates[1, 1] = 0
    found = select(
        model,
        candidates,
        ["a", "b"],
        harmful,
        harmless,
        tokens,
        max_kl=10,
        min_induce=-99,
        last_layers=0.4,
        progress=False,
    )
    for layer, position in ((0, 0), (1, 0), (2, 1)):
        r = torch.tensor(candidates[layer, position], dtype=torch.float32)
        unit = r / r.norm()
        cell = found.data.isel(layer=layer, position=position)

        def without(at: int, point: str, x: torch.Tensor, u: torch.Tensor = unit) -> torch.Tensor:
            return x - (x @ u)[..., None] * u

        def plus(at: int, point: str, x: torch.Tensor, r: torch.Tensor = r, layer: int = layer) -> torch.Tensor:
            return x + r if (at, point) == (layer, "post") else x

        bypass = [float(margin(model.forward(p.ids, edit_resid=without)[-1], tokens)) for p in harmful]
        induce = [float(margin(model.forward(p.ids, edit_resid=plus)[-1], tokens)) for p in harmless]
        kl = []
        for p in harmless:
            clean, ablated = (model.forward(p.ids, edit_resid=e)[-1].log_softmax(-1) for e in (None, without))
            kl.append(float((clean.exp() * (clean - ablated)).sum()))
        assert float(cell.bypass) == pytest.approx(np.mean(bypass), abs=1e-4)
        assert float(cell.induce) == pytest.approx(np.mean(induce), abs=1e-4)
        assert float(cell.kl) == pytest.approx(np.mean(kl), abs=1e-4)
    assert "coincide" in str(found.data.filtered.values[1, 1])
    assert np.isnan(found.data.bypass.values[1, 1])
    assert "last 40 %" in str(found.data.filtered.values[2, 0])
    kept = np.where(found.data.filtered == "", found.data.bypass, np.inf)
    row, column = np.unravel_index(np.argmin(kept), kept.shape)
    assert found.chosen == (int(row), "ab"[int(column)])
    np.testing.assert_allclose(found.direction, candidates[row, column], rtol=1e-6)


def test_nothing_passes_the_filters(tmp_path) -> None:  # type: ignore[no-untyped-def]
    space, tokens = refusing()
    found = space.select(validation=2, tokens=tokens, min_induce=1e6, progress=False)
    assert found.chosen is None
    assert (found.data.filtered != "").all()
    with pytest.raises(InputError, match="filtered"):
        _ = found.direction
    assert Selection.load(found.save(tmp_path / "s.nc")).chosen is None
    with pytest.raises(InputError, match="validation"):
        space.select(validation=5, tokens={5}, progress=False)
    with pytest.raises(InputError, match="max_kl"):
        space.select(maxkl=1)
    with pytest.raises(InputError, match="refuses none"):
        space.select(validation=2, tokens=(), progress=False)


def test_candidates_come_from_refused_prompts_and_not_from_those_that_validate() -> None:
    """Of the harmful prompts those whose first token begins a refusal, of the harmless those whose does not."""
    space, tokens = refusing()
    found = space.select(validation=2, tokens=tokens, progress=False)
    x = space.features(2, "resid")[:, space.positions.index("template-1")]
    gap = x[[0, 1, 2, 3]].mean(0) - x[[7, 8, 10, 11]].mean(0)
    np.testing.assert_allclose(found.data.direction.sel(layer=2, position="template-1"), gap, atol=1e-5)
    assert (found.meta["train_harmful"], found.meta["train_harmless"]) == (4, 4)
    assert (found.meta["harmful"], found.meta["harmless"]) == (2, 2)


def test_what_a_candidate_must_induce() -> None:
    """Even odds, or as much as the model itself refuses harmful prompts."""
    space, tokens = refusing()
    prompts = [space.harmful[index] for index in (5, 6)]  # those that validate
    clean = np.mean([float(margin(space.model.forward(prompt.ids)[-1], tokens)) for prompt in prompts])
    found = space.select(validation=2, tokens=tokens, progress=False)
    assert found.meta["clean_margin_harmful"] == pytest.approx(clean, abs=1e-5)
    assert found.meta["min_induce"] == pytest.approx(min(0, clean), abs=1e-5)
    assert clean < 0
    weak = found.data.induce.values <= clean
    said = np.array(["induces no refusal" in str(reason) for reason in found.data.filtered.values.ravel()])
    assert (said == weak.ravel()).all()
    assert space.select(validation=2, tokens=tokens, min_induce=0.0, progress=False).meta["min_induce"] == 0


def test_ablation_leaves_nothing_of_the_direction() -> None:
    model = tiny_model()
    (prompt,) = model.encode(["ab"])
    unit = torch.nn.functional.normalize(torch.randn(model.geometry.d_model, generator=torch.manual_seed(0)), dim=0)
    rows = model.forward_variants(prompt.ids, 2, edit_resid=ablate(torch.stack([unit, 3 * unit])))
    torch.testing.assert_close(rows[0], rows[1])
    seen = []

    def look(layer: int, point: str, x: torch.Tensor) -> torch.Tensor:
        out = ablate(unit)(layer, point, x)  # type: ignore[arg-type]
        seen.append(float((out @ unit).abs().max()))
        return out

    model.forward(prompt.ids, edit_resid=look)
    assert len(seen) == 1 + 2 * model.geometry.layers
    assert max(seen) < 1e-5


def test_addition_reaches_its_layer_alone() -> None:
    r = torch.randn(4, 6, generator=torch.manual_seed(0))
    x = torch.zeros(4, 3, 6)
    edit = add(r, [0, 1, 1, 2])
    np.testing.assert_array_equal(edit(1, "post", x)[:, 0], r * torch.tensor([0, 1, 1, 0])[:, None])
    assert edit(1, "attn", x) is x
    assert edit(5, "post", x) is x


def test_steer(space, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = space.model
    direction = np.random.default_rng(0).standard_normal(model.geometry.d_model)
    found = steer(model, direction, 1, space.harmful, space.harmless[:4], max_new_tokens=4, progress=False)
    assert (found.data.label.sel(intervention="add").values[:6] == "").all()
    assert (found.data.label.sel(intervention="ablate").values[6:] == "").all()
    assert found.refusals("add", harmful=False)[1] == 4
    again = Steering.load(found.save(tmp_path / "s.nc"))
    assert again.table().equals(found.table())
    cache = model.new_cache()
    edit = ablate(torch.tensor(direction, dtype=torch.float32))
    first = model.forward(space.harmful[2].ids, cache, edit_resid=edit)[-1].argmax()
    tokens = model.generate([cache], [int(first)], 4, edit_resid=edit)[0]
    assert str(found.data.text.sel(intervention="ablate", prompt=2).values) == model.decode(tokens)
    with pytest.raises(InputError, match="direction"):
        steer(model, np.zeros(model.geometry.d_model), 1, space.harmful, space.harmless)


@pytest.mark.parametrize("site", ["k", "v"])
def test_steer_in_keys_and_values(space, site: Any) -> None:  # type: ignore[no-untyped-def]
    """Answers under the edit of a cache, token by token as alone."""
    model = space.model
    rng = np.random.default_rng(0)
    direction, level = 9 * rng.standard_normal(model.geometry.channels), rng.standard_normal(model.geometry.channels)
    found = steer(
        model, direction, 1, space.harmful, space.harmless[:3], site=site, level=level, max_new_tokens=5, progress=False
    )
    assert found.meta["site"] == site
    u = (direction / np.linalg.norm(direction))[:, None]
    for name, change, row, prompt in (
        ("ablate", Change.ablation(u, level), 1, space.harmful[1]),
        ("add", Change.addition(direction), len(space.harmful) + 2, space.harmless[2]),
    ):
        cache = model.new_cache(CacheDirections({(1, site): change}))
        first = int(model.forward(prompt.ids, cache)[-1].argmax())
        alone = model.generate([cache], [first], 5)[0]
        assert str(found.data.text.sel(intervention=name, prompt=row).values) == model.decode(alone)
    with pytest.raises(InputError, match="level"):
        steer(model, direction, 1, space.harmful, space.harmless, site=site, level=[1.0], progress=False)
    with pytest.raises(InputError, match="shape"):
        steer(model, direction, 1, space.harmful, space.harmless, progress=False)
    with pytest.raises(InputError, match="unknown site"):
        steer(model, direction, 1, space.harmful, space.harmless, site="kk", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layer": 99}, "layer must be a whole number, 0 to"),
        ({"layer": -1}, "got -1"),
        ({"layer": 0.5}, "whole number"),
        ({"scale": float("nan")}, "scale must be a finite"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"direction": np.inf}, "finite"),
        ({"harmless": {"harmful": ["burn a car"]}}, "no harmless requests"),
    ],
)
def test_steering_that_cannot_be_done(space, options: dict[str, Any], word: str) -> None:  # type: ignore[no-untyped-def]
    model = space.model
    asked = PromptSet("asked", ("burn a car",), ("wash a car",), "")
    arguments = {"layer": 1, "harmful": asked, "harmless": asked, "direction": 1.0, **options}
    direction = np.full(model.geometry.d_model, arguments.pop("direction"))
    with pytest.raises(InputError, match=word):
        steer(model, direction, **arguments, progress=False)


def test_steering_takes_the_harmless_requests_of_a_set(space) -> None:  # type: ignore[no-untyped-def]
    asked = PromptSet("asked", ("burn a car",), ("wash a car",), "")
    direction = np.ones(space.model.geometry.d_model)
    for harmless in (asked, {"harmless": ["wash a car"]}, ["wash a car"]):
        found = steer(space.model, direction, np.int64(1), asked, harmless, max_new_tokens=1, progress=False)  # type: ignore[arg-type]
        assert found.data.request.values.tolist() == ["burn a car", "wash a car"]
        assert found.data.harmful.values.tolist() == [True, False]


def test_contrasts_of_one_name_are_all_there(space) -> None:  # type: ignore[no-untyped-def]
    one, other = (PromptSet("own prompts", (f"{w} a", f"{w} b"), (f"{w} c", f"{w} d"), "") for w in ("see", "hear"))
    found = space.contrasted([one, other, one])
    assert list(found) == ["own prompts", "own prompts 2"]
    assert [each.prompts for each in found.values()] == [one, other]
