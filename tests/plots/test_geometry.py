"""Figures of the geometry: what they draw is what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.attention import attention_error
from kvgeom.geometry.channels import stored
from kvgeom.geometry.prediction import Units, partial_rank_correlation
from kvgeom.geometry.steering import steer
from kvgeom.plots.causal import _label_places
from kvgeom.plots.channels import channel_loading
from kvgeom.plots.directions import cosine_map, projections_by_layer, stability_by_layer
from kvgeom.plots.magnitude import _ticks, magnitude_surface
from kvgeom.plots.prediction import correlation_forest
from kvgeom.plots.sensitivity import _decades, channel_ratio_map, channels_of, ratio_against_null
from kvgeom.plots.theme import short
from kvgeom.quant.scheme import Scheme
from tests.builders.figures import notes, of_type, patching, sensitivity, traces
from tests.builders.geometry import refusing
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_model

TENSOR = Scheme(3, True, "tensor")


@pytest.fixture(scope="module")
def space():  # type: ignore[no-untyped-def]
    return kvgeom.subspace(tiny_model(), MORE_PAIRS, progress=False)


def test_ratio_map() -> None:
    drawn = sensitivity()
    figure = drawn.plot()
    heat = traces(figure, "ratio")[0]
    shown = drawn.data.ratio.where(drawn.data.status != "weak", drawn.data.ratio_low)
    np.testing.assert_allclose(heat.z, np.log10(shown.values.T), equal_nan=True)
    assert [text[0] for text in heat.text[1]] == [*("≥" if s == "weak" else short(r)[0] for s, r in zip(drawn.data.status.values[:, 1], shown.values[:, 1], strict=True))]  # fmt: skip
    assert heat.zmin == -heat.zmax
    assert heat.zmax <= 3
    assert np.isfinite(np.array(traces(figure, "undefined")[0].z, dtype=float)).sum() == 1
    weak = traces(figure, "lower bound")[0]
    assert (weak.x[0], round(weak.y[0] + 0.34)) == (1, 1)
    assert "means &lt;coincide&gt;" in heat.customdata[0][0]


def test_ratio_against_null() -> None:
    drawn = sensitivity()
    figure = ratio_against_null(drawn, "v")
    assert figure.layout.yaxis.type == "log"
    shown = traces(figure, "values")[0]
    ok = drawn.data.sel(site="v").status.values == "ok"
    one = drawn.data.sel(site="v")
    np.testing.assert_allclose(shown.y, one.ratio.values[ok])
    np.testing.assert_allclose(np.array(shown.y) + shown.error_y.array, one.ratio_high.values[ok])
    np.testing.assert_allclose(np.array(shown.y) - shown.error_y.arrayminus, one.ratio_low.values[ok])
    bound = traces(figure, "values, at least")[0]
    np.testing.assert_allclose(bound.y, one.ratio_low.values[~ok])


def test_positions() -> None:
    """Every position in every site, the rule's with its interval, and lower bounds where there is no value."""
    drawn = sensitivity()
    figure = drawn.plot("positions")
    assert [trace.name for trace in figure.data if trace.showlegend] == ["template-2", "template-1", "instruction"]
    for row, site in enumerate(("k", "v", "resid")):
        line = traces(figure, "instruction")[row]
        np.testing.assert_allclose(
            np.array(line.y, dtype=float), drawn.data.at_ratio.sel(site=site, at="instruction"), equal_nan=True
        )
    bounds = [trace for trace in traces(figure, "instruction, at least") if len(trace.x)]
    assert [list(trace.x) for trace in bounds] == [[1]]
    assert len([trace for trace in figure.data if trace.fill == "tonexty"]) == 3


@pytest.mark.parametrize(
    ("reach", "exponents"), [(1, [-1, 0, 1]), (3, range(-3, 4)), (4.7, [-4, -2, 0, 2, 4]), (6, range(-6, 7, 2))]
)
def test_ticks_of_a_bar_of_ratios(reach: float, exponents: Sequence[int]) -> None:
    ticks = _decades(np.array([-reach, reach + 1e-9]), reach)
    assert list(ticks["tickvals"]) == list(exponents)
    assert ticks["ticktext"][-1].startswith("≥")


def test_labels_of_points_have_room() -> None:
    points = np.array([[1.0, 1.0], [0.99, 1.0], [-0.5, -0.5], [0.1, 0.1]])
    assert _label_places(points, most=3) == ["top center", "middle left", "top center", ""]
    crowd = _label_places(np.array([[1 + 0.01 * n, 1.0] for n in range(12)]), most=12)
    assert 2 <= sum(map(bool, crowd)) < 12
    assert _label_places(np.zeros((2, 2)), most=6).count("") <= 1


def test_margin_map() -> None:
    figure = patching([[-0.004, 0.0], [0.25, -0.1]]).plot()
    (cells,) = of_type(figure, "heatmap")
    assert [list(row) for row in cells.text] == [["0.00", "0.25"], ["0.00", "-0.10"]]
    assert [cells.zmin, 0, cells.zmax] == list(cells.colorbar.tickvals)
    assert "no refusal tokens" in notes(patching([[np.nan]]).plot())


@pytest.mark.parametrize("site", ["k", "v", "resid"])
def test_channel_loading(site: str) -> None:
    drawn = sensitivity()
    figure = channel_loading(drawn, 2, site)
    points = [trace for trace in figure.data if trace.type == "scatter"]
    channels = channels_of(drawn.data, site).sel(layer=2)
    np.testing.assert_allclose(np.concatenate([p.x for p in points]), channels.magnitude)
    np.testing.assert_allclose(np.concatenate([p.y for p in points]), channels.loading)
    assert len(points) == (1 if site == "resid" else 2)
    (border,) = (
        line for line in figure.layout.shapes if line.type == "line" and line.xref == "x2" and line.x0 == line.x1
    )
    assert border.x0 == 5 * np.median(channels.magnitude)


def test_channel_loading_without_a_direction() -> None:
    figure = channel_loading(sensitivity(), 0, "k")
    assert "no safety direction" in notes(figure)


def test_selection_maps() -> None:
    space, tokens = refusing()
    found = space.select(validation=2, tokens=tokens, max_kl=9, min_induce=-99, last_layers=0.4, progress=False)
    figure = found.plot()
    maps = of_type(figure, "heatmap")
    for trace, name in zip(maps, ("bypass", "induce", "kl"), strict=True):
        np.testing.assert_array_equal(trace.z, found.data[name].transpose("position", "layer").values)
    # Bypass is white where ablation changes nothing.
    assert (maps[0].zmin + maps[0].zmax) / 2 == pytest.approx(found.meta["clean_margin_harmful"])
    filtered = found.data.filtered.transpose("position", "layer").values != ""
    for crosses in traces(figure, "filtered out"):
        assert sorted(zip(crosses.y, crosses.x, strict=True)) == [tuple(cell) for cell in np.argwhere(filtered)]
    star = next(trace for trace in figure.data if trace.name == "chosen")
    positions = list(found.data.position.values)
    assert (star.x[0], positions[star.y[0]]) == found.chosen
    assert not filtered[star.y[0], star.x[0]]
    nothing = space.select(validation=2, tokens=tokens, min_induce=1e9, progress=False).plot()
    assert "every candidate" in notes(nothing)
    assert all(len(crosses.x) == 0 for crosses in traces(nothing, "filtered out"))


def test_candidates_without_a_direction_are_not_crossed() -> None:
    space, tokens = refusing()
    found = space.select(validation=2, tokens=tokens, max_kl=9, min_induce=-99, last_layers=0.4, progress=False)
    last = found.data.layer == 2
    found.data["bypass"] = found.data.bypass.where(~last)
    crosses = traces(found.plot(), "filtered out")
    assert [2 in trace.x for trace in crosses] == [False, True, True]


def test_steering_rates(space) -> None:  # type: ignore[no-untyped-def]
    direction = np.ones(space.model.geometry.d_model)
    found = steer(space.model, direction, 1, space.harmful, space.harmless, max_new_tokens=2, progress=False)
    (points,) = of_type(found.plot(), "scatter")
    table = found.table()
    np.testing.assert_array_equal(points.y, table["refusal rate"])
    np.testing.assert_allclose(points.y + points.error_y.array, table["high"])


def test_projections(space) -> None:  # type: ignore[no-untyped-def]
    found = space.compare(["mean", "pca"], samples=5, progress=False)
    figure = projections_by_layer(found, "resid")
    scores = found.data.score.sel(estimator="mean", position="template-1", site="resid")
    best = int(found.data.separation.sel(estimator="mean", position="template-1", site="resid").argmax("layer"))
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "1", "2"]
    for layer, step in enumerate(slider.steps):
        traces_of, layout = step.args
        harmful, harmless = traces_of["x"]
        np.testing.assert_allclose(traces_of["customdata"][0], scores.sel(layer=layer)[:6], rtol=1e-6)
        # The midpoint of the classes is 0, and harmful is on the right.
        assert np.mean(harmful) == pytest.approx(-np.mean(harmless), abs=1e-4)
        assert np.mean(harmful) > 0
        assert f"layer {layer}," in layout["annotations[0].text"]
    # What is drawn at first is a step of the slider, and nothing moves by itself.
    assert slider.active == best
    np.testing.assert_array_equal(figure.data[0].x, slider.steps[best].args[0]["x"][0])
    assert figure.layout.annotations[0].text == slider.steps[best].args[1]["annotations[0].text"]
    assert not figure.frames
    keys = projections_by_layer(found, "k")
    assert "undefined" in keys.layout.sliders[0].steps[0].args[1]["annotations[0].text"]
    stability = stability_by_layer(found)
    assert [trace.name for trace in stability.data] == ["mean", "pca"]
    assert np.isfinite(stability.data[0].y).all()
    assert not stability.layout.shapes
    (band,) = stability_by_layer(found, "k").layout.shapes
    assert (band.x0, band.x1) == (-0.5, 0.5)


def test_cosines(space) -> None:  # type: ignore[no-untyped-def]
    found = space.compare(["mean"], samples=0, progress=False)
    (layers,) = of_type(cosine_map(found.cosines_of_layers()), "heatmap")
    np.testing.assert_allclose(np.diag(layers.z), 1, atol=1e-5)
    assert (layers.zmin, layers.zmax) == (-1, 1)
    (keys,) = of_type(cosine_map(found.agreement_of_layers("k")), "heatmap")
    assert np.isnan(np.array(keys.z, dtype=float)[0]).all()
    (sites,) = of_type(cosine_map(found.agreement_of_sites(1)), "heatmap")
    assert list(sites.x) == ["keys", "values", "residual"]


def test_channel_ratio_map(space) -> None:  # type: ignore[no-untyped-def]
    found = space.sensitivity(TENSOR, contrasts=(), progress=False)
    for site, borders in (("k", 1), ("resid", 0)):
        figure = channel_ratio_map(found, site)
        (cells,) = of_type(figure, "heatmap")
        ratio = found.channels(site).ratio.values
        shown = np.array(cells.z, dtype=float)
        np.testing.assert_allclose(10 ** shown[np.isfinite(shown)], ratio[np.isfinite(ratio) & (ratio > 0)])
        assert len(figure.layout.shapes) == borders
        assert cells.zmin == -cells.zmax
        # The hover text names the head.
        assert ("KV head" in cells.hovertemplate) == (site != "resid")
        np.testing.assert_array_equal(np.unique(np.array(cells.customdata)[..., 0]), range(borders + 1))


def test_both_nulls_are_drawn(space) -> None:  # type: ignore[no-untyped-def]
    found = space.sensitivity(TENSOR, progress=False)
    figure = ratio_against_null(found, "k")
    bars = [trace for trace in figure.data if trace.name == "harmless contrasts"]
    assert len(bars) == 19
    drawn = np.array([bar.y for bar in bars], dtype=float)
    np.testing.assert_allclose(drawn, found.data.contrast_ratio.sel(site="k"))
    assert sum(bool(bar.showlegend) for bar in bars) == 1
    none = ratio_against_null(space.sensitivity(TENSOR, contrasts=(), progress=False), "k")
    assert not [trace for trace in none.data if trace.name == "harmless contrasts"]


def test_magnitudes(space) -> None:  # type: ignore[no-untyped-def]
    one = stored(space, 1, "v", TENSOR)
    figure = magnitude_surface(one)
    surfaces, maps = of_type(figure, "surface"), of_type(figure, "heatmap")
    assert len(surfaces) == len(maps) == 2
    for name, surface, cells in zip(("before", "after"), surfaces, maps, strict=True):
        np.testing.assert_allclose(10**surface.z - 1, np.abs(one[name]), atol=1e-6)
        np.testing.assert_array_equal(surface.z, cells.z)
        assert (surface.cmin, surface.cmax) == (cells.zmin, cells.zmax)
    assert len(of_type(magnitude_surface(one, heatmap=False), "heatmap")) == 0


@pytest.mark.parametrize(
    ("top", "ticks"), [(0.04, [0, 0.02]), (0.9, [0, 0.5]), (7, [0, 0.5, 1, 2, 5]), (300, [0, 1, 10, 100])]
)
def test_ticks_of_magnitudes(top: float, ticks: list[float]) -> None:
    assert _ticks(top) == ticks


def test_attention_errors(space) -> None:  # type: ignore[no-untyped-def]
    found = attention_error(space.model, space.harmful, TENSOR, progress=False)
    lines = of_type(found.plot(), "scatter")
    data = found.by_layer()
    np.testing.assert_allclose(lines[0].y, data.key_mse)
    np.testing.assert_allclose(lines[1].y, data.attended_score_error)
    np.testing.assert_allclose(lines[3].y, data.attended_value_error)


def test_correlations_of_predictors() -> None:
    rng = np.random.default_rng(0)
    size, more = rng.normal(size=(2, 40, 1))
    damage = size + more + 0.1 * rng.normal(size=(40, 6))
    found = {
        panel: {
            name: partial_rank_correlation(Units(x, damage, [size[:, 0]]), samples=50)
            for name, x in (("knows more", size + more), ("repeats <size>", size + 0.3 * rng.normal(size=(40, 1))))
        }
        for panel in ("layers", "channels")
    }
    figure = correlation_forest(found)
    assert found["layers"]["knows more"].beyond
    assert not found["layers"]["repeats <size>"].beyond
    plain, beyond, undecided = figure.data[:3]
    assert (list(beyond.y), list(undecided.y)) == (["knows more"], ["repeats &lt;size&gt;"])
    one = found["layers"]["knows more"]
    np.testing.assert_allclose(
        [beyond.x[0] - beyond.error_x.arrayminus[0], beyond.x[0] + beyond.error_x.array[0]], [one.low, one.high]
    )
    np.testing.assert_allclose(plain.x, [each.plain for each in found["layers"].values()])
    assert list(figure.layout.yaxis.categoryarray) == ["repeats &lt;size&gt;", "knows more"]  # from below
    assert len(figure.data) == 6
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    with pytest.raises(InputError, match="no correlation was given"):
        correlation_forest({})
