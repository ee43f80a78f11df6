"""Per-channel reduction (PCR) against the published classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import INK, MUTED, UNDETERMINED, finish, percent, wrapped

#: The left end of the axis; the row says how far an interval reaches beyond it.
CUT = -1.0
#: Published classes with their shades; their borders come with the result.
CLASSES = (("outlier-as-safety", "#f7e3dc"), ("mixed", "#f3f0e4"), ("outlier-crushes-safety", "#dfe9f2"))


@figure("pcr", "pcr_interval")
def pcr_interval(pcr: Plottable, *others: Plottable, names: Sequence[str] | None = None) -> go.Figure:
    """PCR with its 95 % interval on the published classes, one row for each.

    How to read it: at 100 % per-channel scales rescue every refusal that per-tensor rounding of the layer loses, at 0 % they
    rescue none, and below 0 they lose more. A class is determined only if the whole interval lies in one shade; otherwise
    the row is grey and says why. The axis is cut at -100 %: an interval that reaches further ends in an arrow, and the row
    says how far it goes.

    Parameters
    ----------
    pcr, *others : PCR
        ``value``, ``low`` and ``high``; in ``meta`` also ``thresholds``, the borders of the classes.
    names : sequence of str, optional
        Names of the rows, for instance two placements.

    Returns
    -------
    plotly.graph_objects.Figure
        x: PCR as a share, at most 1. y: row number, the first on top.
    """
    rows = (pcr, *others)
    names = list(names or map(_name, rows))
    ends = [float(found.data[end]) for found in rows for end in ("low", "value")]
    least = min([0.0, *(end for end in ends if math.isfinite(end))])
    left = max(least, CUT) - 0.04
    figure = go.Figure()
    edges = [left, *pcr.meta["thresholds"], 1.0]
    for (name, shade), start, end in zip(CLASSES, edges[:-1], edges[1:], strict=True):
        figure.add_vrect(x0=start, x1=end, fillcolor=shade, line_width=0, layer="below")
        figure.add_annotation(
            x=(max(start, 0.0) + end) / 2, y=1, yref="paper", yanchor="bottom", text=name,
            showarrow=False, font={"size": 12, "color": MUTED},
        )  # fmt: skip
    for row, found in enumerate(rows):
        _row(figure, row, found, names[row])
    figure.update_xaxes(
        title_text="PCR: share of the lost refusals that per-channel scales rescue"
        + (" (axis cut at −100 %)" if least < CUT else ""),
        tickformat=".0%",
        range=[left, 1.03],
        dtick=0.1 if left > -0.3 else 0.2,
        tick0=0,
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[wrapped(name, 22) for name in names],
        range=[len(rows) - 0.4, -0.45],
        showgrid=False,
        ticks="",
    )
    return finish(figure, 140 + 84 * len(rows), showlegend=False, margin={"l": 130, "r": 20, "t": 58, "b": 50})


def _name(found: Plottable) -> str:
    return "PCR" if found.meta["layer"] is None else f"layer {found.meta['layer']}, {found.meta['bits']}-bit"


def _row(figure: go.Figure, row: int, found: Plottable, name: str) -> None:
    reason = str(found.meta["reason"])
    low, value, high = (float(found.data[end]) for end in ("low", "value", "high"))
    if not math.isfinite(value):
        figure.add_annotation(
            x=0.5, xref="paper", y=row, text=wrapped(f"undetermined: {reason}", 110),
            showarrow=False, font={"color": MUTED, "size": 13},
        )  # fmt: skip
        return
    decided = found.meta["status"] == "determined"
    color = INK if decided else "#8c96a0"
    shown = [max(end, CUT) for end in (low, value, high)]
    figure.add_scatter(
        x=[shown[0], shown[2]],
        y=[row, row],
        mode="lines+markers",
        line={"color": color, "width": 4},
        marker={
            "symbol": ["triangle-left" if low < CUT else "line-ns", "line-ns"],
            "size": 12,
            "color": color,
            "line": {"color": color, "width": 2},
        },
        hoverinfo="skip",
        cliponaxis=False,
    )
    figure.add_scatter(
        x=[shown[1]],
        y=[row],
        name=name,
        mode="markers+text",
        marker={"size": 14, "color": INK if decided else UNDETERMINED, "line": {"color": color, "width": 2}},
        text=[f"<b>{percent(value)}</b>" + ("" if decided else " undetermined")],
        textposition="top center" if 0.08 < shown[1] < 0.92 else "top right" if shown[1] <= 0.08 else "top left",
        textfont={"color": INK if decided else MUTED, "size": 13},
        hovertemplate=f"PCR {percent(value)}, 95 % interval {percent(low)} to {percent(high)}<extra></extra>",
        cliponaxis=False,
    )
    if low < CUT:
        reason += f" (the interval reaches {percent(low)}, beyond the axis)"
    figure.add_annotation(
        x=0.01, xref="paper", xanchor="left", y=row + 0.16, yanchor="top", align="left",
        text=wrapped(reason, 130), showarrow=False, font={"color": MUTED, "size": 11},
    )  # fmt: skip
