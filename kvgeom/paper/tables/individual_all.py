"""Flips with each layer rounded alone, all layers."""

from __future__ import annotations

from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share


@paper_table("flips with each layer rounded alone", passes=lambda layers: layers / 2 + 1)
def individual_all(study: Study, protocol: Protocol) -> list[Row]:
    """Each layer alone at 3 bits, symmetric, one scale for a tensor."""
    found = study.critical(protocol).flips
    return [share({"layer": layer}, "flip", int(values.sum()), len(values)) for layer, values in sorted(found.items())]
