"""Choosing a refusal direction, and what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import figure
from kvgeom.plots.theme import (
    ACCENT,
    DIVERGING,
    INK,
    MUTED,
    PLAIN,
    UNDETERMINED,
    finish,
    layer_axis,
    panel_title,
    plain,
    say,
    wrapped,
)

if TYPE_CHECKING:
    from kvgeom.geometry.selection import Selection, Steering


@figure("selection", "selection_maps")
def selection_maps(selection: Selection) -> go.Figure:
    """Bypass, induce and KL of every candidate direction, layer x position.

    How to read it: each cell is the class difference of the residual stream after one layer at one template token.
    Top: the refusal margin of harmful prompts when it is ablated, white where it is as without ablation; the bluer,
    the more refusal is lost. Middle: the margin of harmless prompts when it is added, white at even odds of refusal;
    red is refusal induced. Bottom: how much ablation changes harmless prompts. Hatched cells are filtered out (hover says
    why); the star is the chosen one, the bluest unhatched cell of the top map.

    Returns
    -------
    plotly.graph_objects.Figure
        Three rows of heat maps; x: layer, y: position.
    """
    data, meta = selection.data, selection.meta
    layers, positions = data.layer.values.astype(int), [str(name) for name in data.position.values]
    base = float(meta["clean_margin_harmful"])
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    panels = (
        ("bypass", f"Bypass: margin of harmful prompts, ablated (without: {base:.1f} nats)", base, DIVERGING),
        (
            "induce",
            f"Induce: margin of harmless prompts, added (without: {meta['clean_margin_harmless']:.1f} nats)",
            0.0,
            DIVERGING,
        ),
        ("kl", f"KL on harmless prompts, ablated (limit {meta['max_kl']:g} nats)", None, "Greys"),
    )
    reasons = data.filtered.transpose("position", "layer").values.astype(str)
    hover = np.array(
        [
            [
                f"<b>after layer {layer}, {plain(position)}</b>"
                + "".join(
                    f"<br>{name} {float(data[name].sel(layer=layer, position=position)):.3g} nats"
                    for name in ("bypass", "induce", "kl")
                )
                + (f"<br>filtered: {wrapped(reasons[row, column], 60)}" if reasons[row, column] else "")
                for column, layer in enumerate(layers)
            ]
            for row, position in enumerate(positions)
        ],
        dtype=object,
    )
    for row, (name, title, centre, colors) in enumerate(panels, 1):
        panel_title(figure, title, row=row)
        values = data[name].transpose("position", "layer").values.astype(float)
        if centre is None:
            top = max(3 * float(meta["max_kl"]), 1e-9)
            scale = {"zmin": 0.0, "zmax": top}
        else:
            reach = max(float(np.nanmax(np.abs(values - centre), initial=0.0)), 1e-9)
            scale = {"zmin": centre - reach, "zmax": centre + reach}
        figure.add_heatmap(
            x=layers,
            y=np.arange(len(positions)),
            z=values,
            colorscale=colors,
            xgap=1,
            ygap=1,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorbar={
                "thickness": 10,
                "outlinewidth": 0,
                "len": 0.28,
                "y": (0.87, 0.5, 0.13)[row - 1],
                "title": {"text": "nats"},
                "nticks": 2 + len(positions),
            },
            **scale,
            row=row,
            col=1,
        )
        x, y = _hatching(layers, np.arange(len(positions)), reasons != "")
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": MUTED, "width": 1},
            hoverinfo="skip",
            showlegend=False,
            row=row,
            col=1,
        )
        if selection.chosen is not None:
            figure.add_scatter(
                x=[selection.chosen[0]],
                y=[positions.index(selection.chosen[1])],
                mode="markers",
                marker={"symbol": "star", "size": 13, "color": "#f2c14e", "line": {"color": INK, "width": 1}},
                hoverinfo="skip",
                name="chosen",
                showlegend=False,
                row=row,
                col=1,
            )
    figure.update_xaxes(**{**layer_axis(len(layers)), "title": None, "showline": False, "ticks": ""})
    figure.update_xaxes(title_text="after layer", row=3, col=1)
    # Numbers, not names, so that the hatching can be drawn within the cells; the names are the ticks.
    figure.update_yaxes(
        tickvals=np.arange(len(positions)), ticktext=positions, showgrid=False, showline=False, ticks=""
    )
    if selection.chosen is None:
        say(figure, "every candidate is filtered out", row=1)
    return finish(figure, 3 * (70 + 26 * max(2, len(positions))) + 60)


def _hatching(
    columns: np.ndarray, rows: np.ndarray, cells: np.ndarray
) -> tuple[list[float | None], list[float | None]]:
    """Three slanted lines across each marked cell, as one broken line."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, column in zip(*np.nonzero(cells), strict=True):
        for shift in (-0.5, 0.0, 0.5):
            start, stop = max(-0.5, -0.5 + shift), min(0.5, 0.5 + shift)
            x += [float(columns[column] + start), float(columns[column] + stop), None]
            y += [float(rows[row] + start - shift), float(rows[row] + stop - shift), None]
    return x, y


@figure("steering", "steering_rates")
def steering_rates(steering: Steering) -> go.Figure:
    """Refusal rates with the direction taken out and put in.

    How to read it: on the left harmful prompts, on the right harmless ones, each as the model is and under the
    intervention; bars are Wilson 95 % intervals. A refusal direction worth its name empties the left pair and fills
    the right one. Degenerate responses count as not refused, and the hover text tells how many there are.

    Returns
    -------
    plotly.graph_objects.Figure
        Four points with intervals; y: refusal rate.
    """
    table = steering.table()
    figure = make_subplots()
    panel_title(figure, "Refusal rate")
    rate = table["refusal rate"].to_numpy(dtype=float)
    figure.add_scatter(
        x=[f"{row.prompts}<br>{row.direction}" for row in table.itertuples()],
        y=rate,
        mode="markers",
        error_y={
            "type": "data",
            "symmetric": False,
            "array": table["high"].to_numpy(dtype=float) - rate,
            "arrayminus": rate - table["low"].to_numpy(dtype=float),
            "thickness": 1.5,
        },
        marker={"size": 11, "color": [PLAIN if way == "as it is" else ACCENT for way in table["direction"]]},
        customdata=table[["refused", "complied", "degenerate"]].to_numpy(),
        hovertemplate="%{y:.0%}<br>refused %{customdata[0]}, complied %{customdata[1]}, degenerate %{customdata[2]}<extra></extra>",
        showlegend=False,
    )
    figure.add_vline(x=1.5, line={"color": UNDETERMINED, "width": 1, "dash": "dot"})
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", title_text="refused")
    figure.update_xaxes(showgrid=False)
    return finish(figure, 340)
