"""Rounding errors as attention sees them, beside plain ones."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import ACCENT, PLAIN, finish, layer_axis, log_axis, panel_title, plain, positive


@figure("attention-error", "errors_by_layer")
def errors_by_layer(found: Plottable, queries: str = "all") -> go.Figure:
    """Score-space error of keys and attention-weighted error of values, beside plain errors.

    How to read it: in the upper panel blue is the relative squared error of the keys (left axis) and red the error of the
    attention scores (right axis, nats), without the shift that softmax ignores. Where blue is high and red is low, rounding
    changes the keys much and attention little. The lower panel shows the same for values: red is the error of the head's
    output, which is below blue where the errors of several tokens average out.

    Parameters
    ----------
    found : AttentionError
    queries : {"all", "last"}
        All tokens, or the last one, from which the first response token is predicted.

    Returns
    -------
    plotly.graph_objects.Figure
        Two panels that share the layer axis.
    """
    by_head = found.data.sel(queries=queries)
    # Heads are averaged: errors of scores as root mean squares, relative errors as they are.
    data = by_head.mean("head").assign(attended_score_error=np.sqrt((by_head.attended_score_error**2).mean("head")))
    layers = data.layer.values.astype(int)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.14, specs=[[{"secondary_y": True}], [{}]]
    )
    panel_title(figure, f"Keys, {plain(found.meta['scheme'])}", row=1)
    panel_title(figure, "Values", row=2)
    traces = (
        ("key_mse", "relative squared error", PLAIN, 1, False),
        ("attended_score_error", "error of what attention sees", ACCENT, 1, True),
        ("value_mse", "relative squared error", PLAIN, 2, None),
        ("attended_value_error", "error of what attention sees", ACCENT, 2, None),
    )
    for name, legend, color, row, secondary in traces:
        unit = " nats" if "score" in name else ""
        figure.add_scatter(
            x=layers,
            y=positive(data[name]),
            mode="lines+markers",
            name=legend,
            legendgroup=legend,
            showlegend=row == 1,
            line={"color": color, "width": 1.5},
            marker={"size": 6},
            hovertemplate=f"layer %{{x}}: {name.replace('_', ' ')} %{{y:.3g}}{unit}<extra></extra>",
            row=row,
            col=1,
            secondary_y=secondary,
        )
    figure.update_xaxes(**{**layer_axis(layers), "title": None})
    figure.update_xaxes(title_text="layer", row=2, col=1)
    energy = {"title_text": "error / energy (log)"}
    figure.update_yaxes(**log_axis(data.key_mse), **energy, row=1, col=1, secondary_y=False)
    figure.update_yaxes(
        **log_axis(data.attended_score_error),
        title_text="score error (nats, log)",
        showgrid=False,
        row=1,
        col=1,
        secondary_y=True,
    )
    figure.update_yaxes(**log_axis(data.value_mse, data.attended_value_error), **energy, row=2, col=1)
    return finish(figure, 460)
