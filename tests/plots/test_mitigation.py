"""Figures of mitigations: the data that they draw and their axes."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from kvgeom.mitigation.layers import LayerSelection
from kvgeom.plots.mitigation import pareto_front
from kvgeom.plots.recovery import CUT, memory_bars
from kvgeom.plots.theme import ACCENT, CHOSEN, LABEL_COLORS
from kvgeom.stats import wilson
from tests.builders.mitigation import EXACT_BYTES, search, selection, verification


def named(figure: go.Figure, start: str) -> go.Figure:
    (found,) = (trace for trace in figure.data if trace.name and trace.name.startswith(start))
    return found


def test_every_candidate_is_a_point_and_the_front_is_the_pareto_set() -> None:
    drawn = search()
    figure = pareto_front(drawn, "group-64")
    rows = drawn.records()
    points = [trace for trace in figure.data if trace.mode == "markers" and trace.customdata is not None]
    shown = {(x, y) for trace in points for x, y in zip(trace.x, trace.y, strict=True)}
    assert shown == {(row["bytes_per_token"] / EXACT_BYTES, row["flips"]) for row in rows}
    said = " ".join(text for trace in points for (text,) in trace.customdata)
    assert all(f"<b>{row['candidate']}</b>" in said for row in rows if "<" not in row["candidate"])
    assert "&lt;b&gt; in 16 bits" in said
    front = named(figure, "front")
    assert list(zip(front.x, front.y, strict=True)) == sorted(
        {(row["bytes_per_token"] / EXACT_BYTES, row["flips"]) for row in rows if row["pareto"]}
    )
    assert list(front.y) == sorted(front.y, reverse=True)


def test_the_three_that_matter_have_rings_with_wilson_intervals() -> None:
    drawn = search()
    figure = pareto_front(drawn, "group-64")
    rows = {row["candidate"]: row for row in drawn.records()}
    for start, name in (
        ("unmitigated", "unmitigated"),
        ("chosen: center", drawn.chosen),
        ("paper: group-64", "group-64"),
    ):
        (ring,) = (t for t in figure.data if t.legend == "legend2" and t.name.startswith(start))
        low, high = wilson(rows[name]["flips"], 16)
        assert list(ring.y) == [rows[name]["flips"]]
        assert ring.y[0] + ring.error_y.array[0] == pytest.approx(16 * high)
        assert ring.y[0] - ring.error_y.arrayminus[0] == pytest.approx(16 * low)
    assert not [t for t in pareto_front(drawn).data if t.legend == "legend2" and t.name.startswith("paper")]


@pytest.mark.parametrize("budget", [0.0, 0.05])
def test_the_budget_is_a_line(budget: float) -> None:
    (line,) = search(budget=budget).plot().layout.shapes
    assert line.x0 == line.x1 == pytest.approx(3456 * (1 + budget) / EXACT_BYTES)


@pytest.mark.parametrize("kept", [(2, 4, 8), (1,)])
def test_layer_selection(kept: tuple[int, ...]) -> None:
    drawn = selection(kept=kept)
    figure = drawn.plot()
    for rule in ("causal", "first", "attention"):
        line, own = named(figure, rule), drawn.data.sel(rule=rule)
        np.testing.assert_array_equal(line.y, own.flips)
        np.testing.assert_allclose(np.array(line.y) + line.error_y.array, 16 * own.ci_high)
        np.testing.assert_allclose(np.array(line.y) - line.error_y.arrayminus, 16 * own.ci_low)
    places = [round(float(t.x[0]), 3) for t in figure.data if t.mode == "lines+markers"]
    assert len({*places}) == 3, "whiskers do not lie on each other"
    random = drawn.data.flips.sel(rule=["random 1", "random 2", "random 3"])
    band = named(figure, "3 random draws")
    assert (min(band.y), max(band.y)) == (random.min(), random.max())
    assert band.fill == "toself"
    assert sum(t.mode == "markers" for t in figure.data) == 3
    (unmitigated,) = figure.layout.shapes
    assert unmitigated.y0 == unmitigated.y1 == 13
    assert unmitigated.line.dash == "dot"
    assert list(figure.layout.xaxis.ticktext) == [f"{k} ({3456 + 368 * k:,})" for k in kept]


def test_which_rules_draw_is_not_read_from_their_names() -> None:
    drawn = selection()
    renamed = drawn.data.assign_coords(rule=["causal", "random order", "attention", "a", "b", "c"])
    figure = LayerSelection(renamed, drawn.meta | {"drawn": ["a", "b", "c"]}).plot()
    lines = [trace.name for trace in figure.data if trace.mode == "lines+markers"]
    assert lines == ["causal", "random order", "attention"]


def test_what_was_chosen_is_not_red() -> None:
    (ring,) = (trace for trace in search().plot().data if trace.legend == "legend2" and trace.name.startswith("chosen"))
    (bar,) = (trace for trace in verification().plot().data if trace.name == "chosen")
    assert ring.marker.color == bar.marker.color == memory_bars(verification()).data[0].marker.color[2] == CHOSEN
    assert CHOSEN not in (ACCENT, *LABEL_COLORS.values())


def test_recovery_bars() -> None:
    drawn = verification()
    figure = drawn.plot()
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    assert list(bars) == ["unmitigated", "chosen", "paper"]
    assert bars["unmitigated"].x[0] == 0
    assert bars["unmitigated"].error_x.array is None
    for role in ("chosen", "paper"):
        own = drawn.data.sel(recipe=role)
        assert bars[role].x[0] == pytest.approx(float(own.recovery))
        assert bars[role].x[0] + bars[role].error_x.array[0] == pytest.approx(float(own.recovery_high))
        assert bars[role].x[0] - bars[role].error_x.arrayminus[0] == pytest.approx(float(own.recovery_low))
        assert f"{float(own.p):.2g}" in bars[role].customdata[0]
    controls = [t for t in figure.data if t.type == "scatter" and len(t.x)]
    np.testing.assert_allclose(controls[0].x, 1 - np.array([1, 2, 2]) / 13)
    np.testing.assert_allclose(controls[1].x, 1 - np.array([2, 4, 3]) / 13)
    assert len({*zip(controls[0].x, controls[0].y, strict=True)}) == 3, "equal draws lie below each other"
    assert [t.showlegend for t in controls] == [True, False]


def test_a_recovery_far_below_nothing_is_cut_and_said() -> None:
    figure = verification((5, 16, 5)).plot()
    chosen = next(t for t in figure.data if t.name == "chosen")
    assert chosen.x[0] == CUT
    assert chosen.error_x.arrayminus[0] == 0
    assert "cut" in figure.layout.xaxis.title.text
    assert "-220 %" in figure.layout.yaxis.ticktext[1]


def test_nothing_lost_is_said() -> None:
    (note,) = verification((0, 0, 0)).plot().layout.annotations
    assert "none of 16" in note.text


def test_memory_bars() -> None:
    figure = memory_bars(verification())
    assert list(figure.data[0].x) == pytest.approx([EXACT_BYTES, 3456, 3456, 3840])
    assert figure.data[0].text[3] == "3,840 B, 31.2% (+11.1%)"


@pytest.mark.parametrize(
    "figure", [search().plot(), selection().plot(), verification().plot(), memory_bars(verification())]
)
def test_every_figure_serializes_and_follows_the_page(figure: go.Figure) -> None:
    assert json.loads(figure.to_json())["data"]
    assert figure.layout.width is None
    assert figure.layout.xaxis.title.text
