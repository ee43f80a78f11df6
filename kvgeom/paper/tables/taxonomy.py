"""The failure mode that the paper's rules name from a model's numbers."""

from __future__ import annotations

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.diagnosis.taxonomy import pattern_of, published_mode
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, repeated
from kvgeom.paper.tables.pcr_framework import pcr_framework


@paper_table("the failure mode that the paper's rules name", passes=lambda layers: layers / 2 + 6)
def taxonomy(study: Study, protocol: Protocol) -> Measured:
    """PCR, group-64 reduction and spread of a model, and the mode that the paper's rules make of them.

    The rules take each number for certain; ``kvgeom diagnose`` decides by intervals, and says when a mode is undetermined. Where
    a number is undefined, because nothing flips that could be reduced, so is the mode.
    """
    found, critical = pcr_framework(study, mode=protocol.mode), study.critical(protocol)
    pcr, reduction = (found.cell(name, grid="symmetric") for name in ("PCR", "group-64 reduction"))
    n = len(study.base().refused)
    over = sum(int(flips.sum()) > CRITICAL_SHARE * n for flips in critical.flips.values())
    pattern = pattern_of(over, len(critical.flips))
    undefined = [
        name for name, cell in (("PCR", pcr), ("group-64 reduction", reduction)) if cell["measured"] != cell["measured"]
    ]
    mode = "undefined" if undefined else published_mode(pcr["measured"], pattern, 2 * (reduction["measured"],))
    at: dict[str, int | str] = {"layers": study.model.geometry.layers}
    rows = [
        repeated(at, "PCR", pcr, {}),
        repeated(at, "group-64 reduction", reduction),
        Row(at, "pattern", pattern, n=n, unit="words", published_at=None),
        Row(at, "mode", mode, n=n, unit="words", published_at={}),
    ]
    why = f"Undefined: {' and '.join(undefined)}; nothing flips that could be reduced." if undefined else ""
    return Measured(rows, (critical.note, why))
