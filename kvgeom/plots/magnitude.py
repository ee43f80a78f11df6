"""What a layer stores, token by channel, before and after rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.sensitivity import SITE_NAMES
from kvgeom.plots.theme import INK, finish, plain

if TYPE_CHECKING:
    import xarray as xr

#: Sequential data: dark is large.
MAGNITUDE = "Blues"


def magnitude_surface(stored: xr.Dataset, *, heatmap: bool = True) -> go.Figure:
    """Magnitudes of one prompt's stored vectors before and after rounding, as surfaces beside heat maps.

    How to read it: ridges along the token axis are outlier channels: the same channel is large at every token, and it
    sets the step of whatever shares its scale. After rounding, everything lower than half a step is flat zero: what
    is missing in the lower row is what the cache has forgotten. Dotted lines in the heat maps separate KV heads. Both
    rows have the same scale; turn the surfaces with the mouse.

    Parameters
    ----------
    stored : Dataset
        From :func:`kvgeom.geometry.channels.stored`.
    heatmap : bool
        False leaves the heat maps out.

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
    titles = ("before rounding", f"after {plain(stored.attrs['scheme'])}: {zero:.0%} of the entries are 0")
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
    ticks = [v for v in (0, 1, 10, 100, 1000) if np.log10(1 + v) <= top]
    bar = {
        "title": {"text": "magnitude"},
        "tickvals": [np.log10(1 + v) for v in ticks],
        "ticktext": [str(v) for v in ticks],
        "thickness": 12,
        "outlinewidth": 0,
    }
    size = before.shape[1] // int(stored.attrs["kv_heads"]) if stored.attrs["site"] != "resid" else before.shape[1]
    for row, (values, z) in enumerate(zip((before, after), heights, strict=True), 1):
        shared = {"z": z, "colorscale": MAGNITUDE, "customdata": values}
        hover = "channel %{x}, token %{text}<br>magnitude %{customdata:.3g}<extra></extra>"
        text = np.array([[token] * z.shape[1] for token in tokens], dtype=object)
        figure.add_surface(
            **shared,
            cmin=0,
            cmax=top,
            hovertext=text,
            hovertemplate=hover.replace("%{text}", "%{hovertext}"),
            showscale=row == 1,
            colorbar=bar,
            row=row,
            col=1,
        )
        if heatmap:
            figure.add_heatmap(
                **shared, zmin=0, zmax=top, text=text, hovertemplate=hover, showscale=False, row=row, col=2
            )
            for border in range(size, z.shape[1], size):
                # By name of the axes: a line by row and column would be tried on the surfaces too.
                axis = "" if row == 1 else "2"
                figure.add_shape(
                    type="line", x0=border - 0.5, x1=border - 0.5, y0=0, y1=1, xref=f"x{axis}", yref=f"y{axis} domain",
                    line={"color": INK, "width": 1, "dash": "dot"},
                )  # fmt: skip
            figure.update_xaxes(title_text="channel" if row == 2 else None, showgrid=False, row=row, col=2)
            figure.update_yaxes(title_text="token", autorange="reversed", showgrid=False, row=row, col=2)
            figure.add_annotation(
                text=f"<b>{titles[row - 1]}</b>", xref="x domain", yref="y domain", x=0, y=1, yshift=4,
                xanchor="left", yanchor="bottom", showarrow=False, font={"size": 13}, row=row, col=2,
            )  # fmt: skip
    scene = {
        "xaxis": {"title": {"text": "channel"}},
        "yaxis": {"title": {"text": "token"}},
        "zaxis": {
            "title": {"text": "magnitude"},
            "range": [0, top],
            "tickvals": bar["tickvals"],
            "ticktext": bar["ticktext"],
        },
        "camera": {"eye": {"x": 1.5, "y": -1.5, "z": 0.9}},
        "aspectratio": {"x": 1.4, "y": 1, "z": 0.6},
    }
    figure.update_layout(scene=scene, scene2=scene)
    heading = f"{SITE_NAMES[stored.attrs['site']]}, layer {stored.attrs['layer']}"
    return finish(figure, 720, title={"text": heading, "x": 0, "font": {"size": 13}}, margin={"t": 60})
