"""A failure mode, the evidence for it, and how sure it is."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import ACCENT, INK, MUTED, PLAIN, UNDETERMINED, finish, panel_title, percent, wrapped

#: Modes that have a column even where no evidence speaks for them.
COLUMNS = ("outlier-crushes-safety", "outlier-as-safety", "multi-layer dilution", "robust")
#: Modes have a bar from this probability on: less is printed as 0 %.
LEAST = 0.005


@figure("mode", "mode_card")
def mode_card(mode: Plottable) -> go.Figure:
    """Which evidence speaks for which mode, and how likely each mode is.

    How to read it: in the upper panel each row is a piece of evidence. A full dot means that it speaks for the mode of that
    column, a large dot that the mode was decided by it. Rows without dots speak for none. In the lower panel bars are the
    posterior probability of each mode, and diamonds the share of moved thresholds under which it is named: a mode is named
    if its bar reaches the dotted line, and firm if both are near 100 %.

    Parameters
    ----------
    mode : Mode
        ``name``, ``value`` and ``decisive`` over ``finding``, ``speaks_for`` over (finding, mode), ``share`` over
        (basis, mode); in ``meta`` also ``name`` and ``sure``.

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows: evidence by mode, and share by mode.
    """
    data, named = mode.data, str(mode.meta["name"])
    speaks = data.speaks_for.transpose("finding", "mode").values.astype(bool)
    modes = [str(name) for name in data.mode.values]
    at = [n for n, name in enumerate(modes) if name in COLUMNS or speaks[:, n].any()]
    columns = [modes[n] for n in at]
    share = data.share.transpose("basis", "mode")
    found = [n for n in range(len(modes)) if (share.values[:, n] >= LEAST).any()]
    names = [modes[n] for n in found]
    rows, bars = max(1, data.sizes["finding"]), max(6, len(names))
    labels = [wrapped(f"{name}: {value}", 62) for name, value in zip(data.name.values, data.value.values, strict=True)]
    tall = 4 + 15 * max([2, *(label.count("<br>") + 1 for label in labels)])
    height = 168 + tall * rows + 22 * bars
    # A heading and the names of modes, in two lines, take so many pixels of what the margins leave.
    spacing = 76 / (height - 112)
    figure = make_subplots(rows=2, cols=1, row_heights=[tall * rows, 22 * bars], vertical_spacing=spacing)
    panel_title(figure, f"Evidence: {named}", row=1)
    figure.add_scatter(  # every cell, so that rows that decide nothing are there too
        x=[name for _ in labels for name in columns],
        y=[label for label in labels for _ in columns],
        mode="markers",
        marker={"size": 7, "color": "white", "line": {"color": UNDETERMINED, "width": 1}},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    dots = [(modes[column], int(row)) for row, column in np.argwhere(speaks)]
    figure.add_scatter(
        x=[name for name, _ in dots],
        y=[labels[row] for _, row in dots],
        mode="markers",
        marker={
            "size": [20 if data.decisive.values[row] else 11 for _, row in dots],
            "color": [ACCENT if name == named else PLAIN for name, _ in dots],
        },
        hovertemplate="%{y}<br>speaks for %{x}<extra></extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    names_in_lines = [name.replace(" ", "<br>") if " " in name else name.replace("-", "-<br>", 1) for name in columns]
    figure.update_xaxes(
        categoryarray=columns,
        tickvals=columns,
        ticktext=names_in_lines,
        tickangle=0,
        showgrid=False,
        row=1,
        col=1,
    )
    panel_title(figure, "How sure it is", row=2)
    posterior, moved = (share.sel(basis=basis).values[found] for basis in ("posterior", "thresholds"))
    figure.add_bar(
        x=posterior,
        y=names,
        orientation="h",
        name="posterior probability",
        marker_color=[ACCENT if name == named else PLAIN for name in names],
        text=[percent(value) for value in posterior],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: posterior probability %{x:.0%}<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_scatter(
        x=moved,
        y=names,
        mode="markers",
        name="named under moved thresholds",
        marker={"symbol": "diamond", "size": 10, "color": INK},
        hovertemplate="%{y}: named under %{x:.0%} of the moved thresholds<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_vline(x=float(mode.meta["sure"]), line={"color": MUTED, "width": 1, "dash": "dot"}, row=2, col=1)
    figure.update_xaxes(
        tickformat=".0%",
        range=[0, 1.1],
        row=2,
        col=1,
        title={"text": "probability; share of moved thresholds", "font": {"color": MUTED}},
    )
    figure.update_yaxes(autorange="reversed", dtick=1, row=2, col=1)  # or some names are left out
    figure.update_layout(legend={"y": 0, "yanchor": "bottom"})
    return finish(figure, height)
