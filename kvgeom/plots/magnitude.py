"""The stored vectors of a layer, token by channel, before and after rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.checks import suggests
from kvgeom.plots.theme import (
    SITE_NAMES,
    channel_hover,
    colour_bar,
    finish,
    head_borders,
    head_numbers,
    panel_title,
    percent,
    plain,
)

if TYPE_CHECKING:
    import xarray as xr

#: Sequential data: dark is large.
MAGNITUDE = "Blues"


@suggests()
def magnitude_surface(stored: xr.Dataset, *, heatmap: bool = True) -> go.Figure:
    """Magnitudes of one prompt's stored vectors before and after rounding, as surfaces beside heat maps.

    How to read it: ridges along the token axis are outlier channels: the same channel is large at every token, and sets the
    step of all that shares its scale. After rounding, what is smaller than half a step is zero: the cache has lost what is
    missing in the lower row. Dotted lines separate KV heads. Both rows have the same scale; the surfaces can be rotated with
    the mouse.

    Parameters
    ----------
    stored : Dataset
        ``before`` and ``after`` over (token, channel), ``text`` over (token), and the attributes ``layer``, ``site``,
        ``scheme`` and ``kv_heads``; from :func:`kvgeom.geometry.channels.stored`.
    heatmap : bool
        Whether to draw the heat maps too.

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows, before and after; a surface and a heat map each. z: magnitude, logarithmic in colour and height
        as ``log10(1 + magnitude)``.
    """
    before, after = (np.abs(stored[name].values.astype(float)) for name in ("before", "after"))
    heights = [np.log10(1 + values) for values in (before, after)]
    top = max(float(heights[0].max()), float(heights[1].max()), 1e-9)
    tokens = [f"{n} {plain(repr(str(text)))}" for n, text in enumerate(stored.text.values)]
    zero = float((after == 0).mean())
    titles = ("before rounding", f"after {plain(stored.attrs['scheme'])}: {percent(zero)} are 0")
    columns = 2 if heatmap else 1
    figure = make_subplots(
        rows=2,
        cols=columns,
        specs=[[{"type": "surface"}, {"type": "xy"}][:columns]] * 2,
        column_widths=[0.5, 0.5][:columns] if heatmap else None,
        horizontal_spacing=0.06,
        vertical_spacing=0.1,
        subplot_titles=[title for title in titles for _ in range(columns)] if not heatmap else None,
    )
    figure.update_annotations(font_size=13)
    ticks = _ticks(10**top - 1)
    bar = colour_bar("magnitude", tickvals=[np.log10(1 + v) for v in ticks], ticktext=[f"{v:,g}" for v in ticks])
    count = before.shape[1]
    head_dim = None if stored.attrs["site"] == "resid" else count // int(stored.attrs["kv_heads"])
    text = np.array([[token] * count for token in tokens], dtype=object)
    heads = head_numbers((len(tokens), count), head_dim)
    layer = f"layer {stored.attrs['layer']}"
    for row, (values, z) in enumerate(zip((before, after), heights, strict=True), 1):
        shared = {"z": z, "colorscale": MAGNITUDE}
        figure.add_surface(
            **shared,
            cmin=0,
            cmax=top,
            customdata=values,
            hovertext=text,
            hovertemplate=f"{layer}, channel %{{x}}<br>token %{{hovertext}}<br>magnitude %{{customdata:.3g}}<extra></extra>",
            showscale=row == 1,
            colorbar=bar,
            row=row,
            col=1,
        )
        if heatmap:
            figure.add_heatmap(
                **shared,
                zmin=0,
                zmax=top,
                customdata=np.stack([heads, values], -1),
                text=text,
                hovertemplate=f"{layer}, {channel_hover(head_dim, 'customdata[0]')}<br>token %{{text}}"
                "<br>magnitude %{customdata[1]:.3g}<extra></extra>",
                showscale=False,
                row=row,
                col=2,
            )
            head_borders(figure, count, head_dim, row=row, col=2)
            figure.update_xaxes(title_text="channel" if row == 2 else None, showgrid=False, row=row, col=2)
            figure.update_yaxes(title_text="token", autorange="reversed", showgrid=False, row=row, col=2)
            panel_title(figure, titles[row - 1], row=row, col=2)
    scene = {
        "xaxis": {"title": {"text": "channel"}},
        "yaxis": {"title": {"text": "token"}},
        "zaxis": {
            "title": {"text": ""},  # that of the colour bar
            "range": [0, top],
            # Without 0, which would lie on that of the channels.
            "tickvals": bar["tickvals"][1:],
            "ticktext": bar["ticktext"][1:],
        },
        "camera": {"eye": {"x": 1.9, "y": -2.25, "z": 1.25}, "center": {"x": 0, "y": 0, "z": -0.1}},
        "aspectratio": {"x": 1.4, "y": 1, "z": 0.6},
    }
    figure.update_layout(scene=scene, scene2=scene)
    heading = f"{SITE_NAMES[stored.attrs['site']]}, layer {stored.attrs['layer']}"
    return finish(figure, 720, title={"text": heading, "x": 0, "xref": "paper", "font": {"size": 13}}, margin={"t": 60})


def _ticks(top: float) -> list[float]:
    """Magnitudes that lie apart under ``log10(1 + magnitude)``: powers of ten, and what lies between if there are few."""
    powers = [10.0**power for power in range(math.floor(math.log10(top)) + 1)]
    between = [v for v in (0.5, 1, 2, 5, 10, 20, 50) if v <= top]
    return [0.0, *(powers if len(powers) > 2 else between or [float(f"{top / 2:.1g}")])]
