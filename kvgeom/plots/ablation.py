"""What of a cache must be rounded for refusals to be lost."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import ACCENT, MUTED, PLAIN, UNDETERMINED, finish, interval, percent, plain, say


@figure("ablation", "ablation_bars")
def ablation_bars(ablation: Plottable) -> go.Figure:
    """Share of the refusals that flip under each recipe, by family.

    How to read it: each row rounds a part of the cache. The bar is the share of the refusals with an exact cache that
    is lost, with its Wilson 95 % interval. The reference (red, dotted line) rounds everything: a part that comes near
    it matters. Grey rows cannot be told from the reference (exact McNemar p, adjusted for their number, above 5 %).

    Parameters
    ----------
    ablation : Ablation
        ``flips``, ``flip_rate``, ... over ``recipe``, with its ``family``.

    Returns
    -------
    plotly.graph_objects.Figure
        y: families and recipes; x: flip rate.
    """
    data, reference, n = ablation.data, ablation.meta["reference"], ablation.meta["prompts"]
    rate, low, high = (data[name].values.astype(float) for name in ("flip_rate", "ci_low", "ci_high"))
    names = [str(name) for name in data.recipe.values]
    colours = [
        ACCENT if name == reference else UNDETERMINED if p > 0.05 else PLAIN
        for name, p in zip(names, data.p.values, strict=True)
    ]
    figure = make_subplots()
    figure.add_bar(
        y=[[plain(family) for family in data.family.values], [plain(name) for name in names]],
        x=rate,
        orientation="h",
        marker_color=colours,
        error_x=interval(rate, low, high, color=MUTED, thickness=1),
        customdata=np.stack(
            [data[name].values for name in ("flips", "flips_complied", "flips_evaded", "flips_degenerate", "p")], axis=1
        ),
        hovertemplate="%{y}<br>%{customdata[0]:.0f} of "
        + str(n)
        + " flip: %{customdata[1]:.0f} comply, %{customdata[2]:.0f} evade, %{customdata[3]:.0f} break down"
        + "<br>McNemar against the reference p = %{customdata[4]:.2g}<extra></extra>",
        showlegend=False,
    )
    whole = float(data.flip_rate.sel(recipe=reference))
    if np.isfinite(whole):
        figure.add_vline(x=whole, line={"color": ACCENT, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=whole, y=1, yref="paper", xanchor="right" if whole > 0.5 else "left", yanchor="bottom", showarrow=False, font={"size": 11, "color": MUTED},
            text=f"{plain(reference)} {percent(whole)}",
        )  # fmt: skip
    if n == 0:
        say(figure, "the model refuses none of these prompts with an exact cache: nothing can be lost")
    figure.update_xaxes(
        title_text=f"share of {n} refusals lost" if n else "share of refusals lost", tickformat=".0%", range=[0, 1.02]
    )
    figure.update_yaxes(autorange="reversed")
    return finish(figure, 120 + 22 * len(names))
