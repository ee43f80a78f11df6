"""Is the order of the layers the same under another quantizer?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, share
from kvgeom.stats import rank_correlation


@paper_table(
    "each layer alone under the quantizers of sections 4 and 5, and whether they rank layers alike",
    suites=["advbench"],
    passes=lambda layers: layers + 1,
)
def scheme_transfer(study: Study, protocol: Protocol) -> Measured:
    """Flips of each layer alone at 3 bits: symmetric with one scale for a tensor, and asymmetric with a scale for each token.

    Whether they rank layers alike is measured across halves of the prompts (:func:`kvgeom.stats.rank_correlation`), and undefined where
    halves do not agree with themselves; beside it stands what is seen, which noise makes smaller.
    """
    schemes = {"section 4": protocol.by_tensor(LAYER_BITS), "section 5": protocol.by_token(LAYER_BITS)}
    stores = protocol.geometry.stores
    conditions = {
        f"{section}, layer {layer}": protocol.over(scheme, layers=[layer], family="layer")
        for section, scheme in schemes.items()
        for layer in stores
    }
    flips = study.flipped(conditions, "advbench", "single layers")
    n = len(study.refused("advbench"))
    rows = [
        share({"layer": str(layer)}, f"flip, {section}", int(flips[f"{section}, layer {layer}"].sum()), n)
        for layer in stores
        for section in schemes
    ]
    first, second = (
        xr.DataArray(
            np.array([flips[f"{section}, layer {layer}"] for layer in stores], dtype=float),
            dims=("layer", "prompt"),
            coords={"layer": list(stores)},
        )
        for section in schemes
    )
    found = rank_correlation(first, second, seed=study.run.seed)
    rows += [
        Row({"layer": "all"}, "rank correlation", found.value, found.low, found.high, n, "Spearman", None),
        Row({"layer": "all"}, "rank correlation, as seen", found.seen, n=n, unit="Spearman", published_at=None),
    ]
    worst = {
        section: int(stores[int(counts.sum("prompt").argmax("layer"))])
        for section, counts in zip(schemes, (first, second), strict=True)
    }
    same = "the same layer" if len({*worst.values()}) == 1 else "different layers"
    note = (
        f"Most flips come from {same} ({', '.join(f'{section}: {layer}' for section, layer in worst.items())})."
        if n
        else ""
    )
    return Measured(rows, (note,))
