"""Flips of the paper's own set by width, with the error of keys and values."""

from __future__ import annotations

from kvgeom.paper.cells import error_row, flip_rows, widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import CATEGORIES, Study
from kvgeom.paper.table import Row, share

BITS = (8, 6, 5, 4, 3, 2)


@paper_table("error of keys and values, and flips by category, at each width", passes=lambda layers: len(BITS) + 1)
def custom_all_models(study: Study, protocol: Protocol) -> list[Row]:
    """The paper's main table: its own prompts under a uniform cache, by width and category."""
    conditions = widths(protocol, BITS)
    found = study.outcomes(conditions, title="widths")
    asked = study.suites["custom"].categories
    present = [each for each in CATEGORIES if each in asked]
    rows = [
        share({"bits": 16}, f"{each} prompts refused", len(study.refused(category=each)), asked.count(each))
        for each in present
    ]
    for name, condition in conditions.items():
        at = {"bits": int(name)}
        rows.append(error_row(at, study.error(condition), len(asked)))
        for each in present:
            rows += flip_rows(at, found, name, study.refused(category=each), f"{each} flip")
    return rows
