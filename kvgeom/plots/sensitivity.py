"""The noise-sensitivity ratio over layers and sites."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    DIVERGING,
    HEAD_COLORS,
    INK,
    LINE,
    MUTED,
    PLAIN,
    SITE_NAMES,
    UNDETERMINED,
    channel_hover,
    colour_bar,
    finish,
    head_borders,
    head_numbers,
    layer_axis,
    layer_ticks,
    log_axis,
    mark_undefined,
    panel_title,
    plain,
    positive,
    say,
    short,
    symmetric_range,
)

if TYPE_CHECKING:
    import xarray as xr

#: Decades at which colours end: a huge ratio, mostly one of a vanishing signal, must not pale all others.
DECADES = 3.0


@figure("sensitivity", "ratio_map")
def ratio_map(sensitivity: Plottable) -> go.Figure:
    """Map of the ratio, layer by site.

    How to read it: the colour is the logarithm of the ratio: white at 1 (the safety subspace is as exposed to rounding as the
    whole space), red above (more vulnerable), blue below; it ends at 1000. Grey cells are undefined, and their hover text
    says why. A ring marks a layer where the difference between harmful and harmless requests cannot be told from chance: the
    ratio has no value there, and the cell shows its lower bound.

    Parameters
    ----------
    sensitivity : Sensitivity

    Returns
    -------
    plotly.graph_objects.Figure
        A heat map of log10(ratio), and one of the undefined cells; x: layer, y: site number, keys on top.
    """
    data = sensitivity.data
    sites = [str(site) for site in data.site.values]
    layers = data.layer.values.astype(int)
    status = data.status.transpose("site", "layer").values.astype(str)
    ratio, low = (data[name].transpose("site", "layer").values.astype(float) for name in ("ratio", "ratio_low"))
    ratio = np.where(status == "weak", low, ratio)
    log_ratio = np.log10(positive(np.where(status == "undefined", np.nan, ratio)))
    defined = np.isfinite(log_ratio)
    reach = min(symmetric_range(log_ratio)[1], DECADES)
    rows, hover = np.arange(len(sites)), _hover(data, sites)
    # Few enough layers, and a cell is wide enough for its number.
    written = [[("≥" if weak else "") + short(r) if ok and len(layers) <= 36 else "" for r, ok, weak in zip(*row, strict=True)]
               for row in zip(ratio, defined, status == "weak", strict=True)]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            x=layers,
            y=rows,
            z=log_ratio,
            zmin=-reach,
            zmax=reach,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            text=written,
            texttemplate="%{text}",
            textfont={"size": 10 if len(layers) <= 28 else 9},
            hoverongaps=False,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            name="ratio",
            colorbar=colour_bar("ratio", **_decades(log_ratio, reach), len=1.15),
        )
    )
    _undefined(figure, layers, rows, defined, hover)
    at, of = np.nonzero((status == "weak") & defined)
    figure.add_scatter(
        x=layers[of],
        y=rows[at] - 0.34,
        mode="markers",
        name="lower bound",
        marker={
            "symbol": "circle-open",
            "size": 6 if len(layers) <= 80 else 4,
            # On the darkest cells ink would not be seen.
            "color": np.where(np.abs(log_ratio[at, of]) > 0.7 * reach, "white", INK),
            "line": {"width": 1.2},
        },
        hoverinfo="skip",
        showlegend=False,
    )
    if len(at):
        _legend(figure, "lower bound (no signal beyond chance)", {"symbol": "circle-open", "size": 8, "color": INK})
    figure.update_xaxes(**layer_axis(layers))
    figure.update_xaxes(range=[-0.5, layers.max() + 0.5], showline=False, ticks="")
    figure.update_yaxes(
        tickvals=rows,
        ticktext=[SITE_NAMES.get(site, site) for site in sites],
        range=[len(sites) - 0.5, -0.5],
        showgrid=False,
        showline=False,
        ticks="",
    )
    return finish(figure, 130 + 46 * len(sites), margin={"l": 70, "r": 10, "t": 34, "b": 46})


def _undefined(figure: go.Figure, layers: np.ndarray, rows: np.ndarray, defined: np.ndarray, hover: np.ndarray) -> None:
    figure.add_heatmap(
        x=layers,
        y=rows,
        z=np.where(defined, np.nan, 1.0),
        colorscale=[[0, UNDETERMINED], [1, UNDETERMINED]],
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        name="undefined",
    )
    if not defined.all():
        _legend(figure, "undefined", {"symbol": "square", "size": 10, "color": UNDETERMINED})


def _legend(figure: go.Figure, name: str, marker: dict[str, object]) -> None:
    """An entry of the legend that stands for cells of the map."""
    figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)


def _decades(log_ratio: np.ndarray, reach: float) -> dict[str, object]:
    """Ticks of a colour bar at powers of ten, at most seven; the outermost say whether values lie beyond."""
    step = max(1, math.ceil(math.floor(reach) / 3))
    count = int(reach // step)
    exponents = [step * n for n in range(-count, count + 1)]
    texts = [f"{10.0**d:,g}" if abs(d) <= DECADES else f"10<sup>{d}</sup>" for d in exponents]
    if np.nanmax(np.abs(log_ratio), initial=0) > reach:
        texts = [f"≤ {texts[0]}", *texts[1:-1], f"≥ {texts[-1]}"]
    return {"tickvals": exponents, "ticktext": texts}


def _hover(data: xr.Dataset, sites: list[str]) -> np.ndarray:
    """Text for every cell ``[site, layer]``."""

    def cell(site: str, layer: int) -> str:
        one = data.sel(site=site, layer=layer)
        head = f"<b>{SITE_NAMES.get(site, site)}, layer {layer}</b>"
        status = str(one.status.item())
        if status == "undefined":
            return f"{head}<br>undefined: {plain(one.reason.item())}"
        separation = f"<br>separation (AUROC) {float(one.separation):.2f}"
        if status == "weak":
            low = float(one.ratio_low)
            bound = f"ratio at least {low:,.3g}" if np.isfinite(low) else "no bound on the ratio"
            return f"{head}<br>{bound}{separation}<br>weak: {plain(one.reason.item())}"
        high = float(one.ratio_high)
        upper = f"to {high:,.3g}" if np.isfinite(high) else "without upper limit"
        return (
            f"{head}<br>ratio {float(one.ratio):,.3g} (95 %: {float(one.ratio_low):,.3g} {upper})"
            f"<br>= signal gap {float(one.signal_gap):,.3g} × noise alignment {float(one.noise_alignment):.2f}"
            f"<br>the same difference in random directions: {float(one.null_low):,.3g} to {float(one.null_high):,.3g}{separation}"
        )

    return np.array([[cell(site, int(layer)) for layer in data.layer.values] for site in sites], dtype=object)


@figure("sensitivity", "ratio_against_null")
def ratio_against_null(sensitivity: Plottable, site: str = "k") -> go.Figure:
    """The ratio of one site against both nulls, and how rounding noise is aligned with the safety subspace.

    How to read it: in the upper panel points have 95 % intervals; an arrow is a lower bound, where the class difference cannot
    be told from chance. The grey band is the ratio that the same class difference would have in 95 % of all directions, the
    dashed lines the same in directions in which requests differ by chance: a point above them is one that noise is aimed at.
    Orange bars are contrasts between harmless requests that differ in one thing: only a point above all of 19 is exposed
    because it is about safety. In the lower panel 1 means that noise falls evenly on all directions. If the ratio is high
    and the alignment near 1, rounding noise is not aimed at safety; the signal is small against the energy that sets the
    scales (signal gap = ratio / alignment).

    Parameters
    ----------
    sensitivity : Sensitivity
    site : {"k", "v", "resid"}

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows that share the layer axis, both logarithmic.
    """
    data = sensitivity.data.sel(site=site)
    layers = data.layer.values.astype(int)
    name = SITE_NAMES.get(site, site)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.13)
    panel_title(figure, f"Ratio of the safety subspace, {name}", row=1)
    panel_title(figure, "Noise alignment", row=2)
    status = data.status.values.astype(str)
    panels = (
        (1, "ratio", "null_low", "null_high", "null_median"),
        (2, "noise_alignment", "alignment_null_low", "alignment_null_high", None),
    )
    for row, variable, low, high, median in panels:
        band_low, band_high = (positive(data[v].values) for v in (low, high))
        # Two lines with the room between them filled; the gaps where there is no null stay open.
        for edge, fill in ((band_low, None), (band_high, "tonexty")):
            figure.add_scatter(
                x=layers, y=edge, mode="lines", line={"width": 0}, fill=fill, fillcolor="rgba(120,130,140,0.22)",
                name="the same difference in random directions, 95 %", showlegend=row == 1 and fill is not None, hoverinfo="skip", row=row, col=1,
            )  # fmt: skip
        if row == 1:
            _contrasts(figure, data, layers)
        if median is not None:
            figure.add_scatter(
                x=layers, y=positive(data[median].values), mode="lines", line={"color": MUTED, "width": 1, "dash": "dot"},
                name="median of random directions", hovertemplate="layer %{x}: median of random directions %{y:,.3g}<extra></extra>",
                row=row, col=1,
            )  # fmt: skip
            for number, limit in enumerate(("dealt_low", "dealt_high")):
                figure.add_scatter(
                    x=layers, y=positive(data[limit].values), mode="lines", line={"color": MUTED, "width": 1, "dash": "dash"},
                    name="in directions of chance, 95 %", legendgroup="dealt", showlegend=number == 0, hoverinfo="skip", row=row, col=1,
                )  # fmt: skip
        shown = (("ok", "circle", name), ("weak", "triangle-up-open", f"{name}, at least"))
        for wanted, symbol, legend in shown[: 2 if row == 1 else 1]:
            chosen = status == wanted
            values = positive(data["ratio_low" if wanted == "weak" else variable].values)[chosen]
            figure.add_scatter(
                x=layers[chosen],
                y=values,
                error_y=_reach(data, chosen, values) if row == 1 and wanted == "ok" else None,
                mode="markers",
                name=legend,
                showlegend=row == 1 and bool(chosen.any()),
                marker={"symbol": symbol, "size": 8, "color": PLAIN, "line": {"width": 1.5, "color": PLAIN}},
                customdata=data.signal_gap.values.astype(float)[chosen],
                hovertemplate=f"{name}, layer %{{x}}: {variable.replace('_', ' ')} %{{y:,.3g}}"
                "<br>signal gap %{customdata:,.3g}<extra></extra>",
                row=row,
                col=1,
            )
        figure.add_hline(y=1, line={"color": LINE, "width": 1}, row=row, col=1)
        bound = data.ratio_low.values if row == 1 else np.full(len(layers), np.nan)
        known = np.isfinite(positive(np.where(status == "weak", bound, data[variable].values))) & (
            status != "undefined"
        )
        if known.any():
            mark_undefined(figure, layers, known, row=row)
        else:
            say(figure, "undefined in every layer", row=row)
    figure.update_xaxes(**{**layer_axis(layers), "title": None})
    figure.update_xaxes(title_text="layer", row=2, col=1)
    for row, axis, title in ((1, "y", "ratio (log)"), (2, "y2", "alignment (log)")):
        drawn = [np.asarray(trace.y, dtype=float) for trace in figure.data if trace.yaxis == axis]
        figure.update_yaxes(**log_axis(1.0, *drawn), title_text=title, row=row, col=1)
    return finish(figure, 460, margin_t=84)  # the legend may take two rows


def _reach(data: xr.Dataset, chosen: np.ndarray, values: np.ndarray) -> dict[str, object]:
    """Error bars; one that has no upper end goes a decade up."""
    low, high = (data[name].values.astype(float)[chosen] for name in ("ratio_low", "ratio_high"))
    above = np.where(np.isfinite(high), high - values, 9 * values)
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": values - low,
        "thickness": 1.2,
        "width": 3,
    }


def _contrasts(figure: go.Figure, data: xr.Dataset, layers: np.ndarray) -> None:
    """A short bar at the ratio of every harmless contrast (null b)."""
    if "contrast_ratio" not in data or data.sizes["contrast"] == 0:
        return
    for number, contrast in enumerate(data.contrast.values):
        figure.add_scatter(
            x=layers,
            y=positive(data.contrast_ratio.sel(contrast=contrast).values),
            mode="markers",
            name="harmless contrasts",
            legendgroup="contrasts",
            showlegend=number == 0,
            marker={"symbol": "line-ew", "size": 9, "line": {"width": 1.8, "color": HEAD_COLORS[1]}},
            hovertemplate=f"layer %{{x}}: {plain(contrast)}, ratio %{{y:,.3g}}<extra></extra>",
            row=1,
            col=1,
        )


@figure("sensitivity", "channel_ratio_map")
def channel_ratio_map(sensitivity: Plottable, site: str = "k") -> go.Figure:
    """Map of the ratio of single channels, layer by channel.

    How to read it: each cell is the ratio of a subspace of one channel. Red channels have more rounding noise for their share
    of the class difference than the space as a whole, white ones as much. A channel in which the classes hardly differ is
    red because it has little signal: compare with :func:`~kvgeom.plots.channels.channel_loading`. In grey cells the class
    difference cannot be told from 0. Dotted lines separate KV heads.

    Parameters
    ----------
    sensitivity : Sensitivity
    site : {"k", "v", "resid"}

    Returns
    -------
    plotly.graph_objects.Figure
        A heat map of log10(ratio); x: channel, y: layer.
    """
    channels = channels_of(sensitivity.data, site).transpose("layer", "channel")
    ratio = channels.ratio.values.astype(float)
    log_ratio = np.log10(positive(ratio))
    reach = min(symmetric_range(log_ratio)[1], 2 * DECADES)
    count = ratio.shape[1]
    head_dim = None if site == "resid" else int(sensitivity.meta["head_dim"])
    heads = head_numbers((len(ratio), count), head_dim)
    figure = make_subplots()
    panel_title(figure, f"Ratio of single channels, {SITE_NAMES[site]}, {plain(sensitivity.meta['scheme'])}")
    figure.add_heatmap(
        x=np.arange(count),
        y=channels.layer.values.astype(int),
        z=log_ratio,
        zmin=-reach,
        zmax=reach,
        colorscale=DIVERGING,
        hoverongaps=False,
        customdata=np.stack([heads, ratio, channels.loading.values, channels.magnitude.values], -1),
        hovertemplate=f"<b>layer %{{y}}, {channel_hover(head_dim, 'customdata[0]')}</b>"
        "<br>ratio %{customdata[1]:,.3g}"
        "<br>safety share %{customdata[2]:.2%}<br>magnitude %{customdata[3]:.3g}<extra></extra>",
        colorbar=colour_bar("ratio", **_decades(log_ratio, reach)),
    )
    head_borders(figure, count, head_dim)
    figure.update_xaxes(title_text="channel", showgrid=False, range=[-0.5, count - 0.5])
    figure.update_yaxes(**layer_ticks(len(ratio)), autorange="reversed")
    figure.update_layout(plot_bgcolor=UNDETERMINED)
    return finish(figure, 160 + 14 * max(8, len(ratio)))


def channels_of(data: xr.Dataset, site: str) -> xr.Dataset:
    """The per-channel variables of one site: ``ratio``, ``magnitude``, ``noise``, ``loading`` over (layer, channel)."""
    prefix = "resid_channel_" if site == "resid" else "channel_"
    names = {f"{prefix}{name}": name for name in ("ratio", "magnitude", "noise", "loading")}
    picked = data[list(names)].rename(names)
    return picked.rename(resid_channel="channel") if site == "resid" else picked.sel(kv=site, drop=True)
