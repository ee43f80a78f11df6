"""Is the safety subspace 100 to 1,000 times as exposed to rounding as the whole space?"""

from __future__ import annotations

import numpy as np

from kvgeom.geometry.subspace import subspace
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, share
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.scheme import Scheme

#: Of the abstract.
BAND = (100, 1000)
SITES = ("k", "v")


@paper_table("the noise-sensitivity ratio of keys and values in each layer", passes=lambda layers: 3)
def geometry(study: Study, protocol: Protocol) -> Measured:
    """The ratio at 3 bits with a scale for each tensor, its interval over requests, and how many layers surely lie above 100.

    It is the direction that tells harmful requests from harmless ones, at the tokens of the request. Undefined where the two cannot be
    told apart: then only a lower bound is known.

    Raises
    ------
    InputError
        If the prompts have no harmless requests.
    """
    suite = study.with_harmless("geometry")
    prompts = PromptSet(suite.name, suite.requests, suite.harmless, suite.source)
    where = "paper" if protocol.mode == "released" else "cache"
    space = subspace(study.model, prompts, placement=where, progress=study.run.progress)
    scheme = Scheme(LAYER_BITS, symmetric=True, granularity="tensor")
    found = space.sensitivity(scheme, contrasts=(), seed=study.run.seed, progress=study.run.progress).data
    rows, n = list[Row](), min(len(suite.requests), len(suite.harmless))
    layers = [int(layer) for layer in found.layer.values if np.isfinite(found.ratio_low.sel(layer=layer, site="k"))]
    for site in SITES:
        for layer in layers:
            cell = found.sel(layer=layer, site=site)
            value, low, high = (float(cell[name]) for name in ("ratio", "ratio_low", "ratio_high"))
            at: dict[str, int | str] = {"site": site, "layer": str(layer)}
            rows.append(Row(at, "ratio", value, low, high, n, "x the full space", None))
            rows.append(Row(at, "ratio, at least", low, n=n, unit="x the full space", published_at=None))
        own = found.sel(site=site, layer=layers)
        rows.append(
            share(
                {"site": site, "layer": "all"},
                f"above {BAND[0]}",
                int((own.ratio_low > BAND[0]).sum()),
                len(layers),
                None,
            )
        )
    note = f"The abstract has {BAND[0]} to {BAND[1]:,}; no definition is public. This one is that of the page on definitions."
    return Measured(rows, (note,))
