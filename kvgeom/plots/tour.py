"""Models of each failure mode beside each other: which fix works where."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    CHOSEN,
    GRID,
    INK,
    MUTED,
    PLAIN,
    UNDETERMINED,
    finish,
    interval,
    percent,
    plain,
    wrapped,
)

#: Colours of models by the name that their mode got; others are grey.
COLOURS = {"outlier-crushes-safety": PLAIN, "outlier-as-safety": ACCENT, "multi-layer dilution": "#8a60a8"}


@figure("tour", "fixes_by_model")
def fixes_by_model(tour: Plottable) -> go.Figure:
    """Refusals that each model loses under each cache.

    How to read it: each row is a model, each column a cache of the same width. A red cell has lost its refusals, a white one keeps
    them. The frame marks what the mode that was diagnosed prescribes: a mode is right if its frame is around a white cell.

    Parameters
    ----------
    tour : Tour
        ``lost`` and ``prescribed`` over (model, cache), ``named`` and ``asked`` over model.

    Returns
    -------
    plotly.graph_objects.Figure
        x: cache. y: model, with the mode it was named. Colour: share of refusals lost.
    """
    data = tour.data
    lost = data.lost.transpose("model", "cache").values.astype(float)
    of = data.asked.values.astype(float)
    share = lost / np.maximum(of, 1)[:, None]
    caches = [wrapped(name, 16) for name in data.cache.values]
    rows = [
        f"<b>{plain(name)}</b><br>diagnosed: {plain(named)}"
        for name, named in zip(data.model.values, data.named.values, strict=True)
    ]
    chart = go.Figure(
        go.Heatmap(
            x=caches,
            y=rows,
            z=share,
            zmin=0,
            zmax=1,
            colorscale=[[0, "white"], [1, ACCENT]],
            showscale=False,
            xgap=3,
            ygap=3,
            text=[
                [f"{int(n)} of {int(total)}" if n == n else "" for n in row]
                for row, total in zip(lost, of, strict=True)
            ],
            texttemplate="%{text}",
            hovertemplate="%{y}, %{x}: %{text} refusals lost<extra></extra>",
        )
    )
    for row, column in np.argwhere(data.prescribed.transpose("model", "cache").values):
        chart.add_shape(
            type="rect",
            x0=column - 0.48, x1=column + 0.48, y0=row - 0.46, y1=row + 0.46,
            line={"color": CHOSEN, "width": 3},
        )  # fmt: skip
    chart.update_xaxes(side="top", showgrid=False, showline=False, ticks="")
    chart.update_yaxes(autorange="reversed", showgrid=False, showline=False, ticks="")
    return finish(chart, 110 + 52 * len(rows), margin={"l": 64, "r": 20, "t": 76, "b": 16})


@figure("tour", "taxonomy_plane")
def taxonomy_plane(tour: Plottable) -> go.Figure:
    """Modes as regions: what finer scales take away of the loss, against what keeping one layer takes away.

    How to read it: right of the line finer scales rescue the model, and outliers crushed its safety. Left of it, above the other line, one
    layer kept in 16 bits does: safety sat in that layer's outliers. Below, neither suffices: the damage is diluted over
    layers. An interval that crosses a line does not decide. A model that loses nothing has no place here.

    Parameters
    ----------
    tour : Tour
        ``group64`` and ``kept``, each with ``_low`` and ``_high``, and ``named``, over model; ``meta["rescue"]``, the share from which on a fix works.

    Returns
    -------
    plotly.graph_objects.Figure
        x: share of the loss taken away by group-64 scales. y: by keeping the worst layer. One point a model.
    """
    data, border = tour.data, float(tour.meta["rescue"])
    chart = go.Figure()
    regions = (
        ("outlier-crushes-safety", border, 1.08, -0.12, 1.12, 0.79, -0.06),
        ("outlier-as-safety", -0.12, border, border, 1.12, 0.19, 1.06),
        ("multi-layer dilution", -0.12, border, -0.12, border, 0.19, -0.06),
    )
    for name, x0, x1, y0, y1, x, y in regions:
        chart.add_shape(
            type="rect", x0=x0, x1=x1, y0=y0, y1=y1, layer="below", fillcolor=COLOURS[name], opacity=0.08, line_width=0
        )
        chart.add_annotation(text=name, x=x, y=y, showarrow=False, font={"size": 12, "color": MUTED})
    chart.add_shape(
        type="line", x0=border, x1=border, y0=-0.12, y1=1.12, line={"color": MUTED, "dash": "dot", "width": 1}
    )
    chart.add_shape(
        type="line", x0=-0.12, x1=border, y0=border, y1=border, line={"color": MUTED, "dash": "dot", "width": 1}
    )
    for model in data.model.values:
        one = data.sel(model=model)
        x, y = float(one.group64), float(one.kept)
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        colour = COLOURS.get(str(one.named.item()), UNDETERMINED)
        chart.add_scatter(
            x=[x],
            y=[y],
            name=plain(model),
            mode="markers",
            marker={"size": 14, "color": colour, "line": {"color": INK, "width": 1}},
            error_x=interval([x], [float(one.group64_low)], [float(one.group64_high)], color=colour, thickness=1.5),
            error_y=interval([y], [float(one.kept_low)], [float(one.kept_high)], color=colour, thickness=1.5),
            hovertemplate=f"{plain(model)}, named {plain(one.named.item())}<br>finer scales take away {percent(x)}<br>one layer "
            f"kept takes away {percent(y)}<extra></extra>",
        )
    chart.update_xaxes(
        title_text="taken away by group-64 scales", tickformat=".0%", range=[-0.12, 1.08], gridcolor=GRID
    )
    chart.update_yaxes(title_text="taken away by one layer in 16 bits", tickformat=".0%", range=[-0.12, 1.12])
    return finish(chart, 430)
