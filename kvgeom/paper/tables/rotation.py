"""Does a rotation of keys and values save what rounding takes, and does PCR foretell it?"""

from __future__ import annotations

from dataclasses import replace

from kvgeom.paper.cells import flip_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, recovered, repeated
from kvgeom.paper.tables.pcr_framework import pcr_framework
from kvgeom.quant.scheme import Scheme

BITS = (4, 3)
PLAIN, ROTATED = "plain", "rotated"


def caches(protocol: Protocol, bits: int) -> dict[str, Scheme]:
    """The uniform cache, and the same after a Hadamard rotation of each head."""
    plain = protocol.by_token(bits)
    return {PLAIN: plain, ROTATED: replace(plain, format="int", transform="hadamard")}


@paper_table(
    "flips with and without a rotation before rounding",
    suites=["custom", "advbench"],
    passes=lambda layers: layers / 2 + 2 * len(BITS) + 6,
)
def rotation(study: Study, protocol: Protocol) -> Measured:
    """Flips at 4 and 3 bits, plain and with each head of keys and values rotated by a Hadamard matrix first.

    A rotation spreads an outlier over its head, as finer scales would leave it alone: where PCR is high it should help, and where
    PCR is low it should not. Both numbers stand here side by side; the authors' own table is not released.
    """
    conditions = {
        f"{name} {bits}": protocol.over(scheme, family="rotation")
        for bits in BITS
        for name, scheme in caches(protocol, bits).items()
    }
    found = study.outcomes(conditions, "advbench", "rotations")
    rows: list[Row] = []
    for bits in BITS:
        for name in (PLAIN, ROTATED):
            rows += flip_rows({"bits": bits, "cache": name}, found, f"{name} {bits}")
        before, after = (found.flipped(f"{name} {bits}") for name in (PLAIN, ROTATED))
        rows.append(recovered({"bits": bits, "cache": ROTATED}, "recovery", before, after))
    pcr = pcr_framework(study, mode=protocol.mode).cell("PCR", grid="symmetric")
    rows.append(repeated({"bits": 3, "cache": "critical layer"}, "PCR", pcr))
    note = "The rotation is that of each head (kvgeom.quant.transforms); the one of the paper is not public."
    return Measured(rows, (note, study.critical(protocol).note))
