"""What all figures share."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from plotly.subplots import make_subplots

from kvgeom.plots.theme import (
    _even_ticks,
    channel_names,
    head_borders,
    interval,
    layer_axis,
    layer_ticks,
    log_axis,
    mark_undefined,
    percent,
    positive,
    say,
    short,
    symmetric_range,
)


def test_symmetric_range() -> None:
    assert symmetric_range([np.nan, -3.0, 2.0]) == (-3.0, 3.0)
    assert symmetric_range([]) == (-1.0, 1.0)
    assert symmetric_range([1.0, 4.0], centre=2.0, least=0) == (0.0, 4.0)
    assert symmetric_range(np.arange(101), share=0.5) == (-50, 50)


def test_short() -> None:
    assert [short(v) for v in (0.0, 0.001, 0.234, 1.94, 25.8, 999.6, 12_600, 2.5e6, np.inf)] == [
        "0", "1e-03", "0.23", "1.9", "26", "1k", "12.6k", "2.5M", "",
    ]  # fmt: skip
    assert percent(-0.001) == "0 %"


def test_ticks_of_logarithmic_axes() -> None:
    """Powers of ten over many decades; over few, what lies between them, or there would be a single number."""
    few = log_axis([0.08, 0.5], [np.nan, 0, -1])
    assert {0.1, 0.2, 0.5} <= set(few["tickvals"])
    assert {5.0, 10.0, 20.0, 50.0, 100.0} <= set(log_axis([2, 130])["tickvals"])
    assert log_axis([1e-3, 1e8])["dtick"] == 2
    assert log_axis([])["type"] == "log"


@given(st.floats(1e-6, 1e6), st.floats(1.001, 90))
def test_a_logarithmic_axis_has_two_ticks_at_least(low: float, ratio: float) -> None:
    ticks = log_axis([low, low * ratio])["tickvals"]
    assert sum(low * (1 - 1e-9) <= tick <= low * ratio * (1 + 1e-9) for tick in ticks) >= 2
    assert len(ticks) < 15


def test_a_range_a_digit_below_a_power_of_ten_has_ticks() -> None:
    below = np.nextafter(0.1, 0)
    assert math.floor(math.log10(below)) == -1, "though it is less"
    assert len(_even_ticks(1.0, 1.0 + 2 * below)) >= 2
    assert len(_even_ticks(0.0, 2 * below)) >= 2


def test_layers_are_counted_in_whole_numbers() -> None:
    assert [layer_ticks(layers)["dtick"] for layers in (1, 3, 16, 28, 80)] == [1, 1, 1, 2, 5]
    assert layer_axis(np.arange(28)) == layer_ticks(28, 32) | {"range": [-0.7, 27.7]}
    assert layer_axis(np.array([3, 7, 11]))["range"] == [-0.7, 11.7]  # layers between them store nothing


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(-1e3, 1e3))
def test_a_symmetric_range_holds_all_values(values: list[float], centre: float) -> None:
    low, high = symmetric_range(values, centre=centre)
    slack = 1e-9  # the last digit of the sums
    assert low <= min(values) + slack
    assert max(values) <= high + slack
    np.testing.assert_allclose((low + high) / 2, centre, atol=1e-6)


def test_interval() -> None:
    bars = interval([0.5, 0.2, np.nan], [0.4, 0.3, np.nan], [0.9, 0.25, np.nan], width=3)
    np.testing.assert_allclose(bars["array"], [0.4, 0.05, np.nan])
    np.testing.assert_allclose(bars["arrayminus"], [0.1, 0, np.nan])  # an end on the wrong side has no length
    assert bars["width"] == 3


def test_channels_are_named_by_head() -> None:
    assert channel_names(6, 3)[4] == "KV head 1, channel 4 (1 in its head)"
    assert channel_names(2, None) == ["channel 0", "channel 1"]


def test_heads_are_separated_in_their_own_panel() -> None:
    figure = make_subplots(rows=2, cols=1)
    head_borders(figure, 12, 4, row=2)
    assert [(line.x0, line.xref, line.yref) for line in figure.layout.shapes] == [
        (3.5, "x2", "y2 domain"),
        (7.5, "x2", "y2 domain"),
    ]
    head_borders(figure, 12, None)
    assert len(figure.layout.shapes) == 2


def test_an_empty_panel_has_a_trace() -> None:
    """Without one plotly draws no panel there, and writes its texts into another."""
    figure = make_subplots(rows=2, cols=1)
    figure.add_scatter(y=[1.0], row=1, col=1)
    say(figure, "nothing here", row=2)
    assert [trace.yaxis for trace in figure.data] == ["y", "y2"]
    assert not figure.data[1].showlegend


def test_undefined_layers_are_bands() -> None:
    figure = make_subplots(rows=2, cols=1)
    figure.add_scatter(y=[1.0], row=2, col=1)
    mark_undefined(figure, np.arange(6), [False, True, True, False, False, True], row=2)
    assert [(band.x0, band.x1, band.xref) for band in figure.layout.shapes] == [(-0.5, 0.5, "x2"), (2.5, 4.5, "x2")]
    assert len(figure.layout.annotations) == 2
    mark_undefined(figure, np.arange(2), [True, True])
    assert len(figure.layout.shapes) == 2


def test_what_a_logarithmic_axis_can_show() -> None:
    np.testing.assert_array_equal(positive([2, 0, -1, np.inf, np.nan]), [2, *[np.nan] * 4])
