"""Candidates of a mitigation: what each keeps and costs, and which layers are worth keeping in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    CHOSEN,
    HEAD_COLORS,
    INK,
    MUTED,
    PLAIN,
    ROLE_COLORS,
    UNDETERMINED,
    finish,
    interval,
    percent,
    plain,
    wrapped,
)

FAMILY_COLORS = dict(
    zip(("unmitigated", "center", "equalize", "hadamard", "refine", "protect", "combined", "window", "turboquant"),
        (INK, *HEAD_COLORS[:4], HEAD_COLORS[5], HEAD_COLORS[6], HEAD_COLORS[4], HEAD_COLORS[7]), strict=True)
)  # fmt: skip
RULE_COLORS = {"causal": CHOSEN, "first": PLAIN, "attention": HEAD_COLORS[1]}


@figure("mitigation-search", "pareto_front")
def pareto_front(search: Plottable, paper: str | None = None) -> go.Figure:
    """Refusals lost against memory, for every candidate.

    How to read it: each point is a cache; lower is safer, further left is smaller. The line is the Pareto front: no other
    cache has both fewer bytes and fewer flips. The unmitigated, the chosen and the paper's cache have rings and, like the
    front, Wilson 95 % intervals; other intervals are in the hover text. Caches at the same place are one point whose hover
    text names them all. To the right of the dotted line the memory budget is exceeded.

    Parameters
    ----------
    search : Search
        Over ``candidate``, the unmitigated cache first; in ``meta`` also ``prompts``, ``budget``, ``chosen`` and
        ``exact_bytes_per_token``.
    paper : str, optional
        Name of the candidate that is the paper's prescription.

    Returns
    -------
    plotly.graph_objects.Figure
        x: share of the 16-bit cache. y: flips of the refused calibration prompts.
    """
    frame = search.data.to_dataframe().reset_index()
    rows: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
    n, exact = int(search.meta["prompts"]), float(search.meta["exact_bytes_per_token"])
    places: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault((float(row["bytes_per_token"]) / exact, int(row["flips"])), []).append(row)
    figure = go.Figure()
    front = sorted(place for place, found in places.items() if any(row["pareto"] for row in found))
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        name="front",
        mode="lines",
        line={"color": UNDETERMINED, "width": 2, "shape": "hv"},
        error_y=_whiskers([places[place][0] for place in front], n, UNDETERMINED, 1),
        hoverinfo="skip",
    )
    present = [str(row["family"]) for row in rows]
    for family in dict.fromkeys([*(name for name in FAMILY_COLORS if name in present), *present]):
        colour = FAMILY_COLORS.get(family, UNDETERMINED)
        own = [(place, found) for place, found in places.items() if found[0]["family"] == family]
        if not own:
            continue
        figure.add_scatter(
            x=[x for (x, _), _ in own],
            y=[y for (_, y), _ in own],
            name=family,
            showlegend=family != "unmitigated",  # it has a ring
            mode="markers",
            marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1}},
            customdata=[["<br>".join(_candidate(row, n) for row in found)] for _, found in own],
            hovertemplate="%{customdata[0]}<extra></extra>",
            cliponaxis=False,
        )
    named = {str(row["candidate"]): row for row in rows}
    for role, name, symbol, size in (
        ("unmitigated", str(rows[0]["candidate"]), "diamond-open", 17),
        ("chosen", search.meta["chosen"], "circle-open", 20),
        ("paper", paper, "square-open", 23),
    ):
        if name not in named:
            continue
        row, colour = named[name], ROLE_COLORS[role]
        figure.add_scatter(
            x=[float(row["bytes_per_token"]) / exact],
            y=[int(row["flips"])],
            name=wrapped(role if name == role else f"{role}: {name}", 60),
            legend="legend2",
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": colour, "line": {"width": 2.5}},
            error_y=_whiskers([row], n, colour, 1.5),
            hoverinfo="skip",
            cliponaxis=False,
        )
    allowed = float(rows[0]["bytes_per_token"]) / exact * (1 + float(search.meta["budget"]))
    figure.add_vline(x=allowed, line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=allowed, y=1, yref="paper", xanchor="left", yanchor="bottom", showarrow=False, font={"size": 11, "color": MUTED},
        text=f"memory budget: {100 * float(search.meta['budget']):.3g} % more",
    )  # fmt: skip
    figure.update_xaxes(title_text="memory of a token, scales included, as share of the 16-bit cache", tickformat=".0%")
    figure.update_yaxes(
        title_text=f"lost, of {n} refusals", range=[-0.045 * max(n, 1), 1.045 * max(n, 1)], rangemode="tozero"
    )
    rings = {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"}
    return finish(figure, 500, margin={"l": 64, "r": 24, "t": 76, "b": 108}, hovermode="closest", legend2=rings)


@figure("layer-selection", "layer_selection")
def layer_selection(selection: Plottable) -> go.Figure:
    """Refusals lost when layers are kept in 16 bits, by the rule that chose them.

    How to read it: further right more layers are kept, which costs the same memory under every rule; lower is better. A
    useful rule lies below the grey band, the range of layers drawn at random. Whiskers are Wilson 95 % intervals; the p-value
    in the hover text compares with the causal rule at the same number of layers. The dotted line is the cache with no layer
    kept.

    Parameters
    ----------
    selection : LayerSelection
        Over (rule, kept); in ``meta`` also ``drawn`` (the rules that draw layers at random), ``prompts`` and ``unmitigated``.

    Returns
    -------
    plotly.graph_objects.Figure
        x: position of the number of layers kept, rules side by side. y: flips.
    """
    data, n = selection.data, int(selection.meta["prompts"])
    kept = [int(count) for count in data.kept.values]
    at = np.arange(len(kept), dtype=float)
    drawn = [str(rule) for rule in data.rule.values if rule in selection.meta["drawn"]]
    rules = [str(rule) for rule in data.rule.values if rule not in drawn]
    figure = go.Figure()
    if drawn:
        flips = data.flips.sel(rule=drawn).values.astype(float)
        edge = np.concatenate([[-0.22], at, [at[-1] + 0.22]])  # beyond the outermost, so that one number has a band too
        low, high = (np.pad(values, 1, mode="edge") for values in (flips.min(0), flips.max(0)))
        figure.add_scatter(
            x=np.concatenate([edge, edge[::-1]]),
            y=np.concatenate([high, low[::-1]]),
            name=f"{len(drawn)} random draws",
            legendgroup="random",
            mode="lines",
            fill="toself",
            fillcolor="rgba(185, 192, 199, 0.35)",
            line={"color": UNDETERMINED, "width": 1},
            hoverinfo="skip",
        )
        for rule in drawn:
            _rule(figure, selection, rule, at + 0.15, UNDETERMINED, n)
    for number, rule in enumerate(rules):
        shift = 0.07 * (number - (len(rules) - 1) / 2)
        _rule(figure, selection, rule, at + shift, RULE_COLORS.get(rule, INK), n)
    before = int(selection.meta["unmitigated"])
    figure.add_hline(y=before, line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=1, xref="paper", y=before, xanchor="right", yanchor="bottom", showarrow=False, font={"size": 11, "color": MUTED},
        text=f"no layer kept: {before}",
    )  # fmt: skip
    figure.update_xaxes(
        title_text="layers kept in 16 bits (bytes of a token)",
        tickvals=at,
        ticktext=[
            f"{k} ({float(b):,.0f})" for k, b in zip(kept, data.bytes_per_token.mean("rule").values, strict=True)
        ],
        range=[-0.35, at[-1] + 0.5],  # room for what the dotted line is
        showgrid=False,
    )
    figure.update_yaxes(title_text=f"lost, of {n} refusals", range=[-0.045 * max(n, 1), 1.09 * max(n, 1)])
    return finish(figure, 400)


def _rule(figure: go.Figure, selection: Plottable, rule: str, x: NDArray[np.float64], colour: str, n: int) -> None:
    """One rule: a line with whiskers, or small points for a random draw."""
    own, drawn = selection.data.sel(rule=rule), rule in selection.meta["drawn"]
    rows = [
        {name: own[name].values[i] for name in ("ci_low", "ci_high", "flips", "p", "layers")} for i in range(len(x))
    ]
    figure.add_scatter(
        x=x,
        y=own.flips.values.astype(int),
        name=rule,
        showlegend=not drawn,
        legendgroup="random" if drawn else rule,
        mode="markers" if drawn else "lines+markers",
        line={"color": colour, "width": 2},
        marker={"color": MUTED if drawn else colour, "size": 5 if drawn else 9},
        error_y=None if drawn else _whiskers(rows, n, colour, 1.5),
        customdata=[
            [plain(row["layers"]), f"{percent(row['ci_low'])} to {percent(row['ci_high'])}", f"{row['p']:.2g}"]
            for row in rows
        ],
        hovertemplate=f"<b>{plain(rule)}</b>, layers %{{customdata[0]}}<br>%{{y}} of {n} lost, 95 % interval %{{customdata[1]}}"
        "<br>against causal p = %{customdata[2]}<extra></extra>",
        cliponaxis=False,
    )


def _whiskers(rows: list[dict[str, Any]], n: int, colour: str, thickness: float) -> dict[str, Any]:
    """Wilson intervals of flip rates, as counts."""
    flips, low, high = (np.array([row[name] for row in rows], dtype=float) for name in ("flips", "ci_low", "ci_high"))
    return interval(flips, low * n, high * n, color=colour, thickness=thickness, width=4)


def _candidate(row: dict[str, Any], n: int) -> str:
    """Hover text of a candidate."""
    return (
        f"<b>{plain(row['candidate'])}</b>: {wrapped(row['description'], 80)}<br>"
        f"{row['flips']} of {n} lost [{percent(row['ci_low'])}, {percent(row['ci_high'])}]: {row['flips_complied']} comply, "
        f"{row['flips_evaded']} evade, {row['flips_degenerate']} break down<br>{row['bytes_per_token']:,.0f} bytes a token, "
        f"{row['memory_overhead']:+.1%} against unmitigated"
    )
