"""Keeping layers in 16 bits: what several tables try, and what is recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvgeom.evaluation.condition import Condition
from kvgeom.models.zoo import in_zoo
from kvgeom.paper.memory import overhead_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.published import published
from kvgeom.paper.study import CriticalLayers, Study
from kvgeom.paper.table import Row, recovered, share

#: Name of the cache in which no layer is kept.
UNPROTECTED = "none"
#: Width of the cache where the paper names none for the model.
BASE_BITS = 4


def base_bits(study: Study) -> int:
    """The width that the paper protects this model at; 4 of other models."""
    known = in_zoo(study.model.name)
    value = None if known is None else published().find("protection_comparison", "width", known.name)
    return BASE_BITS if value is None else int(value.value)  # type: ignore[arg-type]


def layer_sets(critical: CriticalLayers, stores: Sequence[int]) -> dict[str, list[int]]:
    """The sets of layers that the released code protects, by name; equal ones once, and never all layers.

    The critical layer; layers from the first on, 2 to 8 of them where it is among the first three, else up to it and one to
    three more; and the 2 to 5 that flip most.
    """
    place = list(stores).index(critical.first)
    counts = range(2, 9) if place <= 2 else range(place + 1, place + 5)
    sets = [[critical.first], *(list(stores[:count]) for count in counts)]
    sets += [list(critical.ranked[:count]) for count in range(2, 6)]
    unique = dict.fromkeys(tuple(sorted({*each})) for each in sets)
    return {",".join(map(str, each)): list(each) for each in unique if len(each) < len(stores)}


def protected(protocol: Protocol, bits: int, sets: Mapping[str, Sequence[int]]) -> dict[str, Condition]:
    """The uniform cache, and the same with each set of layers kept in 16 bits."""
    scheme, stores = protocol.by_token(bits), protocol.geometry.stores
    kept = {
        name: protocol.over(scheme, layers=[n for n in stores if n not in layers], family="protect")
        for name, layers in sets.items()
    }
    return {UNPROTECTED: protocol.over(scheme, family="bits"), **kept}


def protection_rows(
    study: Study,
    protocol: Protocol,
    bits: int,
    sets: Mapping[str, Sequence[int]],
    suite: str = "custom",
    column: str = "protected",
) -> list[Row]:
    """Flips, recovery and memory of each set of layers."""
    conditions = protected(protocol, bits, sets)
    found = study.flipped(conditions, suite, "protected layers")
    rows = []
    for name, condition in conditions.items():
        at, flips = {column: name}, found[name]
        rows.append(share(at, "flip", int(flips.sum()), len(flips)))
        if name != UNPROTECTED:
            rows.append(recovered(at, "recovery", found[UNPROTECTED], flips))
            rows += overhead_rows(at, sets[name], condition, conditions[UNPROTECTED], protocol.geometry)
    return rows
