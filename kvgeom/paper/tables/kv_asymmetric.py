"""Keys alone, values alone, both."""

from __future__ import annotations

from kvgeom.paper.cells import error_row, flip_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row

BITS = (4, 3)
PARTS = ("keys", "values", "both")


@paper_table(
    "flips with keys alone, values alone and both rounded", suites=["advbench"], passes=lambda layers: 2 * 3 + 1
)
def kv_asymmetric(study: Study, protocol: Protocol) -> list[Row]:
    """Keys, values and both at 4 and 3 bits, asymmetric with a scale for each token."""
    conditions = {
        f"{part} {bits}": protocol.over(
            None if part == "values" else protocol.by_token(bits),
            values=None if part == "keys" else protocol.by_token(bits),
            family="site",
        )
        for bits in BITS
        for part in PARTS
    }
    found, n = study.outcomes(conditions, "advbench", "keys and values"), len(study.base("advbench").prompts)
    rows = []
    for bits in BITS:
        for part in PARTS:
            name = f"{part} {bits}"
            at: dict[str, int | str] = {"bits": bits, "rounded": part}
            rows += [*flip_rows(at, found, name), error_row(at, study.error(conditions[name], "advbench"), n)]
    return rows
