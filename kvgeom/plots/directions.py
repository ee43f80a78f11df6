"""Requests along safety directions, and safety directions against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import (
    ACCENT,
    DIVERGING,
    HEAD_COLORS,
    HEAD_SYMBOLS,
    LINE,
    PLAIN,
    SITE_NAMES,
    UNDETERMINED,
    colour_bar,
    finish,
    interval,
    layer_axis,
    layer_ticks,
    mark_undefined,
    panel_title,
    plain,
)

if TYPE_CHECKING:
    import xarray as xr


@figure("directions", "projections_by_layer")
def projections_by_layer(
    directions: Plottable, site: str = "resid", method: str | None = None, position: str | None = None
) -> go.Figure:
    """Harmful and harmless prompts along the safety direction, a layer at a time.

    How to read it: every point is a prompt, red harmful, blue harmless; the height only tells the classes apart. The slider
    chooses the layer. Where the classes do not overlap, one number tells harmful from harmless. The direction was computed
    from the same prompts, so the classes separate a little even by chance: the heading has the AUROC on prompts held out.

    Parameters
    ----------
    directions : Directions
    site : {"resid", "k", "v"}
    method, position : str, optional
        The first of each by default.

    Returns
    -------
    plotly.graph_objects.Figure
        A strip plot, with a slider that has a step for each layer; it starts at the layer with the highest held-out AUROC.
    """
    data = directions.data
    method = str(data.estimator.values[0]) if method is None else method
    position = str(data.position.values[0]) if position is None else position
    picked = data.sel(estimator=method, position=position, site=site)
    harmful = data.harmful.values
    layers = data.layer.values.astype(int)
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(harmful))
    scores = picked.score.transpose("layer", "prompt").values.astype(float)
    # Residual streams grow with depth: every layer is measured from its midpoint, in its own standard deviations.
    middle = (scores[:, harmful].mean(1) + scores[:, ~harmful].mean(1)) / 2
    within = np.sqrt((scores[:, harmful].var(1) + scores[:, ~harmful].var(1)) / 2)
    scaled = (scores - middle[:, None]) / np.where(within > 0, within, 1.0)[:, None]

    classes = (("harmful", harmful, ACCENT, 0.5), ("harmless", ~harmful, PLAIN, -0.5))

    def heading(row: int) -> str:
        auroc = float(picked.separation.values[row])
        held_out = "undefined, the classes coincide" if np.isnan(auroc) else f"held-out AUROC {auroc:.2f}"
        return f"{SITE_NAMES[site]}, layer {layers[row]}, {plain(position)}: {held_out}"

    def shown(row: int) -> dict[str, list[object]]:
        """What of the two traces depends on the layer."""
        return {
            "x": [scaled[row, rows].tolist() for _, rows, _, _ in classes],
            "customdata": [scores[row, rows].tolist() for _, rows, _, _ in classes],
            "hovertemplate": [
                f"{SITE_NAMES[site]}, layer {layers[row]}<br>{name} prompt %{{text}}<br>projection %{{customdata:.3g}}<extra></extra>"
                for name, *_ in classes
            ],
        }

    start = int(np.nanargmax(picked.separation.values)) if np.isfinite(picked.separation.values).any() else 0
    figure = make_subplots()
    panel_title(figure, heading(start))
    for number, (name, rows, color, height) in enumerate(classes):
        figure.add_scatter(
            y=height + spread[rows],
            mode="markers",
            name=name,
            marker={"color": color, "size": 8, "opacity": 0.75, "line": {"width": 0.5, "color": "white"}},
            text=[str(n) for n in np.arange(rows.sum())],
            **{key: values[number] for key, values in shown(start).items()},
        )
    reach = 1.05 * max(float(np.abs(scaled).max()), 1.0)
    figure.update_xaxes(
        range=[-reach, reach], title_text="projection, from the midpoint (within-class standard deviations)"
    )
    figure.update_yaxes(visible=False, range=[-1.1, 1.1])
    figure.add_vline(x=0, line={"color": LINE, "width": 1})
    # Updates and not frames, which plotly plays by itself when a page is opened.
    steps = [
        {
            "method": "update",
            "label": str(layer),
            "args": [shown(row), {"annotations[0].text": f"<b>{heading(row)}</b>"}],
        }
        for row, layer in enumerate(layers)
    ]
    slider = {"active": start, "steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 36}, "ticklen": 3}
    return finish(figure, 400, sliders=[slider])


def cosine_map(cosines: xr.DataArray) -> go.Figure:
    """Cosine of every pair of directions, for instance layer by layer.

    How to read it: red is 1 (the same direction), white 0 (nothing in common), blue -1. A red block along the diagonal is a
    range of layers that share one direction. Grey rows are layers without a direction. For keys and values, whose channels
    differ from layer to layer, the cosines are those of the prompts' scores without the class means: red layers see the same
    differences between prompts of one class.

    Parameters
    ----------
    cosines : DataArray, square
        From ``Directions.cosines_of_layers``, ``agreement_of_layers``, ``cosines_of_methods``, ...

    Returns
    -------
    plotly.graph_objects.Figure
        One heat map.
    """
    dim = str(cosines.dims[0])
    labels = cosines[dim].values
    named = labels.dtype.kind not in "iu"
    names = [SITE_NAMES.get(str(label), str(label)) for label in labels] if named else labels.astype(int)
    ticks = {"title_text": dim, "showgrid": False} if named else layer_ticks(len(labels))
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=cosines.values,
            zmin=-1,
            zmax=1,
            colorscale=DIVERGING,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            text=[[f"{v:z.2f}" if len(labels) <= 8 and np.isfinite(v) else "" for v in row] for row in cosines.values],
            texttemplate="%{text}",
            hovertemplate=f"{dim} %{{y}} and %{{x}}: %{{z:.2f}}<extra></extra>",
            colorbar=colour_bar("cosine"),
        )
    )
    side = 320 if len(labels) <= 8 else 480
    figure.update_xaxes(**ticks, constrain="domain")
    figure.update_yaxes(**ticks, autorange="reversed", scaleanchor="x", constrain="domain")
    # White would be a cosine of 0.
    figure.update_layout(plot_bgcolor=UNDETERMINED)
    return finish(figure, side)


@figure("directions", "stability_by_layer")
def stability_by_layer(directions: Plottable, site: str = "resid", position: str | None = None) -> go.Figure:
    """Bootstrap stability of the direction at every layer, by method.

    How to read it: each point is the median cosine between the direction and those of resampled prompts, with its 95 %
    interval. Near 1 the direction does not depend on single prompts. A method far below the others needs more prompts.

    Parameters
    ----------
    directions : Directions
    site : {"resid", "k", "v"}
    position : str, optional
        The first one by default.

    Returns
    -------
    plotly.graph_objects.Figure
        x: layer, y: cosine; one trace for each method.
    """
    data = directions.data
    position = str(data.position.values[0]) if position is None else position
    layers = data.layer.values.astype(int)
    figure = make_subplots()
    panel_title(figure, f"Cosine with directions of resampled prompts, {SITE_NAMES[site]}, {position}")
    methods = [str(name) for name in data.estimator.values]
    for number, method in enumerate(methods):
        one = data.sel(estimator=method, position=position, site=site)
        middle = one.stability.values.astype(float)
        figure.add_scatter(
            x=layers + 0.14 * (number - (len(methods) - 1) / 2),
            y=middle,
            mode="markers",
            name=method,
            marker={"color": HEAD_COLORS[number], "symbol": HEAD_SYMBOLS[number % len(HEAD_SYMBOLS)], "size": 6},
            error_y=interval(middle, one.stability_low, one.stability_high, thickness=1, width=0),
            customdata=layers,
            hovertemplate=f"{SITE_NAMES[site]}, {method}, layer %{{customdata}}: %{{y:.2f}}<extra></extra>",
        )
    mark_undefined(figure, layers, np.isfinite(data.stability.sel(position=position, site=site)).any("estimator"))
    figure.update_xaxes(**layer_axis(layers))
    figure.update_yaxes(
        title_text="cosine", range=[min(0.0, float(np.nanmin(data.stability_low.values, initial=0.0))), 1.03]
    )
    return finish(figure, 340)
