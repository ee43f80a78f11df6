"""A quick look: expected losses by width, and single layers."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    PLAIN,
    SITE_NAMES,
    colour_bar,
    finish,
    interval,
    layer_axis,
    log_axis,
    panel_title,
    plain,
    say,
)


@figure("screen", "widths")
def screened_widths(screen: Plottable) -> go.Figure:
    """Refusals that are expected to go, and the divergence of the model's own answers, by bit-width.

    How to read it: the precision of the cache falls from left to right. The top panel is the share of the refusals whose
    first token changes, with its Wilson 95 % interval; nothing was generated. The bottom panel is the mean KL divergence of
    the next-token distributions along these refusals, with its 95 % interval.

    Parameters
    ----------
    screen : Screen

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows that share the axis of bits, widest first.
    """
    data = screen.data.sortby("bits", ascending=False)
    refused = int(screen.meta["refused"])
    x = [str(int(bits)) for bits in data.bits.values]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.14)
    panel_title(figure, f"Expected to go, of {refused} refusals under {plain(screen.meta['scheme'])}", row=1)
    panel_title(figure, "KL divergence along the refusals (nats a token)", row=2)
    if not refused:
        for row in (1, 2):
            say(figure, "the model refuses none of these prompts with an exact cache", row=row)
        return finish(figure, 420, showlegend=False)
    lost = data.expected_lost.values
    share = lost / refused
    figure.add_bar(
        x=x,
        y=share,
        marker_color=PLAIN,
        error_y=interval(share, data.expected_low.values, data.expected_high.values),
        customdata=lost,
        hovertemplate=f"%{{x}} bits: %{{customdata}} of {refused} (%{{y:.0%}})<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=data.kl.values,
        mode="lines+markers",
        line_color=ACCENT,
        error_y=interval(data.kl.values, data.kl_low.values, data.kl_high.values),
        hovertemplate="%{x} bits: %{y:.3g} nats<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=1, col=1)
    figure.update_yaxes(**log_axis(data.kl.values[data.kl.values > 0]), row=2, col=1)
    figure.update_xaxes(type="category", title_text="bits of the cache", row=2, col=1)
    return finish(figure, 420, showlegend=False)


@figure("screen", "layers")
def screened_layers(screen: Plottable) -> go.Figure:
    """What rounding the keys or the values of one layer alone does to the first token.

    How to read it: the redder, the further the distribution of the first token is from that with an exact cache (KL
    divergence in nats, mean over a few refused prompts). The hover text has the refusals that are expected to go.

    Parameters
    ----------
    screen : Screen

    Returns
    -------
    plotly.graph_objects.Figure
        One heat map; x: layer, y: keys and values.
    """
    data = screen.data
    figure = make_subplots()
    panel_title(figure, f"KL divergence of the first token, one layer alone at {screen.meta['scan_bits']} bits (nats)")
    kl = data.layer_kl.transpose("site", "layer").values
    if not np.isfinite(kl).any():
        say(figure, "the model refuses none of these prompts with an exact cache")
        return finish(figure, 220)
    layers = data.layer.values.astype(int)
    figure.add_heatmap(
        x=layers,
        y=[SITE_NAMES[str(site)] for site in data.site.values],
        z=kl,
        zmin=0,
        colorscale="Reds",
        colorbar=colour_bar("nats"),
        customdata=data.layer_lost.transpose("site", "layer").values,
        hovertemplate=f"%{{y}} of layer %{{x}}: %{{z:.2g}} nats, %{{customdata}} of {screen.meta['few']} expected to go<extra></extra>",
    )
    figure.update_xaxes(title_text="layer", **layer_axis(layers))
    return finish(figure, 220)
