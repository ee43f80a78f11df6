"""The ratios of several models in one figure, with the published band."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import HEAD_COLORS, INK, LINE, SITE_NAMES, finish, log_axis, panel_title, positive

#: Shade of the published band.
_BAND = "rgba(200,120,40,0.16)"


@figure("ratios", "ratio_overview")
def ratio_overview(ratios: Plottable) -> go.Figure:
    """The ratio of every model, by layer, site, estimator, position and contrast.

    How to read it: each column is a site, each row of a panel one way to measure: three estimators at the position that is fixed in
    advance, then all positions, then contrasts between harmless requests, all of them in one row. Each mark is a layer; layers are
    spread a little upwards, the first at the bottom. Colours are models. The shaded band is the ratio of 10^2 to 10^3 that the
    paper reports; at the line at 1 the safety subspace is as exposed as the whole space. How far rows lie apart is how much
    the ratio depends on what was chosen; where the contrasts cover the estimators, it is not about safety.

    Parameters
    ----------
    ratios : Ratios

    Returns
    -------
    plotly.graph_objects.Figure
        A column for each site, logarithmic in x.
    """
    frame = ratios.data.to_dataframe()
    frame["group"] = np.where(frame.kind == "contrast", "harmless contrasts", frame.way)
    sites = [site for site in SITE_NAMES if site in set(frame.site)]
    kinds = ["estimator", "position", "contrast"]
    groups = [name for kind in kinds for name in dict.fromkeys(frame[frame.kind == kind].group)]
    models = list(dict.fromkeys(frame.model))
    # The first group on top; models of a row beside each other.
    at = {name: -float(n) for n, name in enumerate(groups)}
    step = 0.8 / len(models)
    figure = make_subplots(rows=1, cols=len(sites), shared_yaxes=True, horizontal_spacing=0.03)
    low, high = (float(edge) for edge in ratios.meta["published"])
    for column, site in enumerate(sites, 1):
        panel_title(figure, SITE_NAMES[site], row=1, col=column)
        drawn = [np.array([low, high])]
        for number, model in enumerate(models):
            one = frame[(frame.site == site) & (frame.model == model)]
            values = positive(one.ratio.to_numpy(dtype=float))
            drawn.append(values)
            last = max(1, int(one.layer.max())) if len(one) else 1
            y = one.group.map(at).to_numpy() + 0.4 - step * (number + 1) + 0.85 * step * one.layer.to_numpy() / last
            own = (one.kind != "contrast").to_numpy()
            figure.add_scatter(
                x=values,
                y=y,
                mode="markers",
                name=model,
                legendgroup=model,
                showlegend=column == 1,
                marker={
                    "size": np.where(own, 5, 3),
                    "color": HEAD_COLORS[number % len(HEAD_COLORS)],
                    "opacity": np.where(own, 0.9, 0.35),
                },
                customdata=np.stack([one.way.to_numpy(), one.layer.to_numpy()], -1),
                hovertemplate=f"<b>{model}, {SITE_NAMES[site]}</b><br>layer %{{customdata[1]}}, %{{customdata[0]}}: %{{x:,.3g}}<extra></extra>",
                row=1,
                col=column,
            )
        # After the marks: a panel that has none yet gets no shapes.
        figure.add_vrect(x0=low, x1=high, fillcolor=_BAND, line_width=0, layer="below", row=1, col=column)
        figure.add_vline(x=1, line={"color": LINE, "width": 1}, row=1, col=column)
        figure.update_xaxes(**log_axis(1.0, *drawn), title_text="ratio (log)", row=1, col=column)
        figure.update_yaxes(
            tickvals=list(at.values()),
            ticktext=groups,
            range=[-len(groups) + 0.4, 0.6],
            showgrid=False,
            row=1,
            col=column,
        )
    figure.update_layout(legend={"font": {"color": INK}})
    return finish(figure, 170 + 46 * len(groups), margin={"l": 150, "r": 10, "t": 84, "b": 46})
