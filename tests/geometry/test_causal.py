"""Causal measures against runs made one by one, and first order where it must be exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

from kvgeom.errors import InputError
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.causal import FirstOrder, Patching, first_order, patch_layers
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import rank_correlation
from tests.builders.tiny import KINDS, tiny_model

#: Weights are scaled after the models were loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*was changed since it was loaded")

REQUESTS = ["burn it all down", "how to steal the car", "mend the lock"]
R = (7, 40, 41)


@pytest.mark.parametrize("placement", [Placement.cache(), Placement.paper()])
@pytest.mark.parametrize("kind", KINDS)
def test_patching_is_a_plain_run_per_layer_and_scheme(kind: str, placement: Placement) -> None:
    model = tiny_model(kind)
    prompts = model.encode(REQUESTS)
    schemes = [Scheme(4, True, "tensor"), Scheme(3, True, "channel")]
    direction = np.random.default_rng(0).standard_normal(32)
    found = patch_layers(model, prompts, schemes, R, placement=placement, direction=direction, progress=False)
    for row, prompt in enumerate(prompts):
        before: dict[int, torch.Tensor] = {}
        clean = model.forward(prompt.ids, on_resid=before.__setitem__)[-1]
        assert float(found.data.clean_margin[row]) == pytest.approx(float(margin(clean, R)), abs=1e-4)
        for layer in range(3):
            for scheme in schemes:
                after: dict[int, torch.Tensor] = {}
                quantizer = Quantizer(Recipe.uniform(3, scheme, layers=[layer]), placement)
                logits = model.forward(prompt.ids, model.new_cache(quantizer), on_resid=after.__setitem__)[-1]
                cell = found.data.sel(prompt=row, layer=layer, scheme=str(scheme))
                assert float(cell.margin) == pytest.approx(float(margin(logits, R)), abs=2e-3)
                p, q = clean.double().softmax(-1), logits.double().softmax(-1)
                assert float(cell.kl) == pytest.approx(float((p * (p / q).log()).sum()), abs=2e-3)
                assert int(cell.token) == int(logits.argmax())
                change = (after[2] - before[2])[0, -1].double().numpy()
                along = 32 * (change @ direction) ** 2 / (direction @ direction) / (change @ change)
                assert float(cell.resid_alignment) == pytest.approx(along, rel=2e-2, abs=1e-3)
    np.testing.assert_allclose(found.margin_drop.sel(prompt=0), found.data.clean_margin[0] - found.data.margin[0])


@pytest.mark.parametrize("placement", [Placement.cache(), Placement.paper()])
@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_exact_for_small_errors(kind: str, placement: Placement) -> None:
    """At 8 bits the rounding error is small, and the margin nearly linear in it."""
    model = tiny_model(kind)
    with torch.no_grad():  # weights of ordinary size: a smooth model
        for parameter in model.hf_model.parameters():
            parameter.mul_(0.2) if parameter.ndim > 1 else None
    prompts = model.encode(REQUESTS)
    scheme = Scheme(8, True, "token")
    estimate = first_order(model, prompts, scheme, R, placement=placement, progress=False)
    exact = patch_layers(model, prompts, [scheme], R, placement=placement, progress=False)
    ours, theirs = estimate.by_layer.values, exact.margin_drop.sel(scheme=str(scheme)).values
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, atol=0.1 * np.abs(theirs).max())
    np.testing.assert_allclose(estimate.data.clean_margin, exact.data.clean_margin, atol=1e-4)
    np.testing.assert_allclose(
        estimate.data.channel_drop.sum("channel"), estimate.data.margin_drop.mean("prompt"), atol=1e-9
    )


def test_results_come_back(tmp_path: object) -> None:
    model = tiny_model()
    prompts = model.encode(REQUESTS)
    exact = patch_layers(model, prompts, {"coarse": Scheme(3)}, R, layers=[2, 0], progress=False)
    estimate = first_order(model, prompts, Scheme(3), R, progress=False)
    assert exact.data.sizes == {"prompt": 3, "layer": 2, "scheme": 1}
    xr.testing.assert_identical(Patching.load(exact.save(f"{tmp_path}/a.nc")).data, exact.data)
    xr.testing.assert_identical(FirstOrder.load(estimate.save(f"{tmp_path}/b.nc")).data, estimate.data)
    assert "3 prompts" in repr(exact)
    assert "int3-asym-token" in repr(estimate)


def test_without_refusals_there_is_no_margin() -> None:
    model = tiny_model()
    prompts = model.encode(REQUESTS)
    found = patch_layers(model, prompts, [Scheme(3)], (), progress=False)
    assert np.isnan(found.data.margin).all()
    assert np.isfinite(found.data.kl).all()
    with pytest.raises(InputError, match="refusal tokens"):
        first_order(model, prompts, Scheme(3), (), progress=False)
    with pytest.raises(InputError, match="no scheme"):
        patch_layers(model, prompts, [], R)
    with pytest.raises(InputError, match=r"layers must be .*got 9"):
        patch_layers(model, prompts, [Scheme(3)], R, layers=[9])
    with pytest.raises(InputError, match="direction"):
        patch_layers(model, prompts, [Scheme(3)], R, direction=np.ones(5))


def over_layers(values: np.ndarray) -> xr.DataArray:
    dims = ("prompt", "layer")[-values.ndim :]
    return xr.DataArray(values, dims=dims, coords={"layer": np.arange(values.shape[-1])})


def test_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(20)
    clear, noisy = (over_layers(signal + s * rng.standard_normal((30, 20))) for s in (0.01, 3.0))
    same = rank_correlation(clear, over_layers(np.exp(signal)))
    assert same.value == pytest.approx(1, abs=0.01)
    assert same.low > 0.98
    less = rank_correlation(clear, noisy)
    assert less.low < less.value <= same.value
    assert less.high - less.low > same.high - same.low
    assert "[" in str(less)
    assert "undetermined" in str(rank_correlation(clear, over_layers(np.ones(20))))
    one_flip = xr.zeros_like(clear)
    one_flip[0, 3] = 1  # in one half of the prompts there is nothing
    found = rank_correlation(clear, one_flip)
    assert np.isfinite(found.seen)
    assert np.isnan([found.value, found.low, found.high]).all()
    assert "undetermined" in str(found)
    with pytest.raises(InputError, match="cannot be compared"):
        rank_correlation(clear, noisy.isel(layer=slice(5)))
    with pytest.raises(InputError, match="no prompts"):
        rank_correlation(over_layers(signal), over_layers(signal))


@pytest.mark.parametrize(("prompts", "noise"), [(16, 1.0), (64, 3.0)])
def test_intervals_of_a_rank_correlation_cover_that_of_all_prompts(prompts: int, noise: float) -> None:
    """Plain correlations of means of few prompts are too small: their intervals covered the truth in 0 to 87 %."""
    rng, covered, middle, seen = np.random.default_rng(3), 0, [], []
    for study in range(40):
        one, two = rng.normal(size=(2, 24))
        two = 0.8 * one + 0.6 * two
        truth = spearmanr(one, two).statistic
        measured = [over_layers(x + noise * rng.normal(size=(prompts, 24))) for x in (one, two)]
        found = rank_correlation(*measured, samples=200, seed=study)
        covered += found.low <= truth <= found.high
        middle.append(found.value - truth)
        seen.append(found.seen - truth)
        assert found.seen == pytest.approx(spearmanr(*(x.mean("prompt") for x in measured)).statistic)
    assert covered >= 37
    assert abs(np.mean(middle)) < 0.04 < -np.mean(seen)


def test_measures_that_do_not_agree_with_themselves_say_nothing() -> None:
    rng = np.random.default_rng(0)
    found = rank_correlation(*(over_layers(rng.normal(size=(16, 24))) for _ in range(2)))
    assert np.isnan(found.value)
    assert max(found.reliability) < 0.4


def test_figures() -> None:
    model = tiny_model()
    prompts = model.encode(REQUESTS)
    scheme = Scheme(3)
    exact = patch_layers(model, prompts, [scheme, Scheme(4)], R, progress=False)
    estimate = first_order(model, prompts, scheme, R, progress=False)
    cells = exact.plot().data[0]
    np.testing.assert_allclose(cells.z, exact.margin_drop.mean("prompt").transpose("scheme", "layer"))
    assert list(cells.y) == ["int3-asym-token", "int4-asym-token"]
    assert cells.zmin == -cells.zmax
    scatter = estimate.plot("first_order_against_exact", exact=exact)
    np.testing.assert_allclose(scatter.data[1].x, estimate.by_layer.mean("prompt"))
    np.testing.assert_allclose(scatter.data[1].y, exact.margin_drop.sel(scheme=str(scheme)).mean("prompt"))
    assert str(rank_correlation(estimate.by_layer, exact.margin_drop.sel(scheme=str(scheme), drop=True))) in str(
        scatter.layout.annotations[0].text
    )
    keys, values = estimate.plot().data
    np.testing.assert_allclose(keys.z, estimate.data.channel_drop.sel(site="k"))
    np.testing.assert_allclose(values.z, estimate.data.channel_drop.sel(site="v"))
    with pytest.raises(InputError, match="int8-asym-token"):
        first_order(model, prompts, Scheme(8), R, progress=False).plot("first_order_against_exact", exact=exact)
