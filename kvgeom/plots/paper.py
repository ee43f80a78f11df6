"""Tables of the paper as figures: every number with its interval, and published ones beside them."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from kvgeom.errors import InputError, unknown
from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import GRID, HEAD_COLORS, INK, finish, interval, plain, wrapped

if TYPE_CHECKING:
    import pandas as pd

#: From so many places on, an axis of numbers has a line and not bars.
_LINE_FROM = 3
#: Axes whose numbers fall: more bits are less rounding.
_FALLING = ("bits",)
#: The exact cache among widths, and the row that is about all places.
_NO_PLACE = ("all", "all flips")
#: Longest name below a bar, in characters of a line.
_NAME = 22
_DASHES = ("solid", "dash", "dot", "dashdot")
#: What a quantity's name ends with where it is a part of another.
_PART = ": "


@figure("paper-table", "cells")
def cells(table: Plottable, quantity: str | None = None) -> go.Figure:
    """A quantity of the table, or all that are its parts, where each was measured.

    How to read it: points and bars are what was measured, whiskers their 95 % intervals; hollow diamonds are what was published of the
    same model. Widths fall from left to right. Where a table has several settings each has a colour. A place without a number is
    undefined: nothing could be lost there.

    Parameters
    ----------
    table : PaperTable
        ``measured``, ``low``, ``high``, ``published`` over rows; in ``meta`` ``keys``.
    quantity : str, optional
        One of the table's; by default the first that is a share, else the first that is a number.

    Returns
    -------
    plotly.graph_objects.Figure
        x: the place; y: the quantity, in percent where it is a share.
    """
    frame, keys = _numbers(table), [str(key) for key in table.meta["keys"]]
    chosen = _chosen(frame, quantity)
    found = frame[frame.quantity == chosen]
    along, others = _axis(found, keys)
    scale = 100.0 if str(found.unit.iloc[0]).startswith("share") else 1.0
    places = _places(found, along)
    drawn = go.Figure()
    as_line = len(places) >= _LINE_FROM and all(isinstance(place, int) for place in places)
    settings = list(product(*(dict.fromkeys(found[key]) for key in others)))
    published: list[tuple[Any, float, str]] = []
    for number, setting in enumerate(settings):
        own = (
            found[np.logical_and.reduce([found[key] == value for key, value in zip(others, setting, strict=True)])]
            if others
            else found
        )
        own = own.set_index(along).reindex(places).reset_index()
        name = ", ".join(f"{key} {value}" for key, value in zip(others, setting, strict=True)) or chosen
        _trace(drawn, own, along, scale, name, number, as_line)
        published += [
            (row.place, scale * float(row.published), str(row.source))
            for row in own.rename(columns={along: "place"}).itertuples()
            if isinstance(row.published, float) and np.isfinite(row.published)
        ]
    if published:
        at, values, sources = zip(*published, strict=True)
        drawn.add_scatter(
            x=[_shown(place) for place in at],
            y=values,
            mode="markers",
            name="published",
            marker={"symbol": "diamond-open", "size": 11, "color": INK, "line": {"width": 1.6}},
            customdata=[plain(source) for source in sources],
            hovertemplate="published: %{y:.4g}<br>%{customdata}<extra></extra>",
        )
    title = wrapped(chosen, 40) + (" (%)" if scale > 1 else f" ({plain(str(found.unit.iloc[0]))})")
    drawn.update_xaxes(
        title=along, type="category", categoryorder="array", categoryarray=[_shown(each) for each in places]
    )
    drawn.update_yaxes(title=title, rangemode="tozero", zeroline=True, zerolinecolor=GRID)
    several = len(settings) > 1 or bool(published)
    return finish(drawn, 380, showlegend=several, barmode="group", margin={"t": 70 if several else 30, "b": 60})


@figure("paper-table", "recovery_by_memory")
def recovery_by_memory(table: Plottable) -> go.Figure:
    """What each choice of layers recovers of the lost refusals, against the bytes that it costs.

    How to read it: the better, the further up and to the left. Whiskers are 95 % intervals over prompts. The paper counts memory as
    layers kept by layers; the bytes of a cache grow faster, for a layer in 16 bits is large beside the others.

    Parameters
    ----------
    table : PaperTable
        With the quantities ``recovery`` and ``more bytes`` in the same places.

    Returns
    -------
    plotly.graph_objects.Figure
        x: more bytes than without (%); y: recovery (%).

    Raises
    ------
    InputError
        If the table has no such quantities.
    """
    frame, keys = _numbers(table), [str(key) for key in table.meta["keys"]]
    needed = ("recovery", "more bytes")
    lacking = [name for name in needed if name not in set(frame.quantity)]
    if lacking:
        raise InputError(
            f"{table.meta['table']} has no {lacking[0]}; figure 'recovery_by_memory' is of tables of mitigations, such as protection_sweep"
        )
    one, other = (frame[frame.quantity == name].set_index(keys) for name in needed)
    found = one.join(other[["measured"]].rename(columns={"measured": "bytes"}), how="inner").reset_index()
    found = found[np.isfinite(found.measured)]
    found["name"] = [", ".join(str(row[key]) for key in keys) for _, row in found.iterrows()]
    # Choices that cost and recover the same are one point with both names.
    found = (
        found.groupby(["bytes", "measured"], sort=False)
        .agg({"name": " / ".join, "low": "first", "high": "first"})
        .reset_index()
    )
    drawn = go.Figure()
    drawn.add_scatter(
        x=100 * found.bytes,
        y=100 * found.measured,
        error_y=interval(100 * found.measured, 100 * found.low, 100 * found.high, color=INK, thickness=1, width=3),
        mode="markers+text" if len(found) <= 8 else "markers",
        text=[plain(name) for name in found.name],
        textposition="top right",
        marker={"size": 9, "color": HEAD_COLORS[0]},
        hovertemplate="<b>%{text}</b><br>%{x:.3g} % more bytes<br>%{y:.3g} % recovered<extra></extra>",
    )
    drawn.update_xaxes(title="more bytes than without a mitigation (%)", rangemode="tozero")
    drawn.update_yaxes(title="recovered of the lost refusals (%)", zeroline=True, zerolinecolor=GRID)
    return finish(drawn, 380, showlegend=False, margin={"t": 30, "b": 60})


def _numbers(table: Plottable) -> pd.DataFrame:
    """Rows that are numbers."""
    frame: pd.DataFrame = table.to_frame()  # type: ignore[attr-defined]
    kept = [isinstance(value, float | int) for value in frame.measured]
    frame = frame[kept]
    return frame.astype(dict.fromkeys(("measured", "low", "high"), float))


def _chosen(frame: pd.DataFrame, quantity: str | None) -> str:
    names = list(dict.fromkeys(frame.quantity))
    if not names:
        raise InputError("the table has no numbers to draw; see its text")
    if quantity is not None:
        if quantity not in names:
            raise unknown("quantity", quantity, names)
        return quantity
    places = frame.groupby("quantity", sort=False).size()
    shares = [
        name
        for name in names
        if str(frame[frame.quantity == name].unit.iloc[0]).startswith("share") and _PART not in name
    ]
    return str(max(shares or names, key=lambda name: places[name]))


def _axis(frame: pd.DataFrame, keys: list[str]) -> tuple[str, list[str]]:
    """The key with most values, along which a table is read, and the others that vary."""
    varying = [key for key in keys if frame[key].nunique() > 1] or keys[:1]
    along = max(varying, key=lambda key: (key in _FALLING, frame[key].nunique()))
    return along, [key for key in varying if key != along]


def _places(frame: pd.DataFrame, along: str) -> list[Any]:
    """In their order; whole numbers as such, also where a column has a word for all of them beside."""
    found = [int(each) if str(each).isdigit() else str(each) for each in dict.fromkeys(frame[along])]
    frame[along] = [int(each) if str(each).isdigit() else str(each) for each in frame[along]]
    if all(isinstance(each, int) for each in found):
        return sorted(found, reverse=along in _FALLING)
    return found


def _shown(place: Any) -> str:
    return wrapped(str(place), _NAME)


def _trace(
    drawn: go.Figure, own: pd.DataFrame, along: str, scale: float, name: str, number: int, as_line: bool
) -> None:
    values, low, high = (scale * own[column].astype(float) for column in ("measured", "low", "high"))
    kind, colour = go.Scatter if as_line else go.Bar, HEAD_COLORS[number % len(HEAD_COLORS)]
    # Lines that lie on each other are seen by their dashes.
    line = {"color": colour, "dash": _DASHES[number % len(_DASHES)]}
    more: dict[str, Any] = {"mode": "lines+markers", "line": line} if as_line else {}
    drawn.add_trace(
        kind(
            x=[_shown(place) for place in own[along]],
            y=values,
            error_y=interval(values, low, high, color=colour if as_line else INK, thickness=1, width=3),
            name=plain(name),
            marker={"color": colour},
            customdata=np.stack([own.n, low, high], 1),
            hovertemplate=f"<b>{plain(name)}</b><br>{plain(along)} %{{x}}: %{{y:.3g}}"
            "<br>95 %: %{customdata[1]:.3g} to %{customdata[2]:.3g}, n = %{customdata[0]}<extra></extra>",
            **more,
        )
    )
