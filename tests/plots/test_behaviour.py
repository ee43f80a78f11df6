"""Figures of behaviour: curves, scans, ablations, PCR, labels and modes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from kvgeom.plots.pcr import CUT, pcr_interval
from kvgeom.plots.theme import ACCENT, LABEL_COLORS, UNDETERMINED
from tests.builders.figures import ablation, curve, mode, notes, outcomes, over_refusal, pcr, scan, traces


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
    ratio = traces(figure, "perplexity ratio")[0]
    np.testing.assert_allclose(ratio.y, drawn.data.perplexity_ratio)
    np.testing.assert_allclose(np.array(ratio.y) + ratio.error_y.array, drawn.data.perplexity_ratio_high)
    np.testing.assert_allclose(np.array(ratio.y) - ratio.error_y.arrayminus, drawn.data.perplexity_ratio_low)
    first, *_, last = ratio.customdata
    assert (first[0], last[0]) == ("", ", 95 % interval 40 to 70"), "what is compared with itself has no interval"
    assert tuple(last[1:]) == (drawn.data.text_kl.values[-1], drawn.data.text_top1.values[-1])
    assert figure.layout.yaxis3.range[1] > np.log10(70), "whiskers are inside"
    assert figure.layout.yaxis3.type == "log"
    assert "asym-token&lt;4" in figure.layout.xaxis3.title.text  # what was rounded stands in the picture, as text


def test_bit_curve_without_refusals_says_so() -> None:
    figure = curve(refused=0).plot()
    assert not traces(figure, "all flips, 95 % interval")
    assert "refuses none" in notes(figure)


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
    (border,) = (line for line in figure.layout.shapes if line.line.dash == "dot")
    assert border.y0 == border.y1 == 0.1
    assert "worst layer 2" in notes(figure)


@pytest.mark.parametrize(("worst", "refused", "says"), [(None, 10, "no single layer flips"), (None, 0, "refuses none")])
def test_layer_scan_without_a_worst_layer(worst: int | None, refused: int, says: str) -> None:
    figure = scan(worst=worst, refused=refused).plot()
    assert says in notes(figure)
    assert figure.layout.yaxis.showticklabels == (refused > 0)


def test_ablation() -> None:
    drawn = ablation()
    figure = drawn.plot()
    (bars,) = figure.data
    np.testing.assert_allclose(bars.x, drawn.data.flip_rate)
    np.testing.assert_allclose(np.array(bars.x) + bars.error_x.array, drawn.data.ci_high)
    np.testing.assert_allclose(np.array(bars.x) - bars.error_x.arrayminus, drawn.data.ci_low)
    assert list(bars.y[1]) == ["all", "keys", "values &lt;b&gt;"]
    assert bars.marker.color[:2] == (ACCENT, UNDETERMINED)
    (reference,) = figure.layout.shapes
    assert reference.x0 == 0.8


def test_ablation_without_refusals_says_so() -> None:
    drawn = ablation()
    nothing = drawn.data[["flips", "flip_rate", "ci_low", "ci_high", "p"]] * np.nan
    figure = replace(drawn, data=drawn.data.assign(nothing), meta=drawn.meta | {"prompts": 0}).plot()
    assert "refuses none" in notes(figure)
    assert list(figure.data[0].y[1]) == list(ablation().plot().data[0].y[1])  # the rows are still there


def test_pcr_interval() -> None:
    sure, unsure, far = pcr(0.95, 0.8, 0.99), pcr(0.33, -0.4, 0.9, "undetermined"), pcr(-1.5, -9, 0.3, "undetermined")
    figure = pcr_interval(sure, unsure, far, names=("a", "b", "c"))
    assert traces(figure, "a")[0].x[0] == 0.95
    assert traces(figure, "c")[0].x[0] == CUT
    assert "undetermined" in traces(figure, "b")[0].text[0]
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert list(lines[0].x) == [0.8, 0.99]
    assert lines[2].x[0] == CUT
    assert figure.layout.xaxis.range[1] >= 1


def test_pcr_classes_end_where_the_result_says() -> None:
    drawn = pcr(0.5, 0.4, 0.6)
    drawn.meta["thresholds"] = [0.2, 0.9]
    edges = [(band.x0, band.x1) for band in drawn.plot().layout.shapes]
    assert edges[1] == (0.2, 0.9)
    assert (edges[0][1], edges[2][0]) == (0.2, 0.9)


def test_pcr_without_a_value() -> None:
    nan = float("nan")
    assert "no &lt;flips&gt;" in notes(pcr(nan, nan, nan, "undetermined", "no <flips>").plot())


def test_labels_by_recipe() -> None:
    figure = outcomes().plot()
    counts = {label: list(traces(figure, label)[0].x) for label in LABEL_COLORS}
    assert counts == {"refused": [3, 1], "complied": [1, 2], "evaded": [0, 0], "degenerate": [0, 1]}


def test_over_refusal() -> None:
    figure = over_refusal().plot()
    (bars,) = figure.data
    assert list(bars.x) == ["16", "4"]
    np.testing.assert_allclose(np.array(bars.y) + bars.error_y.array, [0.2, 0.4])
    assert figure.layout.shapes[0].y0 == 0.1


def test_mode_card() -> None:
    drawn = mode()
    figure = drawn.plot()
    cells, dots, posterior, moved = figure.data
    labels = list(dict.fromkeys(cells.y))
    assert len(labels) == 3
    assert "0 of &lt;9&gt;" in labels[0]
    assert [(x, labels.index(y)) for x, y in zip(dots.x, dots.y, strict=True)] == [
        ("outlier-crushes-safety", 0),
        ("outlier-as-safety", 0),
        ("multi-layer dilution", 1),
    ]
    assert dots.marker.size[0] == dots.marker.size[1] > dots.marker.size[2]
    assert dots.marker.color[0] == ACCENT != dots.marker.color[1]
    assert dict(zip(posterior.y, posterior.x, strict=True)) == {
        "outlier-crushes-safety": 0.75,
        "outlier-as-safety": 0,
        "mixed": 0.25,
    }
    assert dict(zip(moved.y, moved.x, strict=True))["outlier-as-safety"] == 0.5


def test_each_mode_that_is_likely_enough_to_be_printed_has_its_name() -> None:
    drawn = mode()
    drawn.data.share[0] = [0.74, 0.004, 0.1, 0.06, 0.05, 0.05]
    drawn.data.share[1] = [1, 0, 0, 0, 0, 0]
    figure = drawn.plot()
    assert list(figure.data[2].y) == [name for name in drawn.data.mode.values if name != "outlier-as-safety"]
    assert figure.layout.yaxis2.dtick == 1


def test_a_mode_of_its_own_gets_a_column() -> None:
    drawn = mode()
    drawn.data.speaks_for[2, 3] = True
    assert "mixed" in drawn.plot().data[0].x
    assert "mixed" not in mode().plot().data[0].x


@pytest.mark.parametrize(
    "drawn", [curve(), curve(bits=(16, 4)), scan(), ablation(), pcr(0.5, 0.4, 0.6), outcomes(), mode()]
)
def test_every_figure_is_a_value_that_serializes(drawn) -> None:  # type: ignore[no-untyped-def]
    figure = drawn.plot()
    assert isinstance(figure, go.Figure)
    assert json.loads(figure.to_json())["data"]
    assert figure.layout.width is None
