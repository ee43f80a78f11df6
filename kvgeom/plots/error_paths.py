"""Rounding errors on their way through attention: by head, and by token."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.errors import InputError
from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.site_maps import site_maps
from kvgeom.plots.theme import (
    ACCENT,
    MUTED,
    PLAIN,
    finish,
    layer_axis,
    panel_title,
    plain,
)


@figure("error-paths", "score_errors")
def score_errors(found: Plottable) -> go.Figure:
    """Errors of scores beside the gaps between them, and the attention that moves, by layer.

    How to read it: in the upper panel red is the error of the last token's scores and blue the gap by which what it attends to
    stands above the rest (nats; medians over heads and prompts, with the middle half as bars). Where red reaches blue, rounding
    decides who is attended. The lower panel is what comes of it: the share of attention that goes elsewhere.

    Parameters
    ----------
    found : ErrorPaths

    Returns
    -------
    plotly.graph_objects.Figure
        Two panels that share the layer axis.
    """
    data = found.data
    layers = data.layer.values.astype(int)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.14)
    panel_title(figure, f"Scores of the last token, keys under {plain(found.meta['scheme'])}", row=1)
    panel_title(figure, "Attention that goes elsewhere", row=2)
    for name, legend, colour, row, offset in (
        ("score_gap", "gap", PLAIN, 1, -0.1),
        ("score_error", "error", ACCENT, 1, 0.1),
        ("attention_moved", "moved", ACCENT, 2, 0.0),
    ):
        low, middle, high = data[name].quantile([0.25, 0.5, 0.75], dim=("prompt", "query_head")).values
        figure.add_scatter(
            x=layers + offset,
            y=middle,
            mode="lines+markers",
            name=legend,
            showlegend=row == 1,
            line={"color": colour, "width": 1.5},
            marker={"size": 6},
            error_y={"array": high - middle, "arrayminus": middle - low, "color": colour, "thickness": 1, "width": 0},
            customdata=layers,
            hovertemplate=f"layer %{{customdata}}: {legend} %{{y:.3g}}{' nats' if row == 1 else ''}<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_xaxes(**{**layer_axis(layers), "title": None})
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_yaxes(title_text="nats", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="share", rangemode="tozero", row=2, col=1)
    return finish(figure, 440)


@figure("error-paths", "head_map")
def head_map(found: Plottable) -> go.Figure:
    """What the errors of each head's outputs cost, keys above values.

    How to read it: red heads lose refusal margin (nats, mean of the prompts) where the keys or the values that they read are
    rounded, blue ones gain. Dotted lines separate the query heads of one KV head from those of the next.

    Parameters
    ----------
    found : ErrorPaths
        ``margin_drop``, or where there is none ``direction_shift``; in ``meta`` also ``kv_heads``.

    Returns
    -------
    plotly.graph_objects.Figure
        Two heat maps, x: query head, y: layer.

    Raises
    ------
    InputError
        If errors were followed neither to the margin nor along a direction.
    """
    name, unit = ("margin_drop", "margin lost (nats)")
    if found.data[name].isnull().all():
        name, unit = ("direction_shift", "shift along the direction")
    data = found.data[name].mean("prompt")
    if data.isnull().all():
        raise InputError(
            "these errors lead nowhere: follow_errors was given neither refusal tokens nor directions; plot 'score_errors'"
        )
    count = data.sizes["query_head"]
    group = count // int(found.meta["kv_heads"])
    figure = site_maps(
        data, "query_head", unit=unit, hover=f"query head %{{x}}<br>{unit} %{{z:.3g}}", x_title="query head"
    )
    for row in (1, 2):
        for border in range(group, count, group):
            figure.add_vline(border - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, row=row, col=1)
    figure.update_xaxes(dtick=max(1, count // 16))
    return finish(figure, 560)


@figure("error-paths", "token_map")
def token_map(found: Plottable, prompt: int | None = None) -> go.Figure:
    """The tokens whose rounded keys and values cost margin, layer by layer.

    How to read it: red tokens lose refusal margin (nats, to first order) where their own keys or values are rounded. -1 is the
    last token of the prompt, from which the response begins.

    Parameters
    ----------
    found : ErrorPaths
        ``token_drop``.
    prompt : int, optional
        The mean of all prompts that have the token by default.

    Returns
    -------
    plotly.graph_objects.Figure
        Two heat maps, x: token from the end, y: layer.
    """
    data = found.data.token_drop
    data = data.mean("prompt") if prompt is None else data.sel(prompt=prompt)
    figure = site_maps(
        data,
        "token",
        unit="margin lost (nats)",
        hover="token %{x}<br>margin lost %{z:.3g} nats",
        x_title="token, from the end of the prompt",
        hoverongaps=False,
    )
    return finish(figure, 560)
