"""Where, among a layer's channels, magnitude lies and where safety lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import figure
from kvgeom.plots.sensitivity import SITE_NAMES
from kvgeom.plots.theme import HEAD_COLORS, HEAD_SYMBOLS, MUTED, finish, log_axis, panel_title, percent, say

if TYPE_CHECKING:
    import xarray as xr

    from kvgeom.geometry.sensitivity import Sensitivity

#: A channel is called an outlier when its root mean square is so many times the median channel's.
OUTLIER = 5.0


@dataclass(frozen=True)
class OutlierShare:
    """What the outlier channels of a layer hold.

    Attributes
    ----------
    outliers, channels : int
    energy : float
        Share of the mean square of the stored vectors that lies in them.
    loading : float
        Share of the safety direction that lies in them; NaN where there is no direction.
    """

    outliers: int
    channels: int
    energy: float
    loading: float

    def __str__(self) -> str:
        if self.outliers == 0:
            return f"No channel is an outlier (root mean square above {OUTLIER:g} × the median channel)"
        held = "" if not np.isfinite(self.loading) else f" and {percent(self.loading)} of the safety direction"
        these = f"{self.outliers} outlier channel{'s' if self.outliers > 1 else ''} of {self.channels}"
        return f"{these} hold{'s' if self.outliers == 1 else ''} {percent(self.energy)} of the energy{held}"


def outlier_share(sensitivity: Sensitivity, layer: int, site: str = "k") -> OutlierShare:
    """Count the outlier channels of one layer, and how much energy and how much of safety they hold."""
    channels = sensitivity.channels(site).sel(layer=layer)
    magnitude, loading = (channels[name].values.astype(float) for name in ("magnitude", "loading"))
    above = magnitude > OUTLIER * np.median(magnitude)
    energy = float((magnitude[above] ** 2).sum() / max((magnitude**2).sum(), 1e-30))
    known = _has_direction(sensitivity, layer, site)
    return OutlierShare(int(above.sum()), len(above), energy, float(loading[above].sum()) if known else float("nan"))


@figure("sensitivity", "channel_loading")
def channel_loading(sensitivity: Sensitivity, layer: int, site: str = "k") -> go.Figure:
    """Channel magnitude against safety loading at one layer and site.

    How to read it: on the left every channel stands twice, its magnitude (root mean square of what is stored)
    upwards and its share of the safety direction downwards; the KV heads have their colours and dotted lines
    between them. If the tall bars above have tall bars below them, the outlier channels carry safety; if the lower
    bars stand elsewhere, the outliers only set the scale. On the right each channel is a point: to the right of the
    dotted line are outliers, above the dashed line channels with more than an even share of safety.

    Parameters
    ----------
    sensitivity : Sensitivity
    layer : int
    site : {"k", "v", "resid"}

    Returns
    -------
    plotly.graph_objects.Figure
        Two bar panels that share the channel axis, and a scatter panel.
    """
    channels = sensitivity.channels(site).sel(layer=layer)
    magnitude, loading = (channels[name].values.astype(float) for name in ("magnitude", "loading"))
    count = len(magnitude)
    known = _has_direction(sensitivity, layer, site)
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
    panel_title(figure, "Do large channels carry safety?", row=1, col=2)
    for head, at in enumerate(_heads(sensitivity, site, count)):
        color = HEAD_COLORS[head % len(HEAD_COLORS)]
        label = f"KV head {head}" if site != "resid" else "residual stream"
        shared = {"legendgroup": label, "name": label, "customdata": _hover(channels, at, layer, site, head)}
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
        if head:
            for row in (1, 2):
                figure.add_vline(x=at[0] - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, row=row, col=1)
    if known:
        _guides(figure, magnitude)
    else:
        reason = str(sensitivity.data.reason.sel(layer=layer, site=site).item())
        for row, col in ((2, 1), (1, 2)):
            say(figure, f"no safety direction here: {reason}", row=row, col=col)
    figure.update_xaxes(range=[-1, count], showgrid=False, row=1, col=1, showticklabels=False, ticks="")
    figure.update_xaxes(range=[-1, count], showgrid=False, title_text="channel", row=2, col=1)
    figure.update_yaxes(title_text="magnitude (rms)", rangemode="tozero", row=1, col=1)
    top = float(np.nanmax(loading)) if known else 1.0
    figure.update_yaxes(title_text="safety share", tickformat=_ticks(top), range=[1.08 * top, 0], row=2, col=1)
    figure.update_xaxes(**log_axis(magnitude), title_text="magnitude (rms, log)", row=1, col=2)
    figure.update_yaxes(
        title_text="share of the safety direction", tickformat=_ticks(top), range=[-0.03 * top, 1.2 * top], row=1, col=2
    )
    return finish(figure, 470, barmode="overlay", bargap=0.1)


def _ticks(top: float) -> str:
    return ".0%" if top > 0.05 else ".1%"


def _guides(figure: go.Figure, magnitude: np.ndarray) -> None:
    border = OUTLIER * float(np.median(magnitude))
    if border > 0:
        figure.add_vline(x=border, line={"color": MUTED, "width": 1, "dash": "dot"}, row=1, col=2)
    figure.add_hline(y=1 / len(magnitude), line={"color": MUTED, "width": 1, "dash": "dash"}, row=1, col=2)
    corners = (("safety outside<br>the outliers", 0.02, "left"), ("safety in<br>the outliers", 0.98, "right"))
    for text, x, anchor in corners:
        figure.add_annotation(
            text=text, xref="x domain", yref="y domain", x=x, y=0.99, xanchor=anchor, yanchor="top",
            align=anchor, showarrow=False, font={"size": 11, "color": MUTED}, row=1, col=2,
        )  # fmt: skip


def _has_direction(sensitivity: Sensitivity, layer: int, site: str) -> bool:
    one = sensitivity.data.sel(layer=layer, site=site)
    loading = sensitivity.channels(site).sel(layer=layer).loading.values
    return str(one.status.item()) != "undefined" and bool(np.isfinite(loading).all())


def _heads(sensitivity: Sensitivity, site: str, count: int) -> list[np.ndarray]:
    """Channel numbers of each KV head; the residual stream has no heads."""
    heads = int(sensitivity.meta["kv_heads"]) if site != "resid" else 1
    return list(np.arange(count).reshape(heads, -1))


def _hover(channels: xr.Dataset, at: np.ndarray, layer: int, site: str, head: int) -> list[str]:
    picked = channels.isel(channel=at)
    where = f"KV head {head}, " if site != "resid" else ""
    return [
        f"<b>layer {layer}, {where}channel {channel}</b>"
        + (f" ({channel - at[0]} in its head)" if where else "")
        + f"<br>magnitude {float(size):.3g}, noise {float(noise):.3g} (rms)<br>safety share {float(share):.2%}"
        + (f"<br>ratio {float(ratio):,.3g}" if np.isfinite(ratio) else "<br>ratio undefined")
        for channel, size, noise, share, ratio in zip(
            at, picked.magnitude.values, picked.noise.values, picked.loading.values, picked.ratio.values, strict=True
        )
    ]
