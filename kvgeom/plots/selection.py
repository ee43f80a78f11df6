"""Candidates for a refusal direction, and what the chosen one does."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    DIVERGING,
    INK,
    LABEL_COLORS,
    MUTED,
    PLAIN,
    UNDETERMINED,
    colour_bar,
    finish,
    interval,
    layer_ticks,
    panel_title,
    plain,
    symmetric_range,
    wrapped,
)
from kvgeom.stats import wilson


@figure("selection", "selection_maps")
def selection_maps(selection: Plottable) -> go.Figure:
    """Bypass, induce and KL of every candidate direction, layer by position.

    How to read it: each cell is a candidate, the class difference of the residual stream after one layer at one template
    token. Top: the refusal margin of harmful prompts with the candidate ablated; white is the margin without ablation, and
    the bluer, the more refusal is lost. Middle: the margin of harmless prompts with the candidate added; white is even odds
    of refusal, red is refusal induced. Bottom: how much ablation changes harmless prompts. Crossed cells are filtered out, and
    their hover text says why; grey ones have no direction. The star is the chosen candidate, the bluest cell of the top map
    that is not crossed. If no candidate is left, no cell is crossed.

    Parameters
    ----------
    selection : Selection
        ``bypass``, ``induce``, ``kl`` and ``filtered``; in ``meta`` also ``chosen``, ``max_kl`` and the clean margins.

    Returns
    -------
    plotly.graph_objects.Figure
        Three rows of heat maps; x: layer, y: position.
    """
    data, meta = selection.data, selection.meta
    layers, positions = data.layer.values.astype(int), [str(name) for name in data.position.values]
    base, chosen = float(meta["clean_margin_harmful"]), meta["chosen"]
    panel, gap = 26 * max(2, len(positions)), 60
    plotted = 3 * panel + 2 * gap
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=gap / plotted)
    panels = (
        ("bypass", f"Bypass: margin of harmful prompts, ablated (without: {base:z.1f} nats)", base, DIVERGING),
        (
            "induce",
            f"Induce: margin of harmless prompts, added (without: {meta['clean_margin_harmless']:z.1f} nats)",
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
            limit = float(meta["max_kl"])
            ends = (0.0, max(3 * limit, 1e-9))
            ticks = {"tickvals": [0, limit, ends[1]], "ticktext": ["0", f"{limit:g}", f"≥ {ends[1]:g}"]}
        else:
            ends = symmetric_range(values, 1e-9, centre=centre)
            shown = (ends[0], centre, ends[1])
            ticks = {"tickvals": shown, "ticktext": [f"{value:z.1f}" for value in shown]}
        middle = (row - 1) * (panel + gap) + panel / 2  # in pixels, from the top
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
            colorbar=colour_bar("nats", len=panel / plotted, y=1 - middle / plotted, ypad=0, **ticks),
            zmin=ends[0],
            zmax=ends[1],
            row=row,
            col=1,
        )
        out = np.argwhere((reasons != "") & np.isfinite(values)) if chosen is not None else np.empty((0, 2), dtype=int)
        figure.add_scatter(
            x=layers[out[:, 1]],
            y=out[:, 0],
            mode="markers",
            marker={"symbol": "x", "size": 7, "color": "white", "line": {"color": MUTED, "width": 1}},
            hoverinfo="skip",
            name="filtered out",
            showlegend=row == 1 and len(out) > 0,
            row=row,
            col=1,
        )
        if chosen is not None:
            figure.add_scatter(
                x=[chosen[0]],
                y=[positions.index(chosen[1])],
                mode="markers",
                marker={"symbol": "star", "size": 13, "color": "#f2c14e", "line": {"color": INK, "width": 1}},
                hoverinfo="skip",
                name="chosen",
                showlegend=False,
                row=row,
                col=1,
            )
    figure.update_xaxes(
        **layer_ticks(int(layers.max()) + 1, 32) | {"title": None},
        range=[-0.5, layers.max() + 0.5],
        showline=False,
        ticks="",
    )
    figure.update_xaxes(title_text="after layer", row=3, col=1)
    figure.update_yaxes(
        tickvals=np.arange(len(positions)),
        ticktext=[plain(name) for name in positions],
        range=[-0.5, len(positions) - 0.5],
        showgrid=False,
        showline=False,
        ticks="",
    )
    if chosen is None:
        # Above the maps, which still show how far the candidates are from passing.
        figure.add_annotation(
            text="every candidate is filtered out", xref="paper", yref="paper", x=0, y=1, yshift=28,
            xanchor="left", yanchor="bottom", showarrow=False, font={"size": 13, "color": MUTED},
        )  # fmt: skip
    return finish(figure, plotted + 112, plot_bgcolor=UNDETERMINED)


#: Kinds of prompts and interventions, from left to right.
_RUNS = ((True, "none", "as it is"), (True, "ablate", "ablated"), (False, "none", "as it is"), (False, "add", "added"))


@figure("steering", "steering_rates")
def steering_rates(steering: Plottable) -> go.Figure:
    """Refusal rates with the direction ablated and added.

    How to read it: harmful prompts on the left, harmless prompts on the right, each without (grey) and with the intervention
    (blue), with Wilson 95 % intervals. A refusal direction brings the left pair down to 0 and the right pair up. Degenerate responses
    count as not refused; the hover text has their number.

    Parameters
    ----------
    steering : Steering
        ``label`` over (intervention, prompt), ``harmful`` over (prompt).

    Returns
    -------
    plotly.graph_objects.Figure
        Four points with intervals; y: refusal rate.
    """
    data = steering.data
    counts = np.zeros((len(_RUNS), len(LABEL_COLORS)), dtype=int)
    for row, (harmful, name, _) in enumerate(_RUNS):
        labels = data.label.sel(intervention=name).values[data.harmful.values == harmful]
        counts[row] = [(labels == label).sum() for label in LABEL_COLORS]
    refused, asked = counts[:, 0], counts.sum(1)
    rate = np.divide(refused, asked, out=np.full(len(_RUNS), np.nan), where=asked > 0)
    low, high = np.array([wilson(int(some), int(all_)) for some, all_ in zip(refused, asked, strict=True)]).T
    figure = make_subplots()
    panel_title(figure, "Refusal rate")
    figure.add_scatter(
        x=[f"{'harmful' if harmful else 'harmless'}<br>{way}" for harmful, _, way in _RUNS],
        y=rate,
        mode="markers",
        error_y=interval(rate, low, high, thickness=1.5),
        marker={"size": 11, "color": [MUTED if name == "none" else PLAIN for _, name, _ in _RUNS]},
        customdata=counts,
        hovertemplate="%{y:.0%}<br>"
        + ", ".join(f"{label} %{{customdata[{n}]}}" for n, label in enumerate(LABEL_COLORS))
        + "<extra></extra>",
        showlegend=False,
    )
    figure.add_vline(x=1.5, line={"color": UNDETERMINED, "width": 1, "dash": "dot"})
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", title_text="refused")
    figure.update_xaxes(showgrid=False)
    return finish(figure, 340)
