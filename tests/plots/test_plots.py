"""Figures: the data that they draw and their axes, not their pixels."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from kvgeom.behaviour.curve import Curve
from kvgeom.behaviour.pcr import PCR, reduction
from kvgeom.behaviour.scan import Scan
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.plots.channels import channel_loading, outlier_share
from kvgeom.plots.pcr import CUT, pcr_interval
from kvgeom.plots.sensitivity import ratio_against_null
from kvgeom.plots.theme import LABEL_COLORS, log_axis, short, symmetric_range


def curve(refused: int = 10, bits: tuple[int, ...] = (16, 8, 4, 2)) -> Curve:
    n = len(bits)
    flips = np.linspace(0, refused, n).astype(int)
    rate = flips / refused if refused else np.full(n, np.nan)
    columns = {
        "refused": refused - flips,
        "complied": 20 - refused + flips // 2,
        "degenerate": flips - flips // 2,
        "flips": flips,
        "flips_complied": flips // 2,
        "flips_degenerate": flips - flips // 2,
        "flip_rate": rate,
        "ci_low": np.maximum(rate - 0.1, 0),
        "ci_high": np.minimum(rate + 0.1, 1),
        "perplexity_ratio": np.geomspace(1, 50, n),
    }
    data = xr.Dataset({k: ("bits", v) for k, v in columns.items()}, coords={"bits": list(bits)})
    return Curve(data, {"scheme": "asym-token<4", "prompts": 20, "baseline_refused": refused})


def scan(layers: int = 6, critical: int | None = 2, refused: int = 10) -> Scan:
    drop = np.linspace(-0.5, 1.0, layers) if refused else np.full(layers, np.nan)
    flips = np.full(layers, np.nan)
    if critical is not None:
        flips[critical] = 4
    columns = {
        "margin_drop": drop,
        "margin_low": drop - 0.2,
        "margin_high": drop + 0.3,
        "flips": flips,
        "flip_rate": flips / max(refused, 1),
        "ci_low": flips / max(refused, 1) - 0.1,
        "ci_high": flips / max(refused, 1) + 0.1,
    }
    data = xr.Dataset({k: ("layer", v) for k, v in columns.items()}, coords={"layer": np.arange(layers)})
    return Scan(data, {"scheme": "int3-sym-tensor", "prompts": refused, "critical_layer": critical, "reason": "r"})


def sensitivity(layers: int = 4, heads: int = 2, head_dim: int = 8, undefined: bool = True) -> Sensitivity:
    rng = np.random.default_rng(0)
    shape = (layers, 3)
    gap, alignment = rng.uniform(1, 1e4, shape), rng.uniform(0.5, 2, shape)
    status = np.full(shape, "ok", dtype=object)
    reason = np.full(shape, "", dtype=object)
    if undefined:
        status[0, 0], reason[0, 0] = "undefined", "means <coincide>"
    status[1, 1] = "weak"
    ratio = np.where(status == "undefined", np.nan, gap * alignment)
    variables: dict[str, object] = {
        name: (("layer", "site"), values)
        for name, values in {
            "ratio": ratio, "signal_gap": gap, "noise_alignment": alignment, "separation": np.full(shape, 0.9),
            "null_low": ratio / 3, "null_median": ratio / 2, "null_high": ratio * 2,
            "alignment_null_low": np.full(shape, 0.8), "alignment_null_high": np.full(shape, 1.2),
            "status": status, "reason": reason,
        }.items()
    }  # fmt: skip
    kv, resid = heads * head_dim, 32
    loading = rng.dirichlet(np.ones(kv), size=(layers, 2))
    magnitude = np.ones((layers, 2, kv))
    magnitude[:, :, 3] = 20
    for name, values in {"ratio": loading, "magnitude": magnitude, "noise": loading, "loading": loading}.items():
        variables[f"channel_{name}"] = (("layer", "kv", "channel"), values)
    for name in ("ratio", "magnitude", "noise", "loading"):
        variables[f"resid_channel_{name}"] = (("layer", "resid_channel"), rng.dirichlet(np.ones(resid), size=layers))
    coords = {"layer": np.arange(layers), "site": ["k", "v", "resid"], "kv": ["k", "v"]}
    return Sensitivity(xr.Dataset(variables, coords=coords), {"kv_heads": heads, "head_dim": head_dim, "scheme": "s"})


def traces(figure: go.Figure, name: str) -> list[go.Figure]:
    return [trace for trace in figure.data if trace.name == name]


def test_bit_curve() -> None:
    drawn = curve()
    figure = drawn.plot()
    for label, colour in LABEL_COLORS.items():
        bar = traces(figure, label)[0]
        assert list(bar.x) == ["16", "8", "4", "2"]
        np.testing.assert_allclose(np.array(bar.y) * 20, drawn.data[label])
        assert bar.marker.color == colour
    flips = traces(figure, "all flips, 95 % interval")[0]
    assert list(flips.x) == ["8", "4", "2"]
    rounded = drawn.data.isel(bits=slice(1, None))
    np.testing.assert_allclose(flips.y, rounded.flip_rate)
    np.testing.assert_allclose(np.array(flips.y) + flips.error_y.array, rounded.ci_high)
    np.testing.assert_allclose(np.array(flips.y) - flips.error_y.arrayminus, rounded.ci_low)
    np.testing.assert_allclose(traces(figure, "perplexity ratio")[0].y, drawn.data.perplexity_ratio)
    assert figure.layout.yaxis3.type == "log"
    assert "asym-token&lt;4" in figure.layout.xaxis3.title.text  # what was rounded stands in the picture, as text


def test_bit_curve_without_refusals_says_so() -> None:
    figure = curve(refused=0).plot()
    assert not traces(figure, "all flips, 95 % interval")
    assert any("refuses none" in note.text for note in figure.layout.annotations)


def test_layer_scan() -> None:
    drawn = scan()
    figure = drawn.plot()
    bars = traces(figure, "margin lost")[0]
    np.testing.assert_allclose(bars.y, drawn.data.margin_drop)
    np.testing.assert_allclose(bars.error_y.array, 0.3)
    np.testing.assert_allclose(bars.error_y.arrayminus, 0.2)
    assert [colour == bars.marker.color[2] for colour in bars.marker.color].count(True) == 1
    assert list(traces(figure, "flips, 95 % interval")[0].x) == [2]
    assert list(traces(figure, "no responses generated")[0].x) == [0, 1, 3, 4, 5]
    assert any("critical layer 2" in note.text for note in figure.layout.annotations)


@pytest.mark.parametrize(("critical", "refused", "says"), [(None, 10, "no critical layer"), (None, 0, "refuses none")])
def test_layer_scan_without_a_critical_layer(critical: int | None, refused: int, says: str) -> None:
    assert any(says in note.text for note in scan(critical=critical, refused=refused).plot().layout.annotations)


def test_ratio_map() -> None:
    drawn = sensitivity()
    figure = drawn.plot()
    heat = traces(figure, "ratio")[0]
    np.testing.assert_allclose(heat.z, np.log10(drawn.data.ratio.values.T), equal_nan=True)
    assert heat.zmin == -heat.zmax
    assert heat.zmax <= 3
    assert np.isfinite(np.array(traces(figure, "undefined")[0].z, dtype=float)).sum() == 1
    weak = traces(figure, "weak separation")[0]
    assert (round(weak.x[0]), round(weak.y[0] + 0.34)) == (1, 1)
    assert "means &lt;coincide&gt;" in heat.customdata[0][0]


def test_ratio_against_null() -> None:
    drawn = sensitivity()
    figure = ratio_against_null(drawn, "v")
    assert figure.layout.yaxis.type == "log"
    shown = traces(figure, "values")[0]
    ok = drawn.data.sel(site="v").status.values == "ok"
    np.testing.assert_allclose(shown.y, drawn.data.ratio.sel(site="v").values[ok])


@pytest.mark.parametrize("site", ["k", "v", "resid"])
def test_channel_loading(site: str) -> None:
    drawn = sensitivity()
    figure = channel_loading(drawn, 2, site)
    points = [trace for trace in figure.data if trace.type == "scatter"]
    channels = drawn.channels(site).sel(layer=2)
    np.testing.assert_allclose(np.concatenate([p.x for p in points]), channels.magnitude)
    np.testing.assert_allclose(np.concatenate([p.y for p in points]), channels.loading)
    assert len(points) == (1 if site == "resid" else 2)


def test_channel_loading_without_a_direction() -> None:
    figure = channel_loading(sensitivity(), 0, "k")
    assert any("no safety direction" in note.text for note in figure.layout.annotations)


def test_outlier_share() -> None:
    drawn = sensitivity()
    share = outlier_share(drawn, 1, "k")
    assert (share.outliers, share.channels) == (1, 16)
    assert share.energy == pytest.approx(400 / 415)
    assert share.loading == pytest.approx(float(drawn.channels("k").loading.sel(layer=1, channel=3)))
    assert "1 outlier channel of 16 holds 96 %" in str(share)
    assert np.isnan(outlier_share(drawn, 0, "k").loading)


def test_pcr_interval() -> None:
    rows = np.arange(100)
    sure, unsure, far = (reduction(rows < a, rows < b, layer=2, bits=3) for a, b in ((80, 4), (3, 2), (2, 5)))
    figure = pcr_interval(sure, unsure, far, names=("a", "b", "c"))
    assert traces(figure, "a")[0].x[0] == pytest.approx(0.95)
    assert traces(figure, "c")[0].x[0] == CUT
    assert "undetermined" in traces(figure, "b")[0].text[0]
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    np.testing.assert_allclose(lines[0].x, sure.ci)
    assert figure.layout.xaxis.range[1] >= 1


def test_pcr_without_a_value() -> None:
    figure = PCR(None, None, "undetermined", "no <flips>", None, 3, 0, 0, 9).plot()
    assert any("no &lt;flips&gt;" in note.text for note in figure.layout.annotations)


@pytest.mark.parametrize(
    "figure",
    [
        curve().plot(),
        scan().plot(),
        sensitivity().plot(),
        channel_loading(sensitivity(), 2),
        curve(bits=(16, 4)).plot(),
    ],
)
def test_every_figure_is_a_value_that_serializes(figure: go.Figure) -> None:
    assert isinstance(figure, go.Figure)
    assert json.loads(figure.to_json())["data"]
    assert all(
        axis.title.text for axis in figure.select_yaxes() if axis.showticklabels is not False and not axis.ticktext
    )


def test_helpers() -> None:
    assert symmetric_range([np.nan, -3.0, 2.0]) == (-3.0, 3.0)
    assert symmetric_range([]) == (-1.0, 1.0)
    assert [short(v) for v in (0.001, 0.234, 1.94, 25.8, 999.6, 12_600, 2.5e6, np.inf)] == [
        "1e-03", "0.23", "1.9", "26", "1k", "12.6k", "2.5M", "",
    ]  # fmt: skip


def test_ticks_of_logarithmic_axes() -> None:
    """Powers of ten over many decades; over few, what lies between them, or there would be a single number."""
    few = log_axis([0.08, 0.5], [np.nan, 0, -1])
    assert {0.1, 0.2, 0.5} <= set(few["tickvals"])
    assert {5.0, 10.0, 20.0, 50.0, 100.0} <= set(log_axis([2, 130])["tickvals"])
    assert log_axis([1e-3, 1e8])["dtick"] == 2
    assert log_axis([])["type"] == "log"
