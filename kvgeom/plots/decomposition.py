"""The margin that a rounded cache loses, part by part."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    DIVERGING,
    MUTED,
    PLAIN,
    colour_bar,
    finish,
    layer_axis,
    panel_title,
    plain,
    symmetric_range,
)
from kvgeom.stats import bootstrap_means

_NAMES = {"k": "keys", "v": "values"}


@figure("decomposition", "contribution_map")
def contribution_map(found: Plottable) -> go.Figure:
    """What the keys and the values of every layer contribute to the margin lost, and what both add up to.

    How to read it: red parts lose refusal margin (nats, mean of the prompts), blue ones gain some. All cells add up to the
    loss in the heading, but for what it says is left over. The bars are the sums of the two rows, with 95 % intervals over
    prompts.

    Parameters
    ----------
    found : Decomposition

    Returns
    -------
    plotly.graph_objects.Figure
        A heat map (x: layer, y: site) above bars of the layers.
    """
    data = found.data
    by_prompt = data.contribution.sum(("head", "group"))
    cells = by_prompt.mean("prompt").transpose("site", "layer")
    layers = cells.layer.values.astype(int)
    low, high = symmetric_range(cells.values, least=0.01)
    lost, left = float((data.exact_margin - data.rounded_margin).mean()), float(data.remainder.mean())
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, row_heights=[0.4, 0.6])
    panel_title(figure, f"{lost:.2f} nats lost under {plain(found.meta['scheme'])}, {left:+.2g} left over", row=1)
    figure.add_heatmap(
        x=layers,
        y=[_NAMES[site] for site in cells.site.values],
        z=cells.values,
        zmin=low,
        zmax=high,
        colorscale=DIVERGING,
        xgap=2,
        ygap=2,
        hovertemplate="<b>%{y}, layer %{x}</b><br>contributes %{z:.3f} nats<extra></extra>",
        colorbar=colour_bar(
            "margin lost (nats)", tickvals=[low, 0, high], ticktext=[f"{end:z.2f}" for end in (low, 0, high)]
        ),
        row=1,
        col=1,
    )
    sums = by_prompt.sum("site").values
    means, ends = sums.mean(0), bootstrap_means(sums)
    figure.add_bar(
        x=layers,
        y=means,
        marker={"color": [ACCENT if value > 0 else PLAIN for value in means]},
        error_y={"array": ends[1] - means, "arrayminus": means - ends[0], "color": MUTED, "thickness": 1, "width": 0},
        customdata=ends.T,
        hovertemplate="layer %{x}: %{y:.3f} nats [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        showlegend=False,
        row=2,
        col=1,
    )
    figure.update_xaxes(**{**layer_axis(layers), "title": None})
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(showgrid=False, showline=False, ticks="", autorange="reversed", row=1, col=1)
    figure.update_yaxes(title_text="margin lost (nats)", row=2, col=1)
    return finish(figure, 380)


@figure("decomposition", "channel_groups")
def channel_groups(found: Plottable, layer: int | None = None) -> go.Figure:
    """What the groups of channels in the heads of one layer contribute.

    How to read it: a bar is a group of neighbouring channels of one KV head; red ones lose margin. The bars of keys and
    values together add up to what the layer contributes. Few tall bars: few channels carry the damage.

    Parameters
    ----------
    found : Decomposition
        In ``meta`` also ``group_size``.
    layer : int, optional
        By default the one that contributes most.

    Returns
    -------
    plotly.graph_objects.Figure
        Two panels of bars, keys above values, with 95 % intervals over prompts.
    """
    data = found.data.contribution
    if layer is None:
        layer = int(data.layer.values[int(data.sum(("site", "head", "group")).mean("prompt").argmax())])
    part = data.sel(layer=layer)
    heads, starts = part["head"].values.astype(int), part["group"].values.astype(int)
    last = np.minimum(starts + int(found.meta["group_size"]), int(found.meta["head_dim"])) - 1
    names = [f"head {head}, channels {start}-{end}" for head in heads for start, end in zip(starts, last, strict=True)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.14)
    for row, site in enumerate(("k", "v"), 1):
        values = part.sel(site=site).transpose("prompt", "head", "group").values.reshape(part.sizes["prompt"], -1)
        means, ends = values.mean(0), bootstrap_means(values)
        panel_title(figure, f"{_NAMES[site].capitalize()} of layer {layer}: {means.sum():.2f} nats", row=row)
        figure.add_bar(
            x=np.arange(len(means)),
            y=means,
            marker={"color": [ACCENT if value > 0 else PLAIN for value in means]},
            error_y={
                "array": ends[1] - means,
                "arrayminus": means - ends[0],
                "color": MUTED,
                "thickness": 1,
                "width": 0,
            },
            customdata=[[name, *pair] for name, pair in zip(names, ends.T, strict=True)],
            hovertemplate="%{customdata[0]}<br>%{y:.3f} nats [%{customdata[1]:.3f}, %{customdata[2]:.3f}]<extra></extra>",
            showlegend=False,
            row=row,
            col=1,
        )
        for border in range(len(starts), len(means), len(starts)):
            figure.add_vline(border - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, row=row, col=1)
        figure.update_yaxes(title_text="margin lost (nats)", row=row, col=1)
    middle = [len(starts) * (index + 0.5) - 0.5 for index in range(len(heads))]
    figure.update_xaxes(tickvals=middle, ticktext=[f"head {head}" for head in heads], showgrid=False)
    return finish(figure, 420)
