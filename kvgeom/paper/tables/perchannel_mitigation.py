"""Granularities as mitigations."""

from __future__ import annotations

from kvgeom.evaluation.condition import Condition
from kvgeom.paper.memory import overhead_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, recovered, share
from kvgeom.quant.scheme import Scheme

BITS = (4, 3)
UNIFORM = "a scale for each token"


@paper_table("flips and recovery under finer scales and a protected layer", passes=lambda layers: layers / 2 + 15)
def perchannel_mitigation(study: Study, protocol: Protocol) -> Measured:
    """Granularities of the whole cache, and what is done to the critical layer apart from the rest; all asymmetric.

    ``released``: zero points are clamped, so that scales by channel destroy channels that lie on one side of 0; the same is
    measured with zero points that are not. And what is called mixed precision rounds the other layers with one scale for a
    tensor, while the cache that it is compared with has one for each token; the same with a scale for each token is measured too.
    """
    critical = study.critical(protocol)
    conditions = {
        f"{name} {bits}": each for bits in BITS for name, each in strategies(protocol, bits, critical.first).items()
    }
    found = study.flipped(conditions, title="granularities")
    rows: list[Row] = []
    for bits in BITS:
        for name in strategies(protocol, bits, critical.first):
            at: dict[str, int | str] = {"bits": bits, "strategy": name}
            flips, before = found[f"{name} {bits}"], found[f"{UNIFORM} {bits}"]
            rows.append(share(at, "flip", int(flips.sum()), len(flips)))
            if name != UNIFORM:
                kept = [critical.first] if "16 bits" in name else []
                rows.append(recovered(at, "recovery", before, flips))
                rows += overhead_rows(
                    at, kept, conditions[f"{name} {bits}"], conditions[f"{UNIFORM} {bits}"], protocol.geometry
                )
    return Measured(rows, (critical.note, f"The critical layer is {critical.first}."))


def strategies(protocol: Protocol, bits: int, critical: int) -> dict[str, Condition]:
    """The mitigations by name."""
    token, tensor = protocol.scheme(bits), protocol.scheme(bits, "tensor")
    channel, group = protocol.scheme(bits, "channel"), protocol.scheme(bits, "group", size=64)
    plain = protocol.grid("asymmetric", bits, "channel")
    freed = Scheme(bits, granularity="channel", format="unclamped")
    found = {
        UNIFORM: protocol.over(token, family="bits"),
        "a scale for each channel": protocol.over(channel),
        **({"a scale for each channel, clamp removed": protocol.over(freed)} if plain != channel else {}),
        **({"a scale for each channel, plain asymmetric": protocol.over(plain)} if plain != channel else {}),
        "group-64": protocol.over(group),
        "critical layer in 16 bits, others by token": protocol.each(
            lambda n: (None, None) if n == critical else (token, token)
        ),
        "critical layer in 16 bits, others by tensor": protocol.each(
            lambda n: (None, None) if n == critical else (tensor, tensor)
        ),
        "critical layer by channel, others by tensor": protocol.each(
            lambda n: (channel, channel) if n == critical else (tensor, tensor)
        ),
        "critical layer by channel, others group-64": protocol.each(
            lambda n: (channel, channel) if n == critical else (group, group)
        ),
    }
    return found
