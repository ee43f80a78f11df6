"""The channel view: overlap of energy and safety, KV heads, contrasts, and one prompt's stored vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.channels import OUTLIER_FACTOR, channel_view, outlier_share, outliers, overlap, stored
from kvgeom.geometry.ratio import Contrast, Moments, channel_quantities, head_quantities, quantities
from kvgeom.geometry.sensitivity import ENOUGH_CONTRASTS, Sensitivity
from kvgeom.geometry.signal import Design
from kvgeom.prompts.sets import concept_contrasts
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme
from tests.builders.figures import sensitivity as drawn_sensitivity
from tests.builders.geometry import by_hand, synthetic
from tests.builders.requests import MORE_PAIRS, PAIRS
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


def of_tokens(s: dict[str, np.ndarray]) -> Contrast:
    """Every token is a prompt of its own, the first half harmful."""
    design = Design.of(np.arange(len(s["x"])) < len(s["x"]) // 2)
    return Contrast(design, design.rows(s["x"]), design.dealt(99))


def test_heads_are_ratios_of_their_own_channels() -> None:
    """The ratio within a head is what the ratio would be if the other heads did not exist."""
    s = synthetic(4, channels=12, tokens=80)
    contrast = of_tokens(s)
    moments = Moments.zero(12, len(contrast.rows), 0, 3)
    moments.add(s["x"], s["e"], contrast.rows)
    found = head_quantities(moments, contrast)
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        alone = Moments.zero(4, len(contrast.rows))
        alone.add(s["x"][:, at], s["e"][:, at], contrast.rows[:, at])
        expected = quantities(alone, Contrast(contrast.design, contrast.rows[:, at], contrast.dealt))
        for name in found:
            assert found[name][head] == pytest.approx(expected[name])
    whole = Moments.zero(12, len(contrast.rows))
    whole.add(s["x"], s["e"], contrast.rows)
    np.testing.assert_allclose(moments.unit_e2, whole.unit_e2)


def test_a_head_without_signal_has_no_ratio() -> None:
    s = synthetic(4, channels=12, tokens=100)
    s["x"][:50, :4] = s["x"][50:, :4]  # of the first head twins have the same
    contrast = of_tokens(s)
    moments = Moments.zero(12, len(contrast.rows), 0, 3)
    moments.add(s["x"], s["e"], contrast.rows)
    ratio = head_quantities(moments, contrast)["ratio"]
    assert np.isnan(ratio[0])
    assert np.isfinite(ratio[1:]).all()


def test_channels_that_chance_alone_tells_apart_have_a_lower_bound_and_no_ratio() -> None:
    """In one of twenty channels without signal the interval misses 0; the bound holds in nearly all with a known one."""
    rng, design = np.random.default_rng(0), Design.of(np.repeat([True, False], 20))
    channels, mu = 4000, 0.5
    rows = rng.standard_normal((20, channels)) + mu * (np.arange(channels) < 2000)
    contrast = Contrast(design, rows, design.dealt(9))
    moments = Moments.zero(channels, 20)
    moments.add(np.ones((5, channels)), np.ones((5, channels)), rows)
    found = channel_quantities(moments, contrast, np.ones((channels, 1)) / np.sqrt(channels), True)
    truth = 1 / (mu**2 / 4)
    known = np.isfinite(found["ratio"])
    assert abs(known[2000:].mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)
    assert (found["ratio_low"][:2000] <= truth).mean() >= 0.96
    assert (found["ratio_low"][known] < found["ratio"][known]).all()
    assert np.isnan(channel_quantities(moments, contrast, np.ones((channels, 1)), False)["ratio"]).all()


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox"])
def test_heads_on_a_model(kind: str) -> None:
    """Their squared class differences and noise are parts of the layer's own."""
    model = tiny_model(kind)
    space = kvgeom.subspace(model, MORE_PAIRS, progress=False)
    found = space.sensitivity(TENSOR, contrasts=(), progress=False)
    size, full = model.geometry.head_dim, Design.of(space.is_harmful)
    for layer, site in ((1, "k"), (2, "v")):
        s = by_hand(model, layer, site, space.directions[layer, site].position, TENSOR, MORE_PAIRS)
        for head in range(model.geometry.kv_heads):
            at = slice(head * size, (head + 1) * size)
            g, e, x = s["pairs"][:, at], s["e"][:, at], s["x"][:, at]
            alone = Moments.zero(size, len(g))
            alone.add(x, e, g)
            one = quantities(alone, Contrast(full, g, full.dealt()))
            cell = found.data.sel(layer=layer, kv=site, head=head)
            assert float(cell.head_ratio_low) == pytest.approx(one["ratio_low"], rel=2e-2)
            assert float(cell.head_ratio) == pytest.approx(one["ratio"], rel=2e-2, nan_ok=True)


def test_contrasts_are_clean() -> None:
    """Minimal pairs: the same number of twins, the same other side, about the same length, and no two requests alike."""
    sets, own = concept_contrasts(), kvgeom.calibration()
    assert len(sets) >= ENOUGH_CONTRASTS == 19
    everything = [text for one in sets for text in one.harmful]
    assert len({*everything, *own.harmless}) == len(everything) + len(own.harmless)
    assert not set(own.harmful) & set(everything)
    for one in sets:
        assert one.harmless == own.harmless
        assert len(one.harmful) == len(own.harmful)
        longer = [len(a.split()) - len(b.split()) for a, b in zip(one.harmful, one.harmless, strict=True)]
        assert -2 <= min(longer) <= max(longer) <= 5
        assert -0.5 <= np.mean(longer) <= 3
    assert sum(abs(np.mean([len(a.split()) for a in one.harmful]) - np.mean([len(b.split()) for b in one.harmless])) < 0.2 for one in sets) >= 11  # fmt: skip


def test_null_b_is_the_ratio_of_that_contrast() -> None:
    """Of each as if it were the safety subspace; and safety is ranked as measured from as many pairs."""
    model = tiny_model()
    space = kvgeom.subspace(model, MORE_PAIRS, progress=False)
    found = space.sensitivity(TENSOR, contrast_pairs=5, progress=False)
    assert found.meta["contrasts"] == [one.name for one in concept_contrasts()]
    for contrast in concept_contrasts()[:3]:
        alone = kvgeom.subspace(model, contrast.take(5), progress=False).sensitivity(
            TENSOR, contrasts=(), progress=False
        )
        np.testing.assert_allclose(found.data.contrast_ratio.sel(contrast=contrast.name), alone.data.ratio, rtol=1e-3)
    own = kvgeom.subspace(model, MORE_PAIRS.take(5), progress=False).sensitivity(TENSOR, contrasts=(), progress=False)
    known = np.isfinite(own.data.ratio.values)
    np.testing.assert_allclose(found.data.ratio_matched.values[known], own.data.ratio.values[known], rtol=1e-3)
    decided = (found.data.status == "ok") & np.isfinite(found.data.ratio_matched)
    assert ((found.data.specific == "undetermined") == ~decided).all()
    assert ((found.data.specific == "yes") == (found.data.specific_p <= 0.05)).all()
    assert (found.data.contrasts == 19).all()
    yes, count = int((found.data.specific == "yes").sum()), int((found.data.specific != "undetermined").sum())
    assert f"above all 19 harmless contrasts in {yes} of {count} layers" in found.conclusion
    assert f"up to {0.05 * count:.1f} of them" in repr(found)


def test_few_contrasts_decide_nothing() -> None:
    space = kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)
    result = space.sensitivity(TENSOR, contrasts=concept_contrasts()[:5], progress=False)
    assert "takes 19 contrasts, got 5" in result.conclusion
    found = result.data
    assert (found.specific == "undetermined").all()
    assert (found.specific_p.values[found.status.values == "ok"] >= 1 / 6).all()


def test_safety_held_against_itself_is_not_specific() -> None:
    space = kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)
    found = space.sensitivity(TENSOR, contrasts=[MORE_PAIRS], progress=False).data
    ok = found.status.values == "ok"
    assert (found.specific != "yes").all()
    np.testing.assert_array_equal(found.specific_p.values[ok], 1)


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
    # What prompts begin with is read once for all of them: the last digit may be another.
    np.testing.assert_allclose(found.before, x[0].permute(1, 0, 2).flatten(1).numpy(), atol=1e-5)
    as_stored = torch.from_numpy(found.before.values).unflatten(1, (x.shape[1], -1)).permute(1, 0, 2)[None]
    after = fake_quantize(as_stored, TENSOR)[0].permute(1, 0, 2).flatten(1)
    np.testing.assert_array_equal(found.after, after.numpy())
    assert found.sizes["token"] == len(space.activations.prompts[5])
    with pytest.raises(InputError, match="layer 9"):
        stored(space, 9)


def test_outliers_are_many_times_the_median_of_their_layer() -> None:
    magnitude = np.array([[1.0, 1.0, 1.0, OUTLIER_FACTOR, 6.0], [2.0, 2.0, 2.0, 9.9, 10.1], [1.0, 1.0, 1.0, 19.9, 100]])
    np.testing.assert_array_equal(outliers(magnitude), [[False] * 4 + [True]] * 3)
    np.testing.assert_array_equal(outliers(np.array([1.0, 1.0, 1.0, 21.0, 100.0])), [False] * 3 + [True] * 2)


def test_outlier_share() -> None:
    drawn = drawn_sensitivity()
    found = Sensitivity(drawn.data, drawn.meta)
    share = outlier_share(found, 1, "k")
    assert (share.outliers, share.channels) == (1, 16)
    assert share.energy == pytest.approx(400 / 415)
    assert share.loading == pytest.approx(float(found.channels("k").loading.sel(layer=1, channel=3)))
    assert "96 %" in str(share)
    assert np.isnan(outlier_share(found, 0, "k").loading)
