"""Damage by single layers."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PLAIN,
    UNDETERMINED,
    finish,
    interval,
    layer_axis,
    panel_title,
    percent,
    say,
)


@figure("scan", "layer_scan")
def layer_scan(scan: Plottable) -> go.Figure:
    """Margin lost and refusals flipped when one layer alone is rounded.

    How to read it: each bar is one layer, rounded while all others stay exact. Its height is the mean loss of the refusal
    margin (log-odds, in nats), with a bootstrap 95 % interval; if the interval contains 0, rounding the layer may do
    nothing. The lower panel is the share of refusals that flip, with its Wilson 95 % interval; short grey strokes are layers
    for which no responses were generated. The worst layer is red.

    Parameters
    ----------
    scan : Scan
        Over ``layer``; in ``meta`` also ``worst_layer``, and ``critical_share``, where the dotted line is.

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows that share the layer axis.
    """
    data, refused, worst = scan.data, int(scan.meta["prompts"]), scan.meta["worst_layer"]
    layers = data.layer.values.astype(int)
    drop, low, high = (data[name].values.astype(float) for name in ("margin_drop", "margin_low", "margin_high"))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.13)
    panel_title(figure, "Refusal margin lost by rounding one layer", row=1)
    panel_title(
        figure,
        f"Refusals that flip, of {refused}"
        + (f" (critical above {percent(scan.meta['critical_share'])}, dotted)" if refused else ""),
        row=2,
    )
    figure.add_bar(
        x=layers,
        y=drop,
        name="margin lost",
        showlegend=False,
        marker_color=[ACCENT if layer == worst else PLAIN for layer in layers],
        error_y=interval(drop, low, high, color=INK, thickness=1, width=2),
        customdata=np.stack([low, high], axis=-1),
        hovertemplate="layer %{x}: margin lost %{y:.2f} nats"
        "<br>95 % interval %{customdata[0]:.2f} to %{customdata[1]:.2f}<extra></extra>",
        row=1,
        col=1,
    )
    if refused:
        figure.add_hline(y=0, line={"color": LINE, "width": 1}, row=1, col=1)
        _flips(figure, scan, refused)
    else:
        for row in (1, 2):
            say(
                figure,
                "the model refuses none of these prompts with an exact cache: there is no margin to lose",
                row=row,
            )
    if worst is not None:
        _mark(figure, worst, int(layers.max()) + 1)
    elif refused:
        figure.add_annotation(
            text="no single layer flips a refusal",
            xref="x domain", yref="y domain", x=1, y=1, xanchor="right", yanchor="top",
            showarrow=False, font_color=MUTED, row=1, col=1,
        )  # fmt: skip

    ends = np.concatenate([low, high, drop, [0.0]])
    ends = ends[np.isfinite(ends)]
    span = max(float(ends.max() - ends.min()), 1e-3)
    # Room above the bars for the name of the worst layer.
    figure.update_yaxes(
        title_text="margin lost (nats)", range=[ends.min() - 0.05 * span, ends.max() + 0.2 * span], row=1, col=1
    )
    figure.update_yaxes(title_text="share of refusals", tickformat=".0%", range=[-0.03, 1.03], dtick=0.25, row=2, col=1)
    figure.update_yaxes(showticklabels=refused > 0)
    axis = layer_axis(layers)
    figure.update_xaxes(**{**axis, "title": None})
    figure.update_xaxes(title_text=f"layer rounded alone ({scan.meta['scheme']})", row=2, col=1)
    return finish(figure, 480, bargap=0.25)


def _flips(figure: go.Figure, scan: Plottable, refused: int) -> None:
    data = scan.data
    tried = np.isfinite(data.flips.values.astype(float))
    seen = data.isel(layer=np.flatnonzero(tried))
    rate, low, high = (seen[name].values.astype(float) for name in ("flip_rate", "ci_low", "ci_high"))
    layers = seen.layer.values.astype(int)
    figure.add_scatter(
        x=data.layer.values[~tried].astype(int),
        y=np.zeros(int((~tried).sum())),
        name="no responses generated",
        mode="markers",
        marker={"symbol": "line-ew", "size": 8, "line": {"color": UNDETERMINED, "width": 2}},
        hovertemplate="layer %{x}: no responses generated<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_scatter(
        x=layers,
        y=rate,
        name="flips, 95 % interval",
        mode="markers",
        marker={"size": 8, "color": [ACCENT if layer == scan.meta["worst_layer"] else PLAIN for layer in layers]},
        error_y=interval(rate, low, high, color=INK, thickness=1, width=3),
        customdata=[
            f"{int(n)} of {refused} refusals flip<br>95 % interval {percent(a)} to {percent(b)}"
            for n, a, b in zip(seen.flips.values, low, high, strict=True)
        ],
        hovertemplate="layer %{x}: %{customdata}<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_hline(y=scan.meta["critical_share"], line={"color": MUTED, "width": 1, "dash": "dot"}, row=2, col=1)


def _mark(figure: go.Figure, worst: int, layers: int) -> None:
    figure.add_vrect(x0=worst - 0.5, x1=worst + 0.5, fillcolor=ACCENT, opacity=0.08, line_width=0, layer="below")
    left = worst < layers / 2
    figure.add_annotation(
        text=f"worst layer {worst}",
        x=worst + (0.6 if left else -0.6),
        yref="y domain",
        y=0.99,
        xanchor="left" if left else "right",
        yanchor="top",
        showarrow=False,
        font={"color": ACCENT, "size": 12},
        row=1,
        col=1,
    )
