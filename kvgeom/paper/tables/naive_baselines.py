"""What needs no diagnosis: the first layers, layers by attention, group-64; against the layers that flip most."""

from __future__ import annotations

from kvgeom.paper.attention import by_attention
from kvgeom.paper.memory import overhead_rows
from kvgeom.paper.protection import BASE_BITS, UNPROTECTED, protected
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, recovered, share


@paper_table(
    "first layers, layers by attention and group-64 against the layers that flip most",
    suites=["custom", "advbench"],
    passes=lambda layers: layers / 2 + 6,
)
def naive_baselines(study: Study, protocol: Protocol) -> Measured:
    """Mitigations that need no diagnosis beside the one that the layer scan names, in a 4-bit cache, on AdvBench.

    ``released``: group-64 is symmetric there, while the cache that it is compared with is asymmetric.
    """
    critical, stores = study.critical(protocol), protocol.geometry.stores
    kept = min(2, max(1, len(stores) - 1))
    sets = {
        "layers 0 and 1": list(stores[:kept]),
        "2 layers by attention": by_attention(study, "peak", "advbench")[:kept],
        "critical layer": [critical.first],
        "2 layers that flip most": list(critical.ranked[:kept]),
    }
    conditions = protected(protocol, BASE_BITS, sets)
    group = protocol.scheme(BASE_BITS, "group", symmetric=protocol.mode == "released", size=64)
    conditions["group-64"] = protocol.over(group)
    found = study.flipped(conditions, "advbench", "naive baselines")
    rows: list[Row] = []
    for name, condition in conditions.items():
        at = {"strategy": name}
        rows.append(share(at, "flip", int(found[name].sum()), len(found[name])))
        if name != UNPROTECTED:
            rows.append(recovered(at, "recovery", found[UNPROTECTED], found[name]))
            rows += overhead_rows(at, sets.get(name, []), condition, conditions[UNPROTECTED], protocol.geometry)
    return Measured(rows, (critical.note,))
