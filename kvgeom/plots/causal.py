"""What rounding single layers causes: exactly, and by the first-order estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.errors import InputError
from kvgeom.geometry.causal import rank_correlation
from kvgeom.plots.registry import figure
from kvgeom.plots.theme import (
    DIVERGING,
    MUTED,
    PLAIN,
    finish,
    layer_axis,
    panel_title,
    plain,
    short,
    symmetric_range,
)

if TYPE_CHECKING:
    from kvgeom.geometry.causal import FirstOrder, Patching


@figure("patching", "margin_map")
def margin_map(patching: Patching) -> go.Figure:
    """Margin lost, layer x scheme.

    How to read it: every cell is one layer rounded alone under one scheme. Red: the refusal margin falls (nats, mean
    over the prompts); blue: it rises; white: rounding this layer does not matter to the next token.

    Returns
    -------
    plotly.graph_objects.Figure
        One heat map; x: layer, y: scheme.
    """
    drop = patching.margin_drop.mean("prompt").transpose("scheme", "layer")
    layers = drop.layer.values.astype(int)
    low, high = symmetric_range(drop.values, least=0.1)
    wide = len(layers) > 36
    figure = go.Figure(
        go.Heatmap(
            x=layers,
            y=[plain(name) for name in drop.scheme.values],
            z=drop.values,
            zmin=low,
            zmax=high,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            text=[["" if wide else f"{value:.1f}" for value in row] for row in drop.values],
            texttemplate="%{text}",
            customdata=patching.data.kl.mean("prompt").transpose("scheme", "layer").values,
            hovertemplate="<b>%{y}, layer %{x}</b><br>margin lost %{z:.2f} nats<br>KL %{customdata:.3g} nats<extra></extra>",
            colorbar={"title": {"text": "margin lost<br>(nats)"}, "thickness": 12, "outlinewidth": 0},
        )
    )
    figure.update_xaxes(**layer_axis(len(layers)))
    figure.update_xaxes(range=[layers.min() - 0.5, layers.max() + 0.5], showline=False, ticks="")
    figure.update_yaxes(autorange="reversed", showgrid=False, showline=False, ticks="")
    return finish(figure, 130 + 46 * drop.sizes["scheme"], margin={"l": 70, "r": 10, "t": 34, "b": 46})


@figure("first-order", "first_order_channels")
def first_order_channels(estimate: FirstOrder) -> go.Figure:
    """First-order margin loss of every layer and channel, keys above values.

    How to read it: red channels lose refusal margin when they are rounded, blue ones gain; channels of a layer add up
    to its estimate. Dotted lines separate KV heads. A few red columns: single channels carry the damage.

    Returns
    -------
    plotly.graph_objects.Figure
        Two heat maps, x: channel, y: layer.
    """
    data = estimate.data.channel_drop
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    # A few channels dominate: colours end where 99 % of the cells lie, and the hover text has the number.
    reach = max(float(np.quantile(np.abs(data.values), 0.99)), 1e-9)
    size, count = estimate.meta["head_dim"], data.sizes["channel"]
    for row, (site, title) in enumerate((("k", "Keys"), ("v", "Values")), 1):
        panel_title(figure, title, row=row)
        figure.add_heatmap(
            x=data.channel.values,
            y=data.layer.values,
            z=data.sel(site=site).values,
            zmin=-reach,
            zmax=reach,
            colorscale=DIVERGING,
            showscale=row == 1,
            hovertemplate="layer %{y}, channel %{x}<br>margin lost %{z:.3g} nats<extra></extra>",
            colorbar={
                "title": {"text": "margin lost<br>(nats)"},
                "thickness": 12,
                "outlinewidth": 0,
                "tickvals": [-reach, 0, reach],
                "ticktext": [f"≤ {short(-reach)}", "0", f"≥ {short(reach)}"],
            },
            row=row,
            col=1,
        )
        for border in range(size, count, size):
            figure.add_vline(x=border - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, row=row, col=1)
        figure.update_yaxes(title_text="layer", autorange="reversed", showgrid=False, row=row, col=1)
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text="channel", row=2, col=1)
    return finish(figure, 620)


@figure("first-order", "first_order_against_exact")
def first_order_against_exact(estimate: FirstOrder, exact: Patching) -> go.Figure:
    """First-order estimate against the exact margin drop, a point for each layer.

    How to read it: on the dashed line the estimate is right. Points far above it lose more than the gradient says: the
    rounding error there is too large for a straight line. What matters for choosing layers is the order, which the
    rank correlation in the heading measures, with its interval.

    Parameters
    ----------
    estimate : FirstOrder
    exact : Patching
        Of the same scheme and prompts, all layers.

    Raises
    ------
    InputError
        If ``exact`` does not hold the estimate's scheme.
    """
    wanted = estimate.meta["scheme"]
    name = next((key for key, value in exact.meta["schemes"].items() if value == wanted), None)
    if name is None:
        raise InputError(
            f"the estimate is of {wanted}, but the exact drops are of {list(exact.meta['schemes'].values())}"
        )
    drop = exact.margin_drop.sel(scheme=name, drop=True)
    found = rank_correlation(estimate.by_layer, drop)
    x, y = estimate.by_layer.mean("prompt").values, drop.mean("prompt").values
    layers = drop.layer.values.astype(int)
    figure = make_subplots()
    panel_title(figure, f"First order against exact, {wanted}: {found}")
    reach = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    figure.add_scatter(
        x=reach, y=reach, mode="lines", line={"color": MUTED, "width": 1, "dash": "dash"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    top = np.argsort(-np.maximum(np.abs(x), np.abs(y)))[:6]
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=[f"L{layer}" if index in top else "" for index, layer in enumerate(layers)],
        textposition="top center",
        marker={"color": PLAIN, "size": 8},
        customdata=layers,
        hovertemplate="layer %{customdata}<br>first order %{x:.2f} nats<br>exact %{y:.2f} nats<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="margin lost, first order (nats)")
    figure.update_yaxes(title_text="margin lost, exact (nats)")
    return finish(figure, 420)
