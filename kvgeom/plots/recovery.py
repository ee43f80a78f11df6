"""A verified plan: the share of the lost refusals that it keeps, and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    GRID,
    INK,
    MUTED,
    ROLE_COLORS,
    finish,
    interval,
    percent,
    plain,
    say,
    wrapped,
)

if TYPE_CHECKING:
    import xarray as xr

#: The left end of the axis of recoveries; the row says how far an interval reaches beyond it.
CUT = -1.0


@figure("verification", "recovery_bars")
def recovery_bars(verification: Plottable) -> go.Figure:
    """Share of the lost refusals that each cache keeps, on prompts that were not used to choose it.

    How to read it: at 100 % every refusal that the unmitigated cache loses is kept, at 0 as many are lost as without a
    mitigation, and below 0 more. Whiskers are 95 % intervals. Diamonds are controls, one for each draw: errors of the same
    size in random directions. If they lie at the end of the bar, the remaining error acts by its size; if they lie far to
    the right, its direction is what loses refusals.

    Parameters
    ----------
    verification : Verification
        Over ``recipe``, with ``control_of``; in ``meta`` also ``refused``.

    Returns
    -------
    plotly.graph_objects.Figure
        x: recovery. y: row number; unmitigated, chosen, paper and other candidates from the top.
    """
    data, refused = verification.data, int(verification.meta["refused"])
    roles = _roles(data)
    before = int(data.flips.sel(recipe="unmitigated"))
    figure = make_subplots(rows=1, cols=1)
    if before == 0:
        say(figure, f"the unmitigated cache loses none of {refused} refusals: nothing can be recovered")
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        return finish(figure, 160)
    value, low, high = (
        data[name].sel(recipe=roles).values.astype(float) for name in ("recovery", "recovery_low", "recovery_high")
    )
    for row, role in enumerate(roles):
        own = data.sel(recipe=role)
        certain = role == "unmitigated"  # the reference has no interval
        figure.add_bar(
            x=[max(value[row], CUT)],
            y=[row],
            orientation="h",
            width=0.5,
            name=role,
            showlegend=False,
            marker_color=ROLE_COLORS.get(role, MUTED),
            error_x=None if certain else interval(
                [max(value[row], CUT)], [max(low[row], CUT)], [high[row]], color=INK, thickness=1.5, width=6
            ),
            customdata=[[
                plain(str(own.name.item())), int(own.flips), int(own.flips_complied), int(own.flips_evaded),
                int(own.flips_degenerate), f"{float(own.p):.2g}", f"{percent(low[row])} to {percent(high[row])}",
            ]],
            hovertemplate=f"<b>{role}</b>: %{{customdata[0]}}<br>%{{customdata[1]}} of {refused} lost: %{{customdata[2]}} comply, "
            "%{customdata[3]} evade, %{customdata[4]} break down<br>" + ("" if certain else "interval %{customdata[6]}<br>")
            + "McNemar against unmitigated p = %{customdata[5]}<extra></extra>",
        )  # fmt: skip
        drawn = _controls(data, role)
        shares = [1 - flips / before for flips in drawn]
        figure.add_scatter(
            x=[max(share, CUT) for share in shares],
            # Draws with equal flips lie below each other.
            y=[row + 0.34 + 0.22 * drawn[:k].count(flips) / len(drawn) for k, flips in enumerate(drawn)],
            name="same size, random direction",
            legendgroup="controls",
            showlegend=bool(drawn) and row == 0,
            mode="markers",
            marker={"symbol": "diamond-open", "size": 10, "color": INK, "line": {"width": 1.5}},
            customdata=[[flips] for flips in drawn],
            hovertemplate=f"{role}, errors in random directions: %{{customdata[0]}} of {refused} lost<extra></extra>",
            cliponaxis=False,
        )
    least = min([0.0, *low[1:], *value[1:], *(1 - f / before for role in roles for f in _controls(data, role))])
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    for row in range(len(roles) - 1):
        figure.add_hline(y=row + 0.62, line={"color": GRID, "width": 1})
    figure.update_xaxes(
        title_text="recovery: share of the lost refusals that is kept"
        + (" (axis cut at −100 %)" if least < CUT else ""),
        tickformat=".0%",
        range=[max(least, CUT) - 0.04, 1.03],
        dtick=0.2,
    )
    figure.update_yaxes(
        tickvals=list(range(len(roles))),
        ticktext=[_row_name(data.sel(recipe=role), role, refused) for role in roles],
        range=[len(roles) - 0.35, -0.6],
        showgrid=False,
        ticks="",
    )
    return finish(figure, 120 + 80 * len(roles), margin={"l": 64, "r": 24, "t": 48, "b": 52})


@figure("verification", "memory_bars")
def memory_bars(verification: Plottable) -> go.Figure:
    """Memory of a token in the whole cache, scales and offsets included.

    How to read it: the top bar is the cache in 16 bits. A mitigation costs the difference between its bar and the unmitigated
    one; quantization still saves the difference to the top bar.

    Parameters
    ----------
    verification : Verification
        ``bytes_per_token``, ``memory_of_exact`` and ``name``.

    Returns
    -------
    plotly.graph_objects.Figure
        x: bytes per token. y: 16-bit, unmitigated, chosen, paper.
    """
    size, share, names = (verification.data[name] for name in ("bytes_per_token", "memory_of_exact", "name"))
    unmitigated = float(size.sel(recipe="unmitigated"))
    exact = unmitigated / float(share.sel(recipe="unmitigated"))
    sizes = {"16-bit": exact, "unmitigated": unmitigated} | {
        f"{role}: {names.sel(recipe=role).item()}": float(size.sel(recipe=role)) for role in ("chosen", "paper")
    }
    figure = go.Figure()
    figure.add_bar(
        x=list(sizes.values()),
        y=[wrapped(name, 40) for name in sizes],
        orientation="h",
        marker_color=[MUTED, *ROLE_COLORS.values()],
        text=[
            f"{size:,.0f} B, {size / exact:.1%}" + (f" ({size / unmitigated - 1:+z.1%})" if row > 1 else "")
            for row, size in enumerate(sizes.values())
        ],
        textposition="outside",
        cliponaxis=False,
        customdata=[[size / exact, size / unmitigated - 1] for size in sizes.values()],
        hovertemplate="%{y}: %{x:,.1f} bytes a token, %{customdata[0]:.1%} of 16-bit, %{customdata[1]:+.1%} against "
        "unmitigated<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="bytes a token, all layers", range=[0, 1.3 * max(sizes.values())], tickformat=",")
    figure.update_yaxes(autorange="reversed", ticks="")
    return finish(figure, 260, margin={"l": 64, "r": 24, "t": 28, "b": 52})


def _roles(data: xr.Dataset) -> list[str]:
    """All recipes but the controls."""
    return [str(role) for role, of in zip(data.recipe.values, data.control_of.values, strict=True) if not of]


def _controls(data: xr.Dataset, role: str) -> list[int]:
    """Flips under errors of the same size in random directions, one number for each draw."""
    return [int(flips) for flips in data.flips.values[data.control_of.values == role]]


def _row_name(own: xr.Dataset, role: str, refused: int) -> str:
    counted = f"{int(own.flips)} of {refused} lost"
    if role == "unmitigated":
        return f"<b>{role}</b><br>{counted}"
    recovery = (
        f"{percent(float(own.recovery))} [{percent(float(own.recovery_low))}, {percent(float(own.recovery_high))}]"
    )
    label = (
        f"<b>{role}</b>: {wrapped(own.name.item(), 38)}"
        if role in ("chosen", "paper")
        else f"<b>{wrapped(role, 38)}</b>"
    )
    return f"{label}<br>{counted}, {recovery}"
