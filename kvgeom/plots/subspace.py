"""Where harmful and harmless requests are told apart."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import HEAD_COLORS, MUTED, SITE_NAMES, finish, layer_axis, mark_undefined, plain

#: Above this a separation is not significant.
ALPHA = 0.05


@figure("subspace", "separation")
def separation_by_layer(space: Plottable) -> go.Figure:
    """Separation of harmful from harmless requests by layer, for keys, values and residual stream.

    How to read it: every point is the cross-validated AUROC along the direction of one layer and site; 1 is perfect, the
    dotted line at 0.5 is chance. A filled point is significant (p at most 0.05, corrected for the positions tried), a hollow
    one is not. There is no point where the classes coincide, and a grey band where they do at every site.

    Parameters
    ----------
    space : Subspace
        ``separation``, ``p``, ``position`` and ``defined`` over layer and site.

    Returns
    -------
    plotly.graph_objects.Figure
        One line for each site; x: layer, y: AUROC.
    """
    layers = space.data.layer.values.astype(int)
    drawn = make_subplots()
    for site, color in zip(space.data.site.values, HEAD_COLORS, strict=False):
        at = space.data.sel(site=site)
        significant = at.p.values <= ALPHA
        drawn.add_scatter(
            x=layers,
            y=np.where(at.defined.values, at.separation.values, np.nan),
            mode="lines+markers",
            name=SITE_NAMES.get(str(site), str(site)),
            line={"color": color, "width": 1.5},
            marker={
                "size": 7,
                "color": [color if sure else "white" for sure in significant],
                "line": {"color": color, "width": 1.5},
            },
            customdata=np.stack([at.position.values.astype(str), [f"{p:.2g}" for p in at.p.values]], axis=-1),
            hovertemplate="layer %{x}: AUROC %{y:.3f}, p %{customdata[1]}<br>%{customdata[0]}",
        )
    drawn.add_hline(y=0.5, line={"color": MUTED, "width": 1, "dash": "dot"})
    mark_undefined(drawn, layers, space.data.defined.any("site"))
    drawn.update_xaxes(**layer_axis(layers))
    drawn.update_yaxes(title_text=f"separation (AUROC), {plain(space.meta['method'])}")
    return finish(drawn, 320)
