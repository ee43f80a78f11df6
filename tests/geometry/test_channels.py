"""The channel view: overlap of energy and safety, KV heads, contrasts, and one prompt's stored vectors."""

from __future__ import annotations

import numpy as np
import pytest

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.channels import OUTLIER_FACTOR, channel_view, outlier_share, outliers, overlap, stored
from kvgeom.geometry.sensitivity import Moments, Sensitivity, head_bases, head_quantities, quantities
from kvgeom.prompts.sets import concept_contrasts
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme
from tests.builders.figures import sensitivity as drawn_sensitivity
from tests.builders.geometry import by_hand, synthetic
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_model

TENSOR = Scheme(3, True, "tensor")


def test_overlap_of_the_same_of_others_and_of_nothing() -> None:
    energy = np.where(np.arange(100) < 5, 50.0, 1.0)
    same, p_same = overlap(energy, energy)
    apart, p_apart = overlap(energy, np.where(np.arange(100) < 50, 0.0, 1.0))
    assert same == pytest.approx(100 * np.sum(energy**2) / energy.sum() ** 2)
    assert p_same < 0.01
    assert apart == pytest.approx(100 / energy.sum())
    assert p_apart < 0.1
    assert overlap(energy, np.ones(100)) == (pytest.approx(1), 1.0)


def test_permutation_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(0)
    p = np.array(
        [overlap(rng.exponential(size=40), rng.exponential(size=40), permutations=300, seed=n)[1] for n in range(300)]
    )
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 300)


def test_heads_are_ratios_of_their_own_channels() -> None:
    """The ratio within a head is what the ratio would be if the other heads did not exist."""
    s = synthetic(4, channels=12, k=2, tokens=300)
    heads = head_bases(s["basis"], 3)
    moments = Moments.zero(12, 0, 3)
    moments.add(s["x"], s["e"], s["basis"], None, heads)
    found = head_quantities(moments, s["gap"], heads)
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        alone = Moments.zero(4)
        alone.add(s["x"][:, at], s["e"][:, at], heads[head])
        expected = quantities(alone, s["gap"][at], heads[head])
        for name in found:
            assert found[name][head] == pytest.approx(expected[name])
        np.testing.assert_allclose(heads[head].T @ heads[head], np.eye(2), atol=1e-12)


def test_a_head_without_signal_has_no_ratio() -> None:
    s = synthetic(4, channels=12, tokens=100)
    s["gap"][:4] = 0
    s["basis"] = (s["gap"] / np.linalg.norm(s["gap"]))[:, None]
    heads = head_bases(s["basis"], 3)
    moments = Moments.zero(12, 0, 3)
    moments.add(s["x"], s["e"], s["basis"], None, heads)
    ratio = head_quantities(moments, s["gap"], heads)["ratio"]
    assert np.isnan(ratio[0])
    assert np.isfinite(ratio[1:]).all()


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox"])
def test_heads_on_a_model(kind: str) -> None:
    model = tiny_model(kind)
    space = kvgeom.subspace(model, PAIRS, progress=False)
    found = space.sensitivity(TENSOR, contrasts=(), progress=False)
    size = model.geometry.head_dim
    s = by_hand(model, 2, "k", space.directions[2, "k"].position, TENSOR)
    for head in range(model.geometry.kv_heads):
        at = slice(head * size, (head + 1) * size)
        gap, e, x = s["gap"][at], s["e"][:, at], s["x"][:, at]
        safety = np.mean((e @ gap) ** 2) / (gap @ gap) / (gap @ gap / 4)
        ratio = safety / (np.sum(e**2) / np.sum(x**2))
        assert float(found.data.head_ratio.sel(layer=2, kv="k", head=head)) == pytest.approx(ratio, rel=1e-2)


def test_contrasts_are_clean() -> None:
    sets = concept_contrasts()
    assert [len(one.harmful) for one in sets] == [32, 32, 32, 48]
    for one in sets:
        assert not set(one.harmful) & set(one.harmless)
        small = one.take(8)
        # Any first part mixes the other concept evenly, so that a contrast is about one thing.
        if "question" not in one.name:
            assert sum(text.endswith("?") for text in small.harmful) == 4
    harmful = set(kvgeom.calibration().harmful)
    assert not harmful & {text for one in sets for text in (*one.harmful, *one.harmless)}


def test_null_b_is_the_ratio_of_that_contrast() -> None:
    model = tiny_model()
    found = kvgeom.subspace(model, PAIRS, progress=False).sensitivity(TENSOR, progress=False)
    for contrast in concept_contrasts():
        alone = kvgeom.subspace(model, contrast.take(4), progress=False).sensitivity(
            TENSOR, contrasts=(), progress=False
        )
        np.testing.assert_allclose(found.data.contrast_ratio.sel(contrast=contrast.name), alone.data.ratio, rtol=1e-5)
    highest = found.data.contrast_ratio.max("contrast")
    decided = found.data.status == "ok"
    assert ((found.data.specific == "undetermined") == ~decided).all()
    assert ((found.data.specific == "yes") == (decided & (found.data.ratio > highest))).all()


def test_safety_held_against_itself_is_not_specific() -> None:
    space = kvgeom.subspace(tiny_model(), PAIRS, progress=False)
    found = space.sensitivity(TENSOR, contrasts=[PAIRS], progress=False).data
    assert (found.specific != "yes").all()


def test_view() -> None:
    space = kvgeom.subspace(tiny_model(), PAIRS, progress=False)
    sensitivity = space.sensitivity(TENSOR, contrasts=(), progress=False)
    for site in ("k", "v", "resid"):
        view = channel_view(sensitivity, site, permutations=200)
        np.testing.assert_allclose(view.noise_share.sum("channel"), 1)
        np.testing.assert_allclose(view.outlier_score.median("channel"), 1)
        assert ((view.overlap_p > 0) & (view.overlap_p <= 1)).sel(layer=[1, 2]).all()
        assert np.isfinite(view.overlap.sel(layer=[1, 2])).all()


def test_stored_vectors() -> None:
    model = tiny_model()
    space = kvgeom.subspace(model, PAIRS, progress=False)
    found = stored(space, 1, "k", TENSOR, row=5)
    cache = model.new_cache()
    model.forward(space.activations.prompts[5].ids, cache)
    x = cache.layers[1].keys
    for name, y in (("before", x), ("after", fake_quantize(x, TENSOR))):
        np.testing.assert_array_equal(found[name], y[0].permute(1, 0, 2).flatten(1).numpy())
    assert found.sizes["token"] == len(space.activations.prompts[5])
    with pytest.raises(InputError, match="layer 9"):
        stored(space, 9)


def test_outliers_are_many_times_the_median_of_their_layer() -> None:
    magnitude = np.array([[1.0, 1.0, 1.0, OUTLIER_FACTOR, 6.0], [2.0, 2.0, 2.0, 9.9, 10.1]])
    np.testing.assert_array_equal(outliers(magnitude), [[False] * 4 + [True]] * 2)


def test_outlier_share() -> None:
    drawn = drawn_sensitivity()
    found = Sensitivity(drawn.data, drawn.meta)
    share = outlier_share(found, 1, "k")
    assert (share.outliers, share.channels) == (1, 16)
    assert share.energy == pytest.approx(400 / 415)
    assert share.loading == pytest.approx(float(found.channels("k").loading.sel(layer=1, channel=3)))
    assert "96 %" in str(share)
    assert np.isnan(outlier_share(found, 0, "k").loading)
