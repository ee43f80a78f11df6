"""The critical layer: the one whose rounding alone flips most."""

from __future__ import annotations

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.diagnosis.taxonomy import pattern_of
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share


@paper_table(
    "the layer whose rounding alone flips most, and the pattern of layers", passes=lambda layers: layers / 2 + 1
)
def individual_layer(study: Study, protocol: Protocol) -> Measured:
    """Each layer alone at 3 bits, symmetric, one scale for a tensor: which flips most, and how damage is spread."""
    found = study.critical(protocol)
    flips = {layer: int(values.sum()) for layer, values in found.flips.items()}
    n = len(study.base().refused)
    over = sum(count > CRITICAL_SHARE * n for count in flips.values())
    at: dict[str, int | str] = {"layers": study.model.geometry.layers}
    rows = [
        Row(at, "critical layer", found.first if found.alone else "none", n=n, unit="layer", published_at={}),
        share(at, "single-layer flip", flips[found.first], n, {}),
        Row(at, "pattern", pattern_of(over, len(flips)), n=n, unit="words", published_at={}),
    ]
    return Measured(rows, (found.note,))
