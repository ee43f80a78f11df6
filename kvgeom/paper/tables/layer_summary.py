"""What the layers of a model have in common: how many are critical, and how much the worst one loses."""

from __future__ import annotations

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share
from kvgeom.stats import shares_above


@paper_table(
    "the critical layer, how many lose more than 10 %, and the most that one loses",
    passes=lambda layers: layers / 2 + 1,
)
def layer_summary(study: Study, protocol: Protocol) -> Measured:
    """The critical layer, the number of layers above 10 % and the largest flip of a single layer.

    How many layers are above 10 % is counted as the paper counts it, and bounded: how many are so for sure, and how many
    are not surely below (exact binomial tests, adjusted for the number of layers).
    """
    found = study.critical(protocol)
    counts = [int(values.sum()) for values in found.flips.values()]
    n = len(study.base().refused)
    sides = shares_above(counts, n, CRITICAL_SHARE)
    sure, open_ = sides.count("above"), sides.count("open")
    over = sum(count > CRITICAL_SHARE * n for count in counts)
    at: dict[str, int | str] = {"layers": study.model.geometry.layers}
    rows = [
        Row(at, "critical layer", found.first if found.alone else "none", n=n, unit="layer", published_at={}),
        Row(at, "layers over 10 %", over, sure, sure + open_, n, "layers", published_at={}),
        share(at, "largest single-layer flip", max(counts), n, {}),
    ]
    return Measured(rows, (found.note,))
