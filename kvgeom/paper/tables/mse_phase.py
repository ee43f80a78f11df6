"""Does the error of keys and values foretell the collapse? Errors and flips side by side."""

from __future__ import annotations

import numpy as np

from kvgeom.paper.cells import error_row, flip_rows, widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row

BITS = (4, 3, 2)


@paper_table("growth of the error of keys and values beside that of flips", passes=lambda layers: len(BITS) + 1)
def mse_phase(study: Study, protocol: Protocol) -> list[Row]:
    """Mean squared error of keys and values at 4, 3 and 2 bits, relative to that at 4, beside the flips."""
    conditions = widths(protocol, BITS)
    found, n = study.outcomes(conditions, title="widths"), len(study.base().prompts)
    errors = {name: study.error(condition) for name, condition in conditions.items()}
    at_four = float(np.mean(errors["4"]))
    rows = []
    for name in conditions:
        at = {"bits": int(name)}
        relative = float(np.mean(errors[name])) / at_four if at_four else float("nan")
        rows += [error_row(at, errors[name], n), Row(at, "relative MSE", relative, n=n, unit="x 4 bits")]
        rows += flip_rows(at, found, name)
    return rows
