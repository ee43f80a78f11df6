"""A failure mode, what speaks for it, and how sure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.diagnosis.taxonomy import Mode, ModeName
from kvgeom.plots.registry import figure
from kvgeom.plots.theme import ACCENT, INK, MUTED, PLAIN, UNDETERMINED, finish, panel_title, percent, wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Modes that evidence can speak for.
SPOKEN: tuple[ModeName, ...] = ("outlier-crushes-safety", "outlier-as-safety", "multi-layer dilution", "robust")


@figure("mode", "mode_card")
def mode_card(mode: Mode) -> go.Figure:
    """Which evidence speaks for which mode, and under how many resamples each mode comes out.

    How to read it: above, a row is a piece of evidence; a full dot says that it speaks for the mode of that column, a
    large one that a rule used it to decide; rows without dots decide nothing. Below, the share of bootstrap samples of
    the prompts (bars) and of moved thresholds (diamonds) in which each mode comes out: a mode is firm if both are near 100 %.

    Parameters
    ----------
    mode : Mode

    Returns
    -------
    plotly.graph_objects.Figure
        Two rows: evidence by mode, and share by mode.
    """
    findings = mode.findings
    rows = max(1, len(findings))
    height = 300 + 44 * rows
    # Names of modes, in two lines, and a heading take so many pixels of what the margins leave.
    spacing = 76 / (height - 112)
    figure = make_subplots(rows=2, cols=1, row_heights=[rows, 3], vertical_spacing=spacing)
    panel_title(figure, f"Evidence: {mode.name}", row=1)
    labels = [wrapped(f"{finding.name}: {finding.value}", 62) for finding in findings]
    figure.add_scatter(  # every cell, so that rows that decide nothing are there too
        x=[name for _ in findings for name in SPOKEN],
        y=[label for label in labels for _ in SPOKEN],
        mode="markers",
        marker={"size": 7, "color": "white", "line": {"color": UNDETERMINED, "width": 1}},
        hoverinfo="skip",
        showlegend=False,
        row=1,
        col=1,
    )
    dots = [(name, label, f) for label, f in zip(labels, findings, strict=True) for name in f.speaks_for]
    figure.add_scatter(
        x=[name for name, _, _ in dots],
        y=[label for _, label, _ in dots],
        mode="markers",
        marker={
            "size": [20 if f.decisive else 11 for _, _, f in dots],
            "color": [ACCENT if name == mode.name else PLAIN for name, _, _ in dots],
        },
        hovertemplate="%{y}<br>speaks for %{x}<extra></extra>",
        showlegend=False,
        row=1,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    names_in_lines = [name.replace(" ", "<br>") if " " in name else name.replace("-", "-<br>", 1) for name in SPOKEN]
    figure.update_xaxes(
        categoryarray=list(SPOKEN),
        tickvals=list(SPOKEN),
        ticktext=names_in_lines,
        tickangle=0,
        showgrid=False,
        row=1,
        col=1,
    )
    panel_title(figure, "How sure", row=2)
    names: Sequence[str] = [n for n in get_args(ModeName) if any(n in share for share in mode.shares.values())]
    prompts, moved = (mode.shares.get(kind, {}) for kind in ("prompts", "thresholds"))
    figure.add_bar(
        x=[prompts.get(name, 0.0) for name in names],
        y=list(names),
        orientation="h",
        name="bootstrap samples of the prompts",
        marker_color=[ACCENT if name == mode.name else PLAIN for name in names],
        text=[percent(prompts.get(name, 0.0)) for name in names],
        hovertemplate="%{y}: %{x:.0%} of the bootstrap samples<extra></extra>",
        row=2,
        col=1,
    )
    figure.add_scatter(
        x=[moved.get(name, 0.0) for name in names],
        y=list(names),
        mode="markers",
        name="moved thresholds",
        marker={"symbol": "diamond", "size": 10, "color": INK},
        hovertemplate="%{y}: %{x:.0%} of the moved thresholds<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_xaxes(
        tickformat=".0%",
        range=[0, 1.05],
        row=2,
        col=1,
        title={"text": "share in which it comes out", "font": {"color": MUTED}},
    )
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    figure.update_layout(legend={"y": 0, "yanchor": "bottom"})
    return finish(figure, height)
