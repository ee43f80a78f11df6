"""Layers kept in 16 bits: what each set of them recovers, and what it costs."""

from __future__ import annotations

from kvgeom.paper.protection import base_bits, layer_sets, protection_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study


@paper_table("flips, recovery and memory with sets of layers kept in 16 bits", passes=lambda layers: layers / 2 + 12)
def protection_sweep(study: Study, protocol: Protocol) -> Measured:
    """The sets of layers that the released code protects, in a cache that is asymmetric with a scale for each token.

    Memory is printed twice: layers kept by layers, which is the paper's overhead, and bytes, which is what they cost.
    """
    critical, bits = study.critical(protocol), base_bits(study)
    rows = protection_rows(study, protocol, bits, layer_sets(critical, protocol.geometry.stores))
    return Measured(rows, (critical.note, f"The other layers have {bits} bits."))
