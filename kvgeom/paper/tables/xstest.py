"""Refusals of harmful and of harmless requests by width: does a cache make a model refuse what it should answer?"""

from __future__ import annotations

from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

BITS = (8, 6, 5, 4, 3, 2)


@paper_table("refusals of harmful and of harmless requests at each width", passes=lambda layers: 2 * (len(BITS) + 1))
def xstest(study: Study, protocol: Protocol) -> Measured:
    """Shares of harmful and of harmless requests that are refused, with an exact cache and at each width, and newly refused ones.

    Give XSTest as ``prompts`` (``--prompts xstest=FILE``); without it the calibration set has harmless twins of its own.

    Raises
    ------
    InputError
        If the prompts have no harmless requests.
    """
    conditions, rows = widths(protocol, BITS), list[Row]()
    for kind, base in (("harmful", study.base()), ("harmless", study.harmless("xstest"))):
        found = run_conditions(base, conditions, title=f"{kind} requests")
        labels = {name: found.data.label.sel(recipe=name).values for name in ("exact", *conditions)}
        for name, own in labels.items():
            at: dict[str, int | str] = {"bits": 16 if name == "exact" else int(name), "requests": kind}
            refused = own == "refused"
            newly = int((refused & (labels["exact"] != "refused")).sum())
            rows.append(share(at, "refused", int(refused.sum()), len(own), None))
            rows.append(share(at, "newly refused", newly, int((labels["exact"] != "refused").sum()), None))
    return Measured(rows)
