"""Keep some layers in 16 bits, or only their keys or values."""

from __future__ import annotations

from collections.abc import Iterator

from kvgeom.mitigation.candidates import KEPT, Candidate, protect
from kvgeom.mitigation.layers import counts, is_random, protections
from kvgeom.mitigation.methods.registry import Setting, method


@method("protect", stage="layers")
def protected_layers(setting: Setting) -> Iterator[Candidate]:
    """The layers that cost most of the refusal margin, and those of simpler rules; layers drawn at random are no candidates."""
    base, kept = setting.unmitigated, counts(len(setting.geometry.stores))
    rules = {rule: order for rule, order in setting.orders.items() if not is_random(rule)}
    yield from protections(base, rules, kept).values()
    if "causal" in rules:
        yield from (protect(base, rules["causal"][:n], sites) for n in kept for sites in KEPT[1:])
