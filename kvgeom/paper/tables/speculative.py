"""Does speculative decoding change what flips?"""

from __future__ import annotations

from dataclasses import replace

from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.journal import NoJournal
from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

BITS = (8, 4, 3)


@paper_table("flips under speculative decoding", passes=lambda layers: 3 * len(BITS))
def speculative(study: Study, protocol: Protocol) -> Measured:
    """Flips at 8, 4 and 3 bits, decoded token by token and with a draft, and the responses in which the two differ.

    The draft of each response is the one of the exact cache. It is verified greedily: a token is kept only where it is what the rounded
    cache would have written. The paper's draft is a smaller model, which changes how many tokens are kept and, by the same rule, not
    which.
    """
    base, conditions = study.base(), widths(protocol, BITS)
    drafted = study.outcomes(conditions, title="with a draft")
    plain = run_conditions(
        replace(base, journal=NoJournal()),
        conditions,
        prompts=base.refused,
        full_responses=True,
        title="token by token",
    )
    rows: list[Row] = []
    n = len(base.refused)
    for name in conditions:
        at: dict[str, int | str] = {"bits": int(name)}
        one, other = (found.data.sel(recipe=name) for found in (plain, drafted))
        differ = (one.label.values != other.label.values) | (one.divergence.values != other.divergence.values)
        rows += [
            share(at, "flip, token by token", int(plain.flipped(name).sum()), n, None),
            share(at, "flip, with a draft", int(drafted.flipped(name).sum()), n),
            share(at, "responses that differ", int(differ.sum()), n, None),
        ]
    note = (
        "Greedy verification keeps what the model itself would have written: a difference comes from the last digit of float arithmetic, "
        "in which a token read alone and one read among others are not alike."
    )
    return Measured(rows, (note,))
