"""What all figures share: colours, one template, ranges, intervals and names."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

INK = "#1f2933"
MUTED = "#66727d"
GRID = "#e8ebee"
#: Size of text, in pixels.
SIZE = 12
#: What could not be determined.
UNDETERMINED = "#b9c0c7"
#: What a reader should look at first.
ACCENT = "#c2452d"
#: What is determined, and not singled out.
PLAIN = "#3f6f9e"
#: The cache that was chosen: no harm, which is red.
CHOSEN = "#2f8f5b"
#: What a cache is among the candidates of a mitigation.
ROLE_COLORS = {"unmitigated": INK, "chosen": CHOSEN, "paper": PLAIN}
LABEL_COLORS = {"refused": "#3f6f9e", "complied": "#c2452d", "evaded": "#9a8fb0", "degenerate": "#e3b450"}
#: KV heads; from the ninth on they are repeated with another symbol.
HEAD_COLORS = ("#3f6f9e", "#d98a29", "#4c9a6a", "#8a60a8", "#c4587c", "#3fa0b3", "#8a6b4a", "#6b7680")
HEAD_SYMBOLS = ("circle", "diamond", "square", "triangle-up")
#: Diverging data, centred; red is more vulnerable.
DIVERGING = "RdBu_r"
#: Lines of axes and of zero.
LINE = "#c4cad0"
SITE_NAMES = {"k": "keys", "v": "values", "resid": "residual"}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'


def template() -> go.layout.Template:
    """The look of every figure, given to each one: nothing global is set."""
    axis = {
        "gridcolor": GRID,
        "linecolor": LINE,
        # No prefixes of units, as in "200n" nats.
        "exponentformat": "power",
        "minexponent": 4,
        "separatethousands": True,
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": LINE,
        "title": {"standoff": 8, "font": {"size": SIZE, "color": MUTED}},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": SIZE, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 64, "r": 20, "t": 64, "b": 48},
            "legend": {
                "orientation": "h",
                # In the left corner: the right one belongs to plotly's buttons.
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
                "yref": "container",
                "title": {"text": ""},
            },
            "hoverlabel": {"bgcolor": "white", "bordercolor": LINE, "font": {"color": INK}, "align": "left"},
            "bargap": 0.35,
        }
    )


def finish(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """Apply the template and a height in pixels; the width follows the page."""
    figure.update_layout(template=template(), height=height, dragmode=False, **layout)
    return figure


def panel_title(figure: go.Figure, text: str, row: int = 1, col: int = 1) -> None:
    """Write a heading above the left edge of a panel of a figure made with ``make_subplots``."""
    figure.add_annotation(
        text=f"<b>{text}</b>",
        xref="x domain",
        yref="y domain",
        x=0,
        y=1,
        yshift=4,
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font={"size": 13},
        row=row,
        col=col,
    )


def say(figure: go.Figure, text: str, row: int = 1, col: int = 1) -> None:
    """Write into the middle of a panel, in grey, why it is empty."""
    # A panel without a trace is not drawn, and its texts would land in the first one.
    figure.add_scatter(x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip", row=row, col=col)
    figure.add_annotation(
        text=wrapped(text, 90),
        xref="x domain",
        yref="y domain",
        x=0.5,
        y=0.5,
        showarrow=False,
        bgcolor="white",
        font={"size": 13, "color": MUTED},
        row=row,
        col=col,
    )


def mark_undefined(
    figure: go.Figure, layers: NDArray[np.integer], defined: ArrayLike, row: int = 1, col: int = 1
) -> None:
    """Grey bands at layers where nothing could be determined, each run of neighbours with the word for it."""
    gaps = np.flatnonzero(~np.asarray(defined, dtype=bool))
    for run in np.split(gaps, np.flatnonzero(np.diff(gaps) > 1) + 1):
        if run.size:
            figure.add_vrect(
                x0=layers[run[0]] - 0.5, x1=layers[run[-1]] + 0.5, fillcolor=GRID, line_width=0, layer="below",
                annotation={"text": "undefined", "textangle": -90, "font": {"size": 11, "color": MUTED}},
                annotation_position="bottom", row=row, col=col,
            )  # fmt: skip


def layer_ticks(layers: int, most: int = 16) -> dict[str, Any]:
    """Ticks of an axis of layers: whole numbers, and no more than can be read."""
    step = next(step for step in (1, 2, 4, 5, 10, 20) if layers / step <= most or step == 20)
    return {"title": {"text": "layer"}, "tick0": 0, "dtick": step, "showgrid": False}


def layer_axis(layers: NDArray[np.integer]) -> dict[str, Any]:
    """An x axis of layers, from layer 0 to the last of these numbers."""
    last = int(layers.max())
    return layer_ticks(last + 1, 32) | {"range": [-0.7, last + 0.7]}


def log_axis(*values: ArrayLike, powers: int = 6) -> dict[str, Any]:
    """A logarithmic axis of some values: at most ``powers`` powers of ten, and what lies between them over few decades."""
    found = positive(np.concatenate([np.ravel(v) for v in values]))
    found = found[np.isfinite(found)]
    low, high = (float(np.log10(end(found))) if found.size else 0.0 for end in (np.min, np.max))
    axis: dict[str, Any] = {"type": "log", "minor_showgrid": False}
    if high - low >= 2:
        # plotly draws the text of such ticks a quarter larger than its size.
        return axis | {
            "exponentformat": "power",
            "dtick": math.ceil((high - low) / powers),
            "tickfont_size": SIZE / 1.25,
        }
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    if low < high and sum(low <= math.log10(tick) <= high for tick in ticks) < 2:
        ticks = _even_ticks(10**low, 10**high)
    return axis | {"tickvals": ticks}


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, of which at least two lie in the range."""
    power = math.floor(math.log10((high - low) / 2))
    # A logarithm rounds up to the power that lies a digit above: then it is the step.
    step = next((step for step in (5, 2, 1) if step * 10.0**power <= (high - low) / 2), 1)
    first, last = (int(end / (step * 10.0**power)) for end in (low, high))
    return [float(f"{step * n}e{power}") for n in range(max(1, first), last + 2)]


def positive(values: ArrayLike) -> NDArray[np.float64]:
    """What a logarithmic axis can show of some values, NaN for all else."""
    found = np.asarray(values, dtype=float)
    return np.where(np.isfinite(found) & (found > 0), found, np.nan)


def symmetric_range(
    values: ArrayLike, least: float = 1.0, *, centre: float = 0.0, share: float = 1.0
) -> tuple[float, float]:
    """Ends of a diverging colour scale whose middle is ``centre``.

    Parameters
    ----------
    values : array
    least : float
        Smallest distance of the ends from the centre.
    centre : float
    share : float
        The scale reaches this quantile of the finite distances: below 1 the few largest do not pale all others.
    """
    found = np.abs(np.asarray(values, dtype=float) - centre)
    found = found[np.isfinite(found)]
    reach = max(least, float(np.quantile(found, share)) if found.size else least)
    return centre - reach, centre + reach


def interval(value: ArrayLike, low: ArrayLike, high: ArrayLike, **style: Any) -> dict[str, Any]:
    """Error bars from the ends of an interval, which may be NaN."""
    at, bottom, top = (np.asarray(x, dtype=float) for x in (value, low, high))
    reach = {"array": np.maximum(0, top - at), "arrayminus": np.maximum(0, at - bottom)}
    return {"type": "data", "symmetric": False, **reach, **style}


def colour_bar(title: str, **options: Any) -> dict[str, Any]:
    """A thin colour bar with its unit, which is written along it: above, it would meet the highest tick."""
    named = {"text": title, "side": "right", "font": {"size": SIZE, "color": MUTED}}
    return {"title": named, "thickness": 12, "outlinewidth": 0, "exponentformat": "power", **options}


def channel_names(channels: int, head_dim: int | None) -> list[str]:
    """Channels for hover text: ``"KV head 1, channel 70 (6 in its head)"``, or ``"channel 70"`` where there are no heads."""
    if head_dim is None:
        return [f"channel {channel}" for channel in range(channels)]
    return [f"KV head {c // head_dim}, channel {c} ({c % head_dim} in its head)" for c in range(channels)]


def channel_hover(head_dim: int | None, head: str) -> str:
    """The same for a map with channels along x, as a template; ``head`` is what it calls the number of the KV head."""
    return "channel %{x}" if head_dim is None else f"KV head %{{{head}}}, channel %{{x}}"


def head_numbers(shape: tuple[int, int], head_dim: int | None) -> NDArray[np.float64]:
    """The KV head of every cell of a map with channels along x."""
    return np.broadcast_to(np.arange(shape[1]) // (head_dim or shape[1]), shape).astype(float)


def head_borders(figure: go.Figure, channels: int, head_dim: int | None, row: int = 1, col: int = 1) -> None:
    """Dotted lines between KV heads along an x axis of channels, in a panel of a figure made with ``make_subplots``."""
    if head_dim is None:
        return
    # By name of the axes: plotly tries a line by row and column on three-dimensional panels too.
    place = figure.get_subplot(row, col)
    x, y = (axis.plotly_name.replace("axis", "") for axis in (place.xaxis, place.yaxis))
    for border in range(head_dim, channels, head_dim):
        figure.add_shape(
            type="line", x0=border - 0.5, x1=border - 0.5, y0=0, y1=1, xref=x, yref=f"{y} domain",
            line={"color": MUTED, "width": 1, "dash": "dot"},
        )  # fmt: skip


def plain(text: object) -> str:
    """Escaped text, because plotly reads HTML in every label."""
    return html.escape(str(text), quote=False)


def wrapped(text: object, width: int) -> str:
    """Escaped text in lines of at most ``width`` characters."""
    return "<br>".join(plain(line) for line in textwrap.wrap(str(text), width))


def percent(share: float) -> str:
    """``0.152`` as ``15 %``."""
    return f"{100 * share:z.0f} %" if math.isfinite(share) else "undetermined"


def short(value: float) -> str:
    """A ratio in the few characters that fit a cell: ``12.6k``, ``258``, ``1.9``, ``0.23``."""
    if not math.isfinite(value):
        return ""
    if value == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.0e}"
