"""Does it matter by what rule layers are chosen? Damage, attention, position."""

from __future__ import annotations

import numpy as np

from kvgeom.paper.attention import by_attention
from kvgeom.paper.protection import BASE_BITS, UNPROTECTED, protected, protection_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.stats import mcnemar

KEPT = 2


@paper_table(
    "recovery by two layers chosen by damage, attention, position and chance", passes=lambda layers: layers / 2 + 9
)
def causal_vs_attention(study: Study, protocol: Protocol) -> Measured:
    """The same number of layers kept in a 4-bit cache, chosen by different rules.

    By damage: those whose rounding alone flips most. By attention: the two rules of the released code. The first layers, and
    three draws at random, which no rule that knows something should lose to.
    """
    critical, stores = study.critical(protocol), protocol.geometry.stores
    kept = min(KEPT, max(1, len(stores) - 1))
    rng = np.random.default_rng(study.run.seed)
    rules = {
        "damage": list(critical.ranked[:kept]),
        "attention, peak": by_attention(study, "peak")[:kept],
        "attention, entropy": by_attention(study, "entropy")[:kept],
        "first": list(stores[:kept]),
        **{f"random {n}": sorted(map(int, rng.choice(stores, kept, replace=False))) for n in (1, 2, 3)},
    }
    names = {f"{rule} ({', '.join(map(str, layers))})": layers for rule, layers in rules.items()}
    rows = protection_rows(study, protocol, BASE_BITS, names, column="chosen by (layers)")
    return Measured(rows, (critical.note, claim(study, protocol, rules)))


def claim(study: Study, protocol: Protocol, rules: dict[str, list[int]]) -> str:
    """What is seen of the claim that choosing by attention fails, in a sentence."""
    found = study.flipped(protected(protocol, BASE_BITS, rules), title="rules")
    if not found[UNPROTECTED].any():
        return "The cache loses nothing unprotected, so that no rule can be told from another."
    p = {rule: mcnemar(found[rule], found["damage"]) for rule in rules if rule.startswith("attention")}
    sides = [
        f"{rule}: {int(found[rule].sum())} flips against {int(found['damage'].sum())} by damage, p = {value:.2g}"
        for rule, value in p.items()
    ]
    return f"McNemar's exact test of the same prompts. {'; '.join(sides)}."
