"""Flips with the first or the last k layers rounded."""

from __future__ import annotations

from kvgeom.evaluation.condition import Condition
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, share

DIRECTIONS = ("first", "last")


@paper_table("flips with the first or last k layers rounded, every k", passes=lambda layers: 1.5 * layers)
def cumulative(study: Study, protocol: Protocol) -> list[Row]:
    """The first and the last k layers at 3 bits, symmetric, one scale for a tensor, for every k."""
    conditions = ends(protocol)
    found = study.flipped(conditions_by_name(conditions), title="first and last layers")
    return [
        share({"direction": side, "k": k}, "flip", int(values.sum()), len(values))
        for (side, k) in conditions
        for values in [found[f"{side} {k}"]]
    ]


def ends(protocol: Protocol) -> dict[tuple[str, int], Condition]:
    """The conditions by direction and number of layers."""
    stores, scheme = list(protocol.geometry.stores), protocol.by_tensor(LAYER_BITS)
    return {
        (side, k): protocol.over(scheme, layers=stores[:k] if side == "first" else stores[-k:], family=f"{side} layers")
        for side in DIRECTIONS
        for k in range(1, len(stores) + 1)
    }


def conditions_by_name(conditions: dict[tuple[str, int], Condition]) -> dict[str, Condition]:
    """The same by ``"first 3"``."""
    return {f"{side} {k}": condition for (side, k), condition in conditions.items()}
