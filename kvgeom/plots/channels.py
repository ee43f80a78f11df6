"""Where, among a layer's channels, magnitude lies and where the class difference lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.outliers import outlier_border
from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.sensitivity import channels_of
from kvgeom.plots.theme import (
    HEAD_COLORS,
    HEAD_SYMBOLS,
    MUTED,
    SITE_NAMES,
    channel_names,
    finish,
    head_borders,
    log_axis,
    panel_title,
    say,
)

if TYPE_CHECKING:
    import xarray as xr


@figure("sensitivity", "channel_loading")
def channel_loading(sensitivity: Plottable, layer: int, site: str = "k") -> go.Figure:
    """Channel magnitude against the share of the class difference at one layer and site.

    How to read it: on the left every channel has two bars: upwards its magnitude (root mean square of the stored values),
    downwards its share of the squared class difference. On the right each channel is a point: outliers are to the right of the
    dotted line, channels with more than an even share above the dashed line. If tall lower bars are elsewhere than tall upper
    ones, outliers set the scale and the classes differ in other channels. Where both are in the same channels nothing follows:
    what is scaled up differs by more, whether or not the model reads it. Whether outliers carry what is lost or crush it
    is measured by :func:`kvgeom.geometry.channel_damage.channel_damage`. Colours and dotted lines separate KV heads.

    Parameters
    ----------
    sensitivity : Sensitivity
        Per channel; in ``meta`` also ``kv_heads`` and ``outlier_factor``: a channel is an outlier if its magnitude is so
        many times that of the median channel.
    layer : int
    site : {"k", "v", "resid"}

    Returns
    -------
    plotly.graph_objects.Figure
        Two bar panels that share the channel axis, and a scatter panel.
    """
    channels = channels_of(sensitivity.data, site).sel(layer=layer)
    magnitude, loading = (channels[name].values.astype(float) for name in ("magnitude", "loading"))
    count = len(magnitude)
    known = _has_direction(sensitivity.data, layer, site)
    heads = 1 if site == "resid" else int(sensitivity.meta["kv_heads"])
    head_dim = None if site == "resid" else count // heads
    texts = _hover(channels, layer, head_dim)
    name = SITE_NAMES.get(site, site)
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        column_widths=[0.6, 0.4],
        shared_xaxes=False,
        vertical_spacing=0.03,
        horizontal_spacing=0.1,
    )
    panel_title(figure, f"Along the channels of layer {layer}, {name}", row=1, col=1)
    panel_title(figure, "Do the classes differ in large channels?", row=1, col=2)
    for head, at in enumerate(np.arange(count).reshape(heads, -1)):
        color = HEAD_COLORS[head % len(HEAD_COLORS)]
        label = f"KV head {head}" if site != "resid" else "residual stream"
        shared = {"legendgroup": label, "name": label, "customdata": texts[at]}
        for row, values in ((1, magnitude), (2, loading)):
            if row == 2 and not known:
                continue
            figure.add_bar(
                x=at, y=values[at], marker={"color": color, "line_width": 0}, showlegend=False,
                hovertemplate="%{customdata}<extra></extra>", row=row, col=1, **shared,
            )  # fmt: skip
        if known:
            figure.add_scatter(
                x=magnitude[at],
                y=loading[at],
                mode="markers",
                marker={
                    "color": color,
                    "size": 7,
                    "opacity": 0.75,
                    "symbol": HEAD_SYMBOLS[head // len(HEAD_COLORS) % len(HEAD_SYMBOLS)],
                    "line": {"width": 0.5, "color": "white"},
                },
                hovertemplate="%{customdata}<extra></extra>",
                showlegend=site != "resid",
                row=1,
                col=2,
                **shared,
            )
    for row in (1, 2):
        head_borders(figure, count, head_dim, row=row)
    if known:
        _guides(figure, magnitude, float(sensitivity.meta["outlier_factor"]))
    else:
        reason = str(sensitivity.data.reason.sel(layer=layer, site=site).item())
        for row, col in ((2, 1), (1, 2)):
            say(figure, f"no safety direction here: {reason}", row=row, col=col)
    figure.update_xaxes(range=[-1, count], showgrid=False, row=1, col=1, showticklabels=False, ticks="")
    figure.update_xaxes(range=[-1, count], showgrid=False, title_text="channel", row=2, col=1)
    figure.update_yaxes(title_text="magnitude (rms)", rangemode="tozero", row=1, col=1)
    top = float(np.nanmax(loading)) if known else 1.0
    figure.update_yaxes(title_text="share", tickformat=_ticks(top), range=[1.08 * top, 0], row=2, col=1)
    figure.update_xaxes(**log_axis(magnitude), title_text="magnitude (rms, log)", row=1, col=2)
    figure.update_yaxes(
        title_text="share of the class difference", tickformat=_ticks(top), range=[-0.03 * top, 1.2 * top], row=1, col=2
    )
    return finish(figure, 470, barmode="overlay", bargap=0.1)


def _ticks(top: float) -> str:
    return ".0%" if top > 0.05 else ".1%"


def _guides(figure: go.Figure, magnitude: np.ndarray, outlier_factor: float) -> None:
    border = outlier_border(magnitude, outlier_factor).item()
    if border > 0:
        figure.add_vline(x=border, line={"color": MUTED, "width": 1, "dash": "dot"}, row=1, col=2)
    figure.add_hline(y=1 / len(magnitude), line={"color": MUTED, "width": 1, "dash": "dash"}, row=1, col=2)
    corners = (("difference outside<br>the outliers", 0.02, "left"), ("difference in<br>the outliers", 0.98, "right"))
    for text, x, anchor in corners:
        figure.add_annotation(
            text=text, xref="x domain", yref="y domain", x=x, y=0.99, xanchor=anchor, yanchor="top",
            align=anchor, showarrow=False, font={"size": 11, "color": MUTED}, row=1, col=2,
        )  # fmt: skip


def _has_direction(data: xr.Dataset, layer: int, site: str) -> bool:
    one = data.sel(layer=layer, site=site)
    loading = channels_of(data, site).sel(layer=layer).loading.values
    return str(one.status.item()) != "undefined" and bool(np.isfinite(loading).all())


def _hover(channels: xr.Dataset, layer: int, head_dim: int | None) -> np.ndarray:
    """Text for every channel."""
    names = channel_names(channels.sizes["channel"], head_dim)
    columns = (channels[name].values for name in ("magnitude", "noise", "loading", "ratio"))
    return np.array(
        [
            f"<b>layer {layer}, {name}</b><br>magnitude {magnitude:.3g}, noise {noise:.3g} (rms)<br>share of the class difference {share:.2%}"
            + (f"<br>ratio {ratio:,.3g}" if np.isfinite(ratio) else "<br>ratio undefined")
            for name, magnitude, noise, share, ratio in zip(names, *columns, strict=True)
        ],
        dtype=object,
    )
