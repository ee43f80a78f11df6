"""Per-channel reduction at the critical layer, under three grids, and what group-64 scales do to the whole cache."""

from __future__ import annotations

from kvgeom.behaviour.scan import GRANULARITIES
from kvgeom.paper.protocol import GRIDS, Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, recovered, share


@paper_table(
    "per-channel reduction under three grids, and group-64 scales",
    passes=lambda layers: layers / 2 + 2 * len(GRIDS) / 2 + 3,
)
def pcr_framework(study: Study, protocol: Protocol) -> Measured:
    """PCR at the critical layer, and the flips that group-64 scales in every layer take away, at 3 bits.

    PCR is reported under the symmetric grid (the paper's), under the asymmetric grid of the released code, which clamps the zero
    point, and under an asymmetric grid that does not: what PCR says of a model is a property of model and grid. It is undefined
    where a scale for a tensor flips nothing, which the released code calls 0. The paper counts its prediction right where PCR
    is above 50 % and the reduction by group-64 above 30 %, or PCR below 30 % and the reduction below 10 %.
    """
    critical = study.critical(protocol)
    at_layer = {
        f"{grid}, {granularity}": protocol.over(
            protocol.grid(grid, LAYER_BITS, granularity), layers=[critical.first], family="layer"
        )
        for grid in GRIDS
        for granularity in GRANULARITIES
    }
    group = protocol.scheme(LAYER_BITS, "group", symmetric=True, size=64)
    everywhere = {"all, tensor": protocol.over(protocol.by_tensor(LAYER_BITS)), "all, group-64": protocol.over(group)}
    found = study.flipped(at_layer | everywhere, title="granularities")
    rows = [
        Row(
            {"grid": "symmetric"},
            "critical layer",
            critical.first,
            n=len(study.base().refused),
            unit="layer",
            published_at={},
        )
    ]
    for grid in GRIDS:
        before, after = (found[f"{grid}, {granularity}"] for granularity in GRANULARITIES)
        at, n = {"grid": grid}, len(before)
        theirs: dict[str, int | str] | None = {} if grid == "symmetric" else None
        rows += [
            share(at, "per-tensor flip", int(before.sum()), n, theirs),
            share(at, "per-channel flip", int(after.sum()), n, theirs),
            recovered(at, "PCR", before, after, published_at=theirs),
        ]
    tensor, group64 = found["all, tensor"], found["all, group-64"]
    at, n = {"grid": "symmetric"}, len(tensor)
    reduction = recovered(at, "group-64 reduction", tensor, group64, published_at={})
    pcr = next(row for row in rows if row.quantity == "PCR")
    rows += [
        share(at, "per-tensor flip, all layers", int(tensor.sum()), n, {}),
        share(at, "group-64 flip, all layers", int(group64.sum()), n, {}),
        reduction,
        Row(
            at,
            "prediction",
            prediction(float(pcr.measured), float(reduction.measured)),
            n=n,
            unit="words",
            published_at={},
        ),
    ]
    return Measured(rows, (critical.note,))


def prediction(pcr: float, reduction: float) -> str:
    """Whether the paper counts PCR as right.

    Examples
    --------
    >>> prediction(0.9, 0.5), prediction(0.1, 0.05), prediction(0.4, 0.5), prediction(float("nan"), 0.5)
    ('right', 'right', 'not right', 'undefined')
    """
    if pcr != pcr or reduction != reduction:
        return "undefined"
    right = (pcr > 0.5 and reduction > 0.3) or (pcr < 0.3 and reduction < 0.1)
    return "right" if right else "not right"
