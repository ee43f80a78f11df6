"""Where a flipped response leaves the one of the exact cache."""

from __future__ import annotations

import numpy as np

from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

BITS = (4, 3)
#: The classes of the released code, by the first position that differs, counted from 0.
CLASSES = {"first token": (0, 1), "token 2 to 10": (1, 10), "token 11 or later": (10, 10**9)}


@paper_table("the first token in which flipped responses differ", suites=["advbench"], passes=lambda layers: len(BITS))
def divergence(study: Study, protocol: Protocol) -> list[Row]:
    """Flipped responses by the first token that is not that of the exact cache, at 4 and 3 bits."""
    conditions = widths(protocol, BITS)
    found = study.outcomes(conditions, "advbench", "widths")
    rows = []
    for name in conditions:
        at_token = found.data.divergence.sel(recipe=name).values
        positions = at_token[found.flipped(name)]
        positions, n = positions[positions >= 0], len(positions)
        for label, (begin, end) in CLASSES.items():
            rows.append(
                share(
                    {"bits": int(name), "class": label},
                    "share of flips",
                    int(((positions >= begin) & (positions < end)).sum()),
                    n,
                )
            )
        for word, value in (("mean", np.mean), ("median", np.median)):
            place = float(value(positions)) + 1 if len(positions) else float("nan")
            rows.append(Row({"bits": int(name), "class": "all flips"}, f"{word} position", place, n=n, unit="token"))
    return rows
