"""First layers against last layers."""

from __future__ import annotations

from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share
from kvgeom.paper.tables.cumulative import conditions_by_name, ends
from kvgeom.stats import mcnemar

SOME = (1, 3, 5, 10)


@paper_table("flips of the first k layers against those of the last k", passes=lambda layers: 1.5 * len(SOME))
def asymmetry(study: Study, protocol: Protocol) -> list[Row]:
    """Flips with the first and with the last 1, 3, 5 and 10 layers rounded, their ratio, and whether they differ.

    The p-value is McNemar's exact one, of the same prompts; the ratio is undefined where the last layers flip nothing.
    """
    conditions = {key: each for key, each in ends(protocol).items() if key[1] in SOME}
    found = study.flipped(conditions_by_name(conditions), title="first and last layers")
    rows = []
    for k in sorted({k for _, k in conditions}):
        first, last = found[f"first {k}"], found[f"last {k}"]
        n, front, back = len(first), int(first.sum()), int(last.sum())
        at = {"k": k}
        rows += [
            share(at, "flip of the first", front, n),
            share(at, "flip of the last", back, n),
            Row(at, "ratio", front / back if back else float("nan"), n=n, unit="x the last"),
            Row(at, "p (McNemar)", mcnemar(first, last), n=n, unit="p", published_at=None),
        ]
    return rows
