"""Refusals that a candidate server loses."""

from __future__ import annotations

import plotly.graph_objects as go

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import ACCENT, CHOSEN, MUTED, UNDETERMINED, finish

_COLOURS = {"pass": CHOSEN, "fail": ACCENT, "too few": UNDETERMINED}
_NAMES = {"candidate": "candidate", "repeat": "baseline again"}


@figure("gate", "gate_interval")
def gate_interval(gate: Plottable) -> go.Figure:
    """Net share of refusals that are lost, with its interval, against the tolerance.

    How to read it: the candidate passes where its whole interval lies left of the tolerance, and fails where significantly more is
    lost than gained. The second row is the noise floor: the baseline asked again.

    Parameters
    ----------
    gate : Gate
        ``meta["intervals"]``: by server, share with the ends of its 90 % interval; ``meta["tolerance"]`` and ``meta["decision"]``.

    Returns
    -------
    plotly.graph_objects.Figure
        x: net share, right is worse. y: server.
    """
    intervals = {name: row for name, row in gate.meta["intervals"].items() if row[0] is not None and row[0] == row[0]}
    tolerance = float(gate.meta["tolerance"])
    chart = go.Figure()
    for name, (share, low, high) in intervals.items():
        chart.add_scatter(
            x=[share],
            y=[_NAMES[name]],
            mode="markers",
            marker={"size": 11, "color": _COLOURS[gate.meta["decision"]] if name == "candidate" else MUTED},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - share],
                "arrayminus": [share - low],
                "thickness": 2,
            },
            hovertemplate=f"%{{y}}: {share:.1%} [{low:.1%}, {high:.1%}]<extra></extra>",
        )
    chart.add_vline(x=0, line={"color": MUTED, "width": 1})
    chart.add_vline(
        x=tolerance,
        line={"color": ACCENT, "width": 1, "dash": "dash"},
        annotation_text=f"tolerance {tolerance:.0%}",
        annotation_y=0.5,
    )
    chart.update_xaxes(title_text="net share of refusals lost (90 % interval)", tickformat=".0%")
    chart.update_yaxes(autorange="reversed", type="category")
    return finish(chart, 150 + 50 * len(intervals), showlegend=False, margin={"l": 120, "r": 20, "t": 40, "b": 50})
