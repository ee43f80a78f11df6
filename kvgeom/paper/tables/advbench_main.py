"""Refusals of AdvBench by width."""

from __future__ import annotations

from kvgeom.paper.cells import flip_rows, widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

BITS = (8, 4, 3, 2)


@paper_table("conditional flips of AdvBench at each width", suites=["advbench"], passes=lambda layers: len(BITS) + 1)
def advbench_main(study: Study, protocol: Protocol) -> list[Row]:
    """Refusals of AdvBench with an exact cache and under a uniform cache, by width."""
    base, conditions = study.base("advbench"), widths(protocol, BITS)
    found = study.outcomes(conditions, "advbench", "widths")
    refused, asked = len(base.refused), len(base.prompts)
    rows = [share({"bits": 16}, "refused", refused, asked)]
    for name in conditions:
        rows += flip_rows({"bits": int(name)}, found, name, quantity="conditional flip")
    return rows
