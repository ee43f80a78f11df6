"""What rounding single layers causes: exactly, and by the first-order estimate."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from kvgeom.errors import InputError
from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.site_maps import site_maps
from kvgeom.plots.theme import (
    DIVERGING,
    MUTED,
    PLAIN,
    channel_hover,
    colour_bar,
    finish,
    head_borders,
    head_numbers,
    layer_axis,
    panel_title,
    plain,
    say,
    symmetric_range,
)
from kvgeom.stats import rank_correlation


@figure("patching", "margin_map")
def margin_map(patching: Plottable) -> go.Figure:
    """Refusal margin lost, layer by scheme.

    How to read it: every cell is one layer rounded alone under one scheme. Red: the refusal margin falls (nats, mean
    over the prompts). Blue: it rises. White: rounding this layer does not change the next token.

    Parameters
    ----------
    patching : Patching
        ``clean_margin``, ``margin`` and ``kl``.

    Returns
    -------
    plotly.graph_objects.Figure
        One heat map; x: layer, y: scheme.
    """
    data = patching.data
    drop = (data.clean_margin - data.margin).mean("prompt").transpose("scheme", "layer")
    layers = drop.layer.values.astype(int)
    low, high = symmetric_range(drop.values, least=0.1)
    digits = 1 if high >= 1 else 2
    wide = len(layers) > 28
    figure = make_subplots()
    figure.add_heatmap(
        x=layers,
        y=[plain(name) for name in drop.scheme.values],
        z=drop.values,
        zmin=low,
        zmax=high,
        colorscale=DIVERGING,
        xgap=2,
        ygap=2,
        text=[["" if wide else f"{value:z.{digits}f}" for value in row] for row in drop.values],
        texttemplate="%{text}",
        textfont={"size": 10},
        hoverongaps=False,
        customdata=data.kl.mean("prompt").transpose("scheme", "layer").values,
        hovertemplate="<b>%{y}, layer %{x}</b><br>margin lost %{z:.2f} nats<br>KL %{customdata:.3g} nats<extra></extra>",
        colorbar=colour_bar(
            "margin lost (nats)", tickvals=[low, 0, high], ticktext=[f"{end:z.{digits}f}" for end in (low, 0, high)]
        ),
    )
    if not np.isfinite(drop.values).any():
        say(figure, "no margins: no refusal tokens were given")
    figure.update_xaxes(**layer_axis(layers))
    figure.update_xaxes(range=[layers.min() - 0.5, layers.max() + 0.5], showline=False, ticks="")
    figure.update_yaxes(autorange="reversed", showgrid=False, showline=False, ticks="")
    return finish(figure, 130 + 46 * drop.sizes["scheme"], margin={"l": 70, "r": 10, "t": 34, "b": 46})


@figure("first-order", "first_order_channels")
def first_order_channels(estimate: Plottable) -> go.Figure:
    """First-order margin loss of every layer and channel, keys above values.

    How to read it: red channels lose refusal margin when they are rounded, blue ones gain. The channels of a layer add up
    to its estimate. A few red columns mean that single channels carry the damage. Dotted lines separate KV heads.

    Parameters
    ----------
    estimate : FirstOrder
        ``channel_drop``; in ``meta`` also ``head_dim``.

    Returns
    -------
    plotly.graph_objects.Figure
        Two heat maps, x: channel, y: layer.
    """
    data = estimate.data.channel_drop
    size, count = int(estimate.meta["head_dim"]), data.sizes["channel"]
    figure = site_maps(
        data,
        "channel",
        unit="margin lost (nats)",
        hover=f"{channel_hover(size, 'customdata')}<br>margin lost %{{z:.3g}} nats",
        x_title="channel",
        customdata=head_numbers((data.sizes["layer"], count), size),
    )
    for row in (1, 2):
        head_borders(figure, count, size, row=row)
    return finish(figure, 620)


@figure("first-order", "first_order_against_exact", exact="patching")
def first_order_against_exact(estimate: Plottable, exact: Plottable) -> go.Figure:
    """First-order estimate against the exact margin drop, a point for each layer.

    How to read it: on the dashed line the estimate is right. Points far above it lose more than the gradient says, because
    the rounding error there is too large for a linear estimate. To choose layers their order is enough; the rank correlation
    in the heading measures it, with its interval.

    Parameters
    ----------
    estimate : FirstOrder
        ``margin_drop``; in ``meta`` also ``scheme``.
    exact : Patching
        Under the same scheme, of the same prompts, in all layers.

    Returns
    -------
    plotly.graph_objects.Figure
        x: first order, y: exact (nats).

    Raises
    ------
    InputError
        If ``exact`` does not have the scheme of the estimate.
    """
    wanted = estimate.meta["scheme"]
    name = next((key for key, value in exact.meta["schemes"].items() if value == wanted), None)
    if name is None:
        measured = ", ".join(map(str, exact.meta["schemes"].values()))
        raise InputError(f"the estimate is under {wanted}, the exact margins under {measured}; patch the same scheme")
    by_layer = estimate.data.margin_drop.sum("site")
    drop = (exact.data.clean_margin - exact.data.margin).sel(scheme=name, drop=True)
    found = rank_correlation(by_layer, drop)
    x, y = by_layer.mean("prompt").values, drop.mean("prompt").values
    layers = drop.layer.values.astype(int)
    figure = make_subplots()
    panel_title(figure, f"First order against exact, {wanted}: {found}")
    reach = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    figure.add_scatter(
        x=reach, y=reach, mode="lines", line={"color": MUTED, "width": 1, "dash": "dash"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    places = _label_places(np.stack([x, y], 1) / max(reach[1] - reach[0], 1e-12), most=6)
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=[f"L{layer}" if place else "" for layer, place in zip(layers, places, strict=True)],
        textposition=[place or "top center" for place in places],
        marker={"color": PLAIN, "size": 8},
        customdata=layers,
        hovertemplate="layer %{customdata}<br>first order %{x:.2f} nats<br>exact %{y:.2f} nats<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="margin lost, first order (nats)")
    figure.update_yaxes(title_text="margin lost, exact (nats)")
    return finish(figure, 420)


#: Where a label may be beside its point, and how far away its middle is, as shares of the panel.
_BESIDE = {
    "top center": (0.0, 0.06),
    "middle left": (-0.03, 0.0),
    "middle right": (0.03, 0.0),
    "bottom center": (0.0, -0.06),
}


def _label_places(points: NDArray[np.float64], most: int) -> list[str]:
    """Where to label the points furthest from zero, so that no label lies on another one or on a point; ``""`` for no label."""
    places = [""] * len(points)
    taken = [(point, (0.02, 0.03)) for point in points]  # with the half width and height that it keeps free
    for index in np.argsort(-np.abs(points).max(1))[:most]:
        for name, offset in _BESIDE.items():
            middle = points[index] + offset
            if not any((np.abs(middle - other) < room).all() for other, room in taken):
                places[index] = name
                taken.append((middle, (0.045, 0.06)))
                break
    return places
