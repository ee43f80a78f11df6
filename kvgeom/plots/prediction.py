"""What predicts damage: partial rank correlations with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.errors import InputError
from kvgeom.plots.theme import ACCENT, MUTED, UNDETERMINED, finish, interval, panel_title, plain


class Correlation(Protocol):
    """A partial rank correlation; see :class:`kvgeom.geometry.prediction.PartialCorrelation`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def plain(self) -> float: ...
    @property
    def units(self) -> int: ...
    @property
    def beyond(self) -> bool: ...


def correlation_forest(found: Mapping[str, Mapping[str, Correlation]]) -> go.Figure:
    """Partial rank correlations of predictors with damage, a panel for each kind of unit.

    How to read it: right of 0 a predictor knows more of the damage than the controls do. Red where the whole interval lies
    above 0, grey where it does not decide. Open circles are plain rank correlations, without controls: a predictor whose circle
    lies far to the right of its point repeats what is trivial.

    Parameters
    ----------
    found : mapping of panel to mapping of predictor to PartialCorrelation
        Panels from left to right, predictors from the top.

    Returns
    -------
    plotly.graph_objects.Figure
        x: rank correlation. y: predictor.

    Raises
    ------
    InputError
        Without any correlation.
    """
    names = list(dict.fromkeys(name for panel in found.values() for name in panel))
    if not names:
        raise InputError("no correlation was given; give at least one panel with one predictor")
    figure = make_subplots(rows=1, cols=len(found), shared_yaxes=True, horizontal_spacing=0.06)
    named: set[str] = set()  # an empty trace has no entry in the legend, whatever it asks for
    for col, (title, panel) in enumerate(found.items(), 1):
        panel_title(figure, plain(title), col=col)
        rows, ones = [plain(name) for name in panel], list(panel.values())
        figure.add_scatter(
            x=[one.plain for one in ones],
            y=rows,
            mode="markers",
            marker={"symbol": "circle-open", "size": 7, "color": MUTED},
            name="plain",
            showlegend=col == 1,
            hovertemplate="%{y}<br>without controls %{x:.2f}<extra></extra>",
            row=1,
            col=col,
        )
        for beyond, colour, legend in ((True, ACCENT, "beyond the trivial"), (False, UNDETERMINED, "undetermined")):
            own = [(row, one) for row, one in zip(rows, ones, strict=True) if one.beyond is beyond]
            if not own:
                continue
            figure.add_scatter(
                x=[one.value for _, one in own],
                y=[row for row, _ in own],
                mode="markers",
                marker={"size": 8, "color": colour},
                error_x=interval(
                    [o.value for _, o in own], [o.low for _, o in own], [o.high for _, o in own], color=colour
                ),
                name=legend,
                legendgroup=legend,
                showlegend=legend not in named,
                customdata=[[one.low, one.high, one.units] for _, one in own],
                hovertemplate="%{y}<br>%{x:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<br>%{customdata[2]} units"
                "<extra></extra>",
                row=1,
                col=col,
            )
            named.add(legend)
    figure.update_xaxes(range=[-1.05, 1.05], zeroline=True, title_text="partial rank correlation")
    figure.update_yaxes(categoryorder="array", categoryarray=[plain(name) for name in reversed(names)], showgrid=False)
    return finish(figure, 130 + 30 * len(names), margin={"l": 10, "r": 10, "t": 60, "b": 46})
