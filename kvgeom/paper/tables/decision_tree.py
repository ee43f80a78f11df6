"""The paper's decision tree, and the branch that a model falls into."""

from __future__ import annotations

from kvgeom.behaviour.pcr import THRESHOLDS
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.published import published
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row
from kvgeom.paper.tables.taxonomy import taxonomy

#: The pattern of a model whose every layer is above 10 %, and those of several critical layers.
ALL, SEVERAL = "hyper-vulnerable", ("distributed-early", "ultra-distributed")


@paper_table("the branch of the paper's decision tree that a model falls into", passes=lambda layers: layers / 2 + 6)
def decision_tree(study: Study, protocol: Protocol) -> Measured:
    """From PCR and spread to the mitigation that the paper recommends; no measurement stands behind a recommendation here."""
    found = taxonomy(study, mode=protocol.mode)
    pcr, pattern = found.cell("PCR"), found.cell("pattern")
    chosen = branch(pcr["measured"], pattern["measured"])
    rows = [
        Row(
            dict(value.at),
            "mitigation",
            "applies" if value.at["mode"] == chosen else "does not apply",
            n=pcr["n"],
            unit="words",
        )
        for value in published().tables["decision_tree"].values
    ]
    return Measured(rows, () if chosen else ("PCR is undefined, so that no branch applies.",))


def branch(pcr: float, pattern: str) -> str | None:
    """The mode that the tree ends in; None where PCR is undefined.

    Examples
    --------
    >>> branch(0.15, "concentrated"), branch(0.5, "concentrated"), branch(0.9, "distributed-early")
    ('outlier-as-safety', 'mixed', 'multi-layer dilution')
    """
    if pattern == ALL:
        return ALL
    if pcr != pcr:
        return None
    low, high = THRESHOLDS
    if pcr > high:
        return "multi-layer dilution" if pattern in SEVERAL else "outlier-crushes-safety"
    return "outlier-as-safety" if pcr < low else "mixed"
