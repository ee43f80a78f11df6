"""Keys above values: two heat maps by layer that share their columns and their colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from kvgeom.plots.theme import (
    DIVERGING,
    SITE_NAMES,
    colour_bar,
    layer_ticks,
    panel_title,
    short,
    symmetric_range,
)


def site_maps(data: xr.DataArray, over: str, *, unit: str, hover: str, x_title: str, **options: Any) -> go.Figure:
    """Draw what rounding keys and values of each layer costs, part by part.

    Parameters
    ----------
    data : DataArray
        Over ``layer``, ``site`` and ``over``.
    over : str
        The dimension of the columns.
    unit : str
        Along the colour bar.
    hover : str
        What stands behind site and layer when a cell is pointed at.
    x_title : str
    **options
        More of ``add_heatmap``.

    Returns
    -------
    plotly.graph_objects.Figure
        Two panels, without the finish. Colours end where 99 % of the cells lie, for a few cells dominate; the hover text
        has the number.
    """
    low, high = symmetric_range(np.nan_to_num(data.values), least=1e-9, share=0.99)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1)
    for row, site in enumerate(("k", "v"), 1):
        title = SITE_NAMES[site].capitalize()
        panel_title(figure, title, row=row)
        figure.add_heatmap(
            x=data[over].values,
            y=data.layer.values,
            z=data.sel(site=site).transpose("layer", over).values,
            zmin=low,
            zmax=high,
            colorscale=DIVERGING,
            showscale=row == 1,
            hovertemplate=f"{title}, layer %{{y}}, {hover}<extra></extra>",
            colorbar=colour_bar(unit, tickvals=[low, 0, high], ticktext=[f"≤ {short(low)}", "0", f"≥ {short(high)}"]),
            row=row,
            col=1,
            **options,
        )
        figure.update_yaxes(**layer_ticks(int(data.layer.max()) + 1), autorange="reversed", row=row, col=1)
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text=x_title, row=2, col=1)
    return figure
