"""The ratio at every token position."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    HEAD_COLORS,
    INK,
    LINE,
    MUTED,
    SITE_NAMES,
    finish,
    layer_axis,
    log_axis,
    panel_title,
    positive,
    say,
)


@figure("sensitivity", "positions")
def positions(sensitivity: Plottable) -> go.Figure:
    """The ratio of the difference of means by layer, at every position that the prompts share.

    How to read it: each line is a position. The thick black one is the position of the subspace, fixed before anything was
    measured; its band is the 95 % interval. The others say how much hangs on that choice: where lines are decades apart, so
    would ratios be that somebody measured at another token. Triangles are lower bounds, where the class difference cannot be
    told from chance. A position without any mark in a layer is undefined there: harmful and harmless requests have the same
    keys and values, as at all template tokens of layer 0.

    Parameters
    ----------
    sensitivity : Sensitivity

    Returns
    -------
    plotly.graph_objects.Figure
        A row for each site, logarithmic, sharing the layer axis.
    """
    data = sensitivity.data
    sites, names = [str(site) for site in data.site.values], [str(name) for name in data["at"].values]
    layers, rule = data.layer.values.astype(int), str(sensitivity.meta.get("position", ""))
    # The rule last, above the others.
    order = [*(name for name in names if name != rule), *(name for name in names if name == rule)]
    figure = make_subplots(rows=len(sites), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, site in enumerate(sites, 1):
        panel_title(figure, SITE_NAMES.get(site, site), row=row)
        drawn = []
        for number, name in enumerate(order):
            one = data.sel(site=site, at=name)
            ratio, low, high = (positive(one[f"at_ratio{part}"].values) for part in ("", "_low", "_high"))
            weak = ~np.isfinite(ratio) & np.isfinite(low)
            drawn += [ratio, low[weak]]
            own = name == rule
            color = INK if own else HEAD_COLORS[number % len(HEAD_COLORS)]
            shared = {"legendgroup": name, "row": row, "col": 1}
            if own:
                # The band ends where the ratio has no upper limit.
                for edge, fill in ((np.where(np.isfinite(high), low, np.nan), None), (high, "tonexty")):
                    figure.add_scatter(
                        x=layers, y=edge, mode="lines", line={"width": 0}, fill=fill, fillcolor="rgba(20,25,30,0.14)",
                        showlegend=False, hoverinfo="skip", **shared,
                    )  # fmt: skip
            figure.add_scatter(
                x=layers, y=ratio, mode="lines+markers", name=name, showlegend=row == 1,
                line={"color": color, "width": 3 if own else 1.2}, marker={"size": 6 if own else 4},
                hovertemplate=f"{name}, layer %{{x}}: ratio %{{y:,.3g}}<extra></extra>", **shared,
            )  # fmt: skip
            figure.add_scatter(
                x=layers[weak], y=low[weak], mode="markers", name=f"{name}, at least", showlegend=False,
                marker={"symbol": "triangle-up-open", "size": 7 if own else 5, "color": color},
                hovertemplate=f"{name}, layer %{{x}}: ratio at least %{{y:,.3g}}<extra></extra>", **shared,
            )  # fmt: skip
        figure.add_hline(y=1, line={"color": LINE, "width": 1}, row=row, col=1)
        if not any(np.isfinite(values).any() for values in drawn):
            say(figure, "undefined in every layer", row=row)
        figure.update_yaxes(**log_axis(1.0, *drawn), title_text="ratio (log)", row=row, col=1)
        figure.update_xaxes(**{**layer_axis(layers), "title": None}, row=row, col=1)
    figure.update_xaxes(title={"text": "layer", "font": {"color": MUTED}}, row=len(sites), col=1)
    return finish(figure, 150 + 190 * len(sites), margin_t=84)
