"""What directions do when they are ablated and added, and how far they depend on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    HEAD_COLORS,
    HEAD_SYMBOLS,
    SITE_NAMES,
    UNDETERMINED,
    colour_bar,
    finish,
    interval,
    layer_axis,
)

if TYPE_CHECKING:
    import xarray as xr

#: What is measured, in which requests, and the title of its axis.
_SIDES = (("lost", True, "margin lost (nats)"), ("induced", False, "margin induced (nats)"))


@figure("effects", "effects_by_layer")
def effects_by_layer(effects: Plottable, site: str | None = None) -> go.Figure:
    """Refusal margin that each direction takes away when ablated, and brings about when added, layer by layer.

    How to read it: on the left harmful requests with the direction ablated, on the right harmless ones with it added, each point
    with its 95 % interval over requests. The grey band is what random directions do, from the least to the most of them. Points
    inside of it are no evidence that the direction means refusal. None of the requests was used to find the directions.

    Parameters
    ----------
    effects : Effects
    site : {"k", "v", "resid"}, optional
        The residual stream by default, or the first site that was tried.

    Returns
    -------
    plotly.graph_objects.Figure
        Two panels; a line for each method.
    """
    data = effects.data
    sites = [str(one) for one in data.site.values]
    site = ("resid" if "resid" in sites else sites[0]) if site is None else site
    layers = data.layer.values.astype(int)
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("ablated in harmful requests", "added to harmless requests"),
        horizontal_spacing=0.1,
    )
    for column, (side, harmful, title) in enumerate(_SIDES, start=1):
        random = _change(data, "control_", harmful).sel(site=site)
        if random.sizes["draw"]:
            low, high = random.min("draw").values, random.max("draw").values
            defined = np.isfinite(low)
            figure.add_scatter(
                x=[*layers[defined], *layers[defined][::-1]],
                y=[*high[defined], *low[defined][::-1]],
                fill="toself",
                line={"width": 0},
                fillcolor=UNDETERMINED,
                name="random directions",
                legendgroup="random",
                showlegend=column == 1,
                hoverinfo="skip",
                row=1,
                col=column,
            )
        for number, method in enumerate(map(str, data.estimator.values)):
            cell = data.sel(estimator=method, site=site)
            mean, lower, upper = (cell[f"{side}{end}"].values for end in ("", "_low", "_high"))
            figure.add_scatter(
                x=layers,
                y=mean,
                error_y=interval(mean, lower, upper, thickness=1),
                mode="lines+markers",
                name=method,
                legendgroup=method,
                showlegend=column == 1,
                line={"width": 1.5, "color": HEAD_COLORS[number % len(HEAD_COLORS)]},
                marker={"size": 7, "symbol": HEAD_SYMBOLS[number % len(HEAD_SYMBOLS)]},
                customdata=np.stack([cell[f"{side}_p"].values], axis=-1),
                hovertemplate=f"{method}, {SITE_NAMES[site]}, layer %{{x}}<br>%{{y:.3g}} nats<br>"
                "share of random directions that do as much: %{customdata[0]:.2g}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_yaxes(title_text=title, row=1, col=column)
        figure.update_xaxes(**layer_axis(layers), row=1, col=column)
    figure.add_hline(y=0, line={"color": ACCENT, "width": 0.5})
    return finish(figure, 380)


def _change(data: xr.Dataset, prefix: str, harmful: bool) -> xr.DataArray:
    """Mean margin that is lost in harmful requests, or induced in harmless ones."""
    rows = data.harmful.values == harmful
    change = (data[f"{prefix}margin"] - data.clean_margin).isel(prompt=rows).mean("prompt", skipna=False)
    found: xr.DataArray = -change if harmful else change
    return found


@figure("independence", "dependence_map")
def dependence_map(independence: Plottable) -> go.Figure:
    """How much of each direction is gone when another is ablated.

    How to read it: a row is the direction that is ablated, a column the one that is looked at. 0 (white) says that the residual
    stream lies along it as before, 1 that the ablation changes that by as much as there is of it, 2 that it turns it around. The last row is the largest effect
    of any random direction: cells that do not stand out from it are independent by this measure, whatever the cosine of the two
    directions, which the hover text has.

    Parameters
    ----------
    independence : Independence

    Returns
    -------
    plotly.graph_objects.Figure
        One heat map.
    """
    data = independence.data
    names = [str(name) for name in data.direction.values]
    values = data.dependence.transpose("ablated", "direction").values
    cosines = data.between.transpose("direction", "other").values
    low, high = (data[f"dependence_{end}"].transpose("ablated", "direction").values for end in ("low", "high"))
    rows, text = [*names], [
        [f"cosine {cosines[i, j]:.2f}<br>95 % interval {low[i, j]:.2f} to {high[i, j]:.2f}" for j in range(len(names))]
        for i in range(len(names))
    ]  # fmt: skip
    if data.sizes["draw"]:
        values = np.vstack([values, data.control_high.values])
        rows.append("random, the largest")
        text.append([f"{data.sizes['draw']} random directions" for _ in names])
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=rows,
            z=values,
            zmin=0,
            zmax=max(1.0, float(np.nanmax(values))),
            colorscale=[[0, "white"], [1, ACCENT]],
            xgap=1,
            ygap=1,
            text=[[f"{value:.2f}" for value in row] for row in values] if len(names) <= 10 else None,
            texttemplate="%{text}" if len(names) <= 10 else None,
            customdata=text,
            hovertemplate="ablated: %{y}<br>looked at: %{x}<br>dependence %{z:.3f}<br>%{customdata}<extra></extra>",
            colorbar=colour_bar("dependence"),
        )
    )
    figure.update_xaxes(title_text="direction", showgrid=False)
    figure.update_yaxes(title_text="ablated", autorange="reversed", showgrid=False)
    return finish(figure, 180 + 34 * len(rows))
