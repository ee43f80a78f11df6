"""What rounding the channels of a layer costs, beside their size."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import ACCENT, INK, MUTED, PLAIN, SITE_NAMES, finish, head_borders, panel_title

_PARTS = {"all": "all channels", "outliers": "outliers alone", "others": "all others alone"}


@figure("channel-damage", "channel_damage")
def channel_damage(damage: Plottable, site: str | None = None) -> go.Figure:
    """Channel magnitudes of the site that fails, and the margin that is lost in its outliers and in all others.

    How to read it: on the left every channel's magnitude (root mean square); outliers are coloured. On the right the refusal
    margin that is lost when keys or values of this layer alone are rounded, then with only the outliers rounded, then with
    only the others, always by the scales of all. If the bar of the others is the tall one, outliers crush them; if that of
    the outliers is, they carry what is lost themselves. Bars have 95 % intervals over prompts.

    Parameters
    ----------
    damage : ChannelDamage
    site : {"k", "v"}, optional
        The site that loses more margin by default.

    Returns
    -------
    plotly.graph_objects.Figure
        A bar panel over channels, and one over parts with a bar for each site.
    """
    data = damage.data
    drop = data.margin_drop
    if site is None:
        site = str(data.site.values[int(drop.sel(part="all").mean("prompt").values.argmax())])
    magnitude, flagged = data.magnitude.sel(site=site).values, data.outlier.sel(site=site).values
    count, prompts = len(magnitude), drop.sizes["prompt"]
    head_dim = count // int(damage.meta["kv_heads"])
    figure = make_subplots(cols=2, rows=1, column_widths=[0.6, 0.4], horizontal_spacing=0.1)
    name = SITE_NAMES.get(site, site)
    panel_title(figure, f"Channels of layer {damage.meta['layer']}, {name}", row=1, col=1)
    panel_title(figure, "Margin lost (nats)", row=1, col=2)
    for chosen, color, label in ((flagged, ACCENT, "outliers"), (~flagged, PLAIN, "others")):
        at = np.flatnonzero(chosen)
        figure.add_bar(
            x=at, y=magnitude[at], marker={"color": color, "line_width": 0}, name=label, showlegend=bool(len(at)),
            hovertemplate="channel %{x}<br>magnitude %{y:.3g}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    head_borders(figure, count, head_dim, row=1)
    for own in [site, *(str(one) for one in data.site.values if one != site)]:
        one = drop.sel(site=own).transpose("part", "prompt").values
        error = one.std(1, ddof=1) / np.sqrt(prompts) if prompts > 1 else np.zeros(len(one))
        figure.add_bar(
            x=[_PARTS.get(str(part), str(part)) for part in drop.part.values],
            y=one.mean(1),
            error_y={"type": "data", "array": 1.96 * error, "thickness": 1.2, "width": 4, "color": INK},
            name=SITE_NAMES.get(own, own),
            marker={"color": INK if own == site else MUTED},
            hovertemplate=f"{SITE_NAMES.get(own, own)}, %{{x}}: %{{y:.3g}} nats<extra></extra>",
            row=1,
            col=2,
        )
    figure.update_xaxes(range=[-1, count], title_text="channel", showgrid=False, row=1, col=1)
    figure.update_yaxes(title_text="magnitude (rms)", rangemode="tozero", row=1, col=1)
    return finish(figure, 380, barmode="group", bargap=0.15, margin_t=84)
