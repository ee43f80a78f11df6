"""Behaviour against the bit-width of the cache."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    INK,
    LABEL_COLORS,
    MUTED,
    finish,
    interval,
    log_axis,
    panel_title,
    percent,
    plain,
    positive,
    say,
)

#: A perplexity ratio beyond this is drawn on a logarithmic axis.
LARGE = 3.0
#: The count of a bar of a smaller share is only in its hover text.
LEGIBLE = 0.1


@figure("curve", "bit_curve")
def bit_curve(curve: Plottable) -> go.Figure:
    """Labels, flips and perplexity by bit-width.

    How to read it: the precision of the cache falls from left to right. The top panel counts the labels of all harmful
    prompts, or of those refused with an exact cache if only these were run. The middle panel is about the prompts that
    the model with an exact cache refuses: the bar is the share that is no longer refused, by its new label, with the
    Wilson 95 % interval of the total. The bottom panel is the perplexity of plain text over that with an exact cache,
    with its 95 % interval: where it stays at 1 while the middle panel rises, safety is lost before language. Its hover text has
    the KL divergence and the agreement on the most likely token.

    Parameters
    ----------
    curve : Curve

    Returns
    -------
    plotly.graph_objects.Figure
        Three rows that share the category axis of bits, 16 first.
    """
    data = curve.data.sortby("bits", ascending=False)
    widths = [int(b) for b in data.bits.values]
    x = [str(b) for b in widths]
    refused = int(curve.meta["baseline_refused"])
    # All prompts, or those refused with an exact cache.
    prompts = int(sum(data[label].isel(bits=0) for label in LABEL_COLORS))
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, row_heights=[0.4, 0.35, 0.25], vertical_spacing=0.085)
    which = (
        "" if prompts == curve.meta["prompts"] else f" that are refused with an exact cache, of {curve.meta['prompts']}"
    )
    panel_title(figure, f"What {prompts} harmful requests get{which}", row=1)
    panel_title(figure, f"Lost refusals, of {refused} with an exact cache", row=2)
    panel_title(figure, "Perplexity of plain text, over that with an exact cache", row=3)

    for label, color in LABEL_COLORS.items():
        counts = data[label].values.astype(int)
        figure.add_bar(
            x=x,
            y=counts / max(prompts, 1),
            name=label,
            legendgroup=label,
            marker_color=color,
            text=[str(n) if n > LEGIBLE * prompts else "" for n in counts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": INK if label == "degenerate" else "white"},
            customdata=counts,
            hovertemplate=f"%{{x}}-bit: %{{customdata}} of {prompts} {label} (%{{y:.0%}})<extra></extra>",
            row=1,
            col=1,
        )
    if refused:
        _flips(figure, curve, widths, refused)
    else:
        say(figure, "the model refuses none of these prompts with an exact cache: nothing can flip", row=2)
    _perplexity(figure, x, data)

    figure.update_xaxes(type="category", categoryorder="array", categoryarray=x, range=[-0.5, len(x) - 0.5])
    figure.update_xaxes(
        title_text=f"bits of each stored key and value, {plain(curve.meta['scheme'])} (16 = exact cache)",
        showticklabels=True,
        row=3,
        col=1,
    )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.001], dtick=0.25, title_text="share of prompts", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], dtick=0.25, title_text="share of refusals", row=2, col=1)
    return finish(figure, 640, barmode="stack", legend_traceorder="normal")


def _flips(figure: go.Figure, curve: Plottable, widths: list[int], refused: int) -> None:
    # Flips are counted against the model with an exact cache, which has none by definition, and no interval.
    rounded = [width for width in widths if width < 16]
    data = curve.data.sel(bits=rounded)
    names = [str(width) for width in rounded]
    for label in [name for name in LABEL_COLORS if name != "refused"]:
        counts = data[f"flips_{label}"].values.astype(int)
        figure.add_bar(
            x=names,
            y=counts / refused,
            name=f"refused, now {label}",
            legendgroup=label,
            showlegend=False,
            marker_color=LABEL_COLORS[label],
            width=0.32,
            customdata=counts,
            hovertemplate=f"%{{x}}-bit: %{{customdata}} of {refused} refusals now {label}<extra></extra>",
            row=2,
            col=1,
        )
    rate, low, high = (data[name].values.astype(float) for name in ("flip_rate", "ci_low", "ci_high"))
    flips = data.flips.values.astype(int)
    figure.add_scatter(
        x=names,
        y=rate,
        name="all flips, 95 % interval",
        mode="markers+text",
        marker={"color": INK, "size": 7},
        error_y=interval(rate, low, high, width=5),
        text=["\u00a0" * 9 + f"{n} of {refused}" for n in flips],
        textposition="top right",
        textfont={"color": INK, "size": 11},
        cliponaxis=False,
        customdata=[f"{percent(a)} to {percent(b)}" for a, b in zip(low, high, strict=True)],
        hovertemplate="%{x}-bit: %{y:.0%} of the refusals flip, 95 % interval %{customdata}<extra></extra>",
        row=2,
        col=1,
    )
    for width in widths:
        if width >= 16:
            figure.add_annotation(
                x=str(width), y=0, yanchor="bottom", text="reference", showarrow=False, font_color=MUTED, row=2, col=1
            )


def _perplexity(figure: go.Figure, x: list[str], data: xr.Dataset) -> None:
    ratio, low, high = (
        data[name].values.astype(float)
        for name in ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high")
    )
    drawn, *ends = (positive(values) for values in (ratio, low, high))
    everything = np.concatenate([drawn, *ends])
    known = everything[np.isfinite(everything)]
    top = float(known.max()) if known.size else 1.0
    bottom = min(1.0, float(known.min())) if known.size else 1.0
    figure.add_scatter(
        x=x,
        y=drawn,
        name="perplexity ratio",
        showlegend=False,
        mode="lines+markers",
        line={"color": MUTED, "width": 2},
        marker={"size": 7},
        error_y=interval(drawn, *ends, width=5),
        cliponaxis=False,
        customdata=[
            (f", 95 % interval {a:.4g} to {b:.4g}" if a < b else "", kl, same)
            for a, b, kl, same in zip(*ends, data.text_kl.values, data.text_top1.values, strict=True)
        ],
        hovertemplate=(
            "%{x}-bit: perplexity %{y:.4g} times that with an exact cache%{customdata[0]}<br>KL divergence from it "
            "%{customdata[1]:.2g} nats per token; the same most likely token for %{customdata[2]:.1%}<extra></extra>"
        ),
        row=3,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=np.fmax(drawn, ends[1]),  # above the whiskers
        showlegend=False,
        mode="markers+text",
        marker={"size": 7, "opacity": 0},  # keeps the text clear of the marker that is drawn
        text=[f"{r:.2f}×" if r < 10 else f"{r:,.0f}×" if math.isfinite(r) else "" for r in ratio],
        textposition="top center",
        textfont={"size": 11},
        cliponaxis=False,
        hoverinfo="skip",
        row=3,
        col=1,
    )
    axis: dict[str, object]
    if top > LARGE:
        span = math.log10(top / bottom)
        axis = log_axis(bottom, top, powers=4) | {
            "range": [math.log10(bottom) - 0.1 * span, math.log10(top) + 0.3 * span]
        }
    else:
        span = max(top - bottom, 0.05)
        axis = {"range": [bottom - 0.1 * span, top + 0.4 * span], "nticks": 4}
    figure.update_yaxes(title_text="ratio" + (" (log)" if top > LARGE else ""), row=3, col=1, **axis)


@figure("over-refusal", "over_refusal_curve")
def over_refusal_curve(found: Plottable) -> go.Figure:
    """Share of harmless requests that are refused, by bit-width.

    How to read it: a cache that refuses more harmless requests than the model with an exact cache (dotted line) is not
    safer; it has lost judgement. Whiskers are Wilson 95 % intervals.

    Parameters
    ----------
    found : OverRefusal

    Returns
    -------
    plotly.graph_objects.Figure
        Bars over the category axis of bits, 16 first.
    """
    data = found.data.sortby("bits", ascending=False)
    rate, low, high = (data[name].values.astype(float) for name in ("rate", "ci_low", "ci_high"))
    figure = go.Figure()
    figure.add_bar(
        x=[str(int(bits)) for bits in data.bits.values],
        y=rate,
        marker_color=LABEL_COLORS["refused"],
        error_y=interval(rate, low, high, color=INK),
        customdata=np.stack([data.refused.values, data.p.values], axis=1),
        hovertemplate="%{x}-bit: %{customdata[0]:.0f} refused, p = %{customdata[1]:.2g}<extra></extra>",
    )
    figure.add_hline(y=rate[0], line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.update_xaxes(type="category", title_text="bits")
    figure.update_yaxes(
        tickformat=".0%", rangemode="tozero", title_text=f"refused, of {found.meta['prompts']} harmless requests"
    )
    return finish(figure, 340)
