"""The paper's protocol from end to end: PCR names a fix, and other prompts say what it does."""

from __future__ import annotations

from kvgeom.evaluation.condition import Condition
from kvgeom.paper.memory import overhead_rows
from kvgeom.paper.protection import base_bits
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import CriticalLayers, Study
from kvgeom.paper.table import Row, recovered, share
from kvgeom.paper.tables.decision_tree import branch
from kvgeom.paper.tables.taxonomy import taxonomy

#: Layers that are kept where damage is in several.
TOP = 5


@paper_table(
    "the fix that PCR of one set of prompts names, on the other set",
    suites=["custom", "advbench"],
    passes=lambda layers: layers / 2 + 8,
)
def protocol_validation(study: Study, protocol: Protocol) -> Measured:
    """PCR and spread on the first set name a fix by the paper's decision tree; flips without and with it are of the second set.

    The released code never fills these columns in. Where PCR is undefined no fix is named.
    """
    found, critical, bits = taxonomy(study, mode=protocol.mode), study.critical(protocol), base_bits(study)
    pcr = found.cell("PCR")
    chosen = branch(pcr["measured"], found.cell("pattern")["measured"])
    at: dict[str, int | str] = {"width": bits}
    rows = [Row(at, "PCR", pcr["measured"], pcr["low"], pcr["high"], pcr["n"], pcr["unit"], {})]
    if chosen is None:
        rows.append(Row(at, "fix", "none named", unit="words", published_at={}))
        return Measured(rows, (critical.note, "PCR is undefined, so that the protocol names no fix."))
    words, kept, fixed = fix(protocol, chosen, critical, bits)
    base = protocol.over(protocol.by_token(bits), family="bits")
    flips = study.flipped({"base": base, "fixed": fixed}, "advbench", "the fix")
    n = len(flips["base"])
    rows += [
        Row(at, "fix", words, unit="words", published_at={}),
        share(at, "flip", int(flips["base"].sum()), n, {}),
        share(at, "flip with the fix", int(flips["fixed"].sum()), n, {}),
        recovered(at, "recovery", flips["base"], flips["fixed"], published_at={}),
        *overhead_rows(at, kept, fixed, base, protocol.geometry),
    ]
    same = study.suites["custom"].requests == study.suites["advbench"].requests
    return Measured(
        rows, (critical.note, "Both sets are the same requests: the fix is tried on what named it." if same else "")
    )


def fix(protocol: Protocol, mode: str, critical: CriticalLayers, bits: int) -> tuple[str, list[int], Condition]:
    """What the decision tree recommends for a mode, in words; the layers that it keeps in 16 bits; and the cache."""
    token, channel = protocol.by_token(bits), protocol.scheme(bits, "channel")
    group = protocol.scheme(bits, "group", size=64)
    stores, first = list(protocol.geometry.stores), critical.first
    top = sorted(critical.ranked[: min(TOP, len(stores) - 1)])

    def keeping(layers: list[int]) -> Condition:
        return protocol.over(token, layers=[layer for layer in stores if layer not in layers], family="protect")

    if mode == "outlier-crushes-safety":
        return "group-64 in every layer", [], protocol.over(group)
    if mode == "mixed":
        mixed = protocol.each(lambda layer: (channel, channel) if layer == first else (group, group))
        return f"layer {first} by channel, group-64 elsewhere", [], mixed
    if mode == "multi-layer dilution":
        return f"layers {', '.join(map(str, top))} in 16 bits", top, keeping(top)
    if mode == "hyper-vulnerable":
        return "whole cache in 16 bits", stores, protocol.over(None)
    return f"layer {first} in 16 bits", [first], keeping([first])
