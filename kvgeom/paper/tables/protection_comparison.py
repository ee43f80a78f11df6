"""The best set of protected layers beside group-64 scales."""

from __future__ import annotations

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.diagnosis.taxonomy import pattern_of
from kvgeom.paper.memory import overhead_rows
from kvgeom.paper.protection import UNPROTECTED, base_bits, layer_sets, protected
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, recovered


@paper_table("the best protection of the sweep, and group-64 scales", passes=lambda layers: layers / 2 + 14)
def protection_comparison(study: Study, protocol: Protocol) -> Measured:
    """The set of layers that flips least, of equals the smallest, beside what group-64 scales take away.

    The set is the best of several on the same prompts, so that its recovery is too high by what choosing adds.
    """
    critical, bits = study.critical(protocol), base_bits(study)
    sets = layer_sets(critical, protocol.geometry.stores)
    conditions = protected(protocol, bits, sets)
    found = study.flipped(conditions, title="protected layers")
    group = protocol.scheme(LAYER_BITS, "group", symmetric=True, size=64)
    scales = study.flipped(
        {"tensor": protocol.over(protocol.by_tensor(LAYER_BITS)), "group-64": protocol.over(group)}, title="group-64"
    )
    n = len(found[UNPROTECTED])
    best = min(sets, key=lambda name: (int(found[name].sum()), len(sets[name])))
    over = sum(int(flips.sum()) > CRITICAL_SHARE * n for flips in critical.flips.values())
    at: dict[str, int | str] = {"layers": study.model.geometry.layers}
    rows = [
        Row(at, "pattern", pattern_of(over, len(critical.flips)), n=n, unit="words", published_at={}),
        Row(at, "width", bits, unit="bits", published_at={}),
        Row(at, "best protection", f"layers {best}", n=n, unit="words", published_at={}),
        recovered(at, "recovery", found[UNPROTECTED], found[best], published_at={}),
        *overhead_rows(at, sets[best], conditions[best], conditions[UNPROTECTED], protocol.geometry),
        recovered(at, "group-64 reduction", scales["tensor"], scales["group-64"], published_at={}),
    ]
    return Measured(rows, (critical.note,))
