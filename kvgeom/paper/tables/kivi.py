"""KIVI against a scale for each token."""

from __future__ import annotations

import math
from dataclasses import replace

from kvgeom.engines.registry import resolve
from kvgeom.evaluation.condition import Condition
from kvgeom.paper.cells import flip_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, recovered
from kvgeom.quant.scheme import Scheme

BITS = (4, 2)
UNIFORM = "a scale for each token"
#: The newest tokens that stay exact: KIVI's own, and as few as its groups allow.
WINDOWS = (128, 32)


@paper_table("flips under KIVI against a scale for each token", suites=["advbench"], passes=lambda layers: 2 * 4 + 1)
def kivi(study: Study, protocol: Protocol) -> Measured:
    """KIVI beside the uniform cache at 4 and 2 bits, and what it recovers of what that loses.

    ``released``: the simulation of the released code, which has neither a residual window nor groups of tokens, once as it is and
    once with the clamp alone removed, and once on a plain asymmetric grid, whose levels need not hold 0. ``faithful``: KIVI's own cache in groups of 32, with the newest 128 tokens exact, as
    its authors have it, and with the newest 32. A cache that is so short that nothing of it is rounded recovers nothing.
    """
    conditions = {f"{cache} {bits}": condition for bits in BITS for cache, condition in caches(protocol, bits).items()}
    found = study.outcomes(conditions, "advbench", "KIVI")
    rows: list[Row] = []
    for bits in BITS:
        before = found.flipped(f"{UNIFORM} {bits}")
        for cache in caches(protocol, bits):
            at: dict[str, int | str] = {"bits": bits, "cache": cache}
            rows += flip_rows(at, found, f"{cache} {bits}")
            if cache != UNIFORM:
                met = rounded(study, conditions[f"{cache} {bits}"])
                row = recovered(at, "recovery", before, found.flipped(f"{cache} {bits}"))
                rows += [
                    row if met else replace(row, measured="nothing is rounded", low=math.nan, high=math.nan),
                    Row(at, "prompts that meet rounding", met, n=row.n, unit="prompts", published_at=None),
                ]
    return Measured(rows)


def rounded(study: Study, condition: Condition) -> int:
    """Refused prompts of which anything that is read has been rounded, with the longest answer."""
    base, placement = study.base("advbench"), condition.placement
    spans = any(
        scheme is not None and scheme.spans_tokens for scheme in condition.recipe.layers[condition.recipe.touched[0]]
    )
    lengths = [(len(base.prompts[index]), base.longest(index)) for index in base.refused]
    return sum(placement.rounds(prompt, prompt + answer - 1, spans) for prompt, answer in lengths)


def caches(protocol: Protocol, bits: int) -> dict[str, Condition]:
    """The uniform cache and what KIVI makes of it, by name."""
    uniform = {UNIFORM: protocol.over(protocol.by_token(bits), family="bits")}
    if protocol.mode == "faithful":
        recipe = resolve("kivi", bits=bits).recipe(protocol.geometry.layers)
        return uniform | {
            f"KIVI, {window} exact": protocol.each(
                lambda layer: recipe.layers[layer],
                family="kivi",
                placement=replace(protocol.kivi_placement, residual=window),
            )
            for window in WINDOWS
        }

    def simulated(form: str) -> Condition:
        keys = Scheme(bits, False, "channel", format=form)
        values = Scheme(bits, False, "group", 32, format=form)
        return protocol.over(keys, values=values, family="kivi", placement=protocol.kivi_placement)

    return uniform | {
        "KIVI, clamped": simulated("released"),
        "KIVI, clamp removed": simulated("unclamped"),
        "KIVI, plain asymmetric": simulated("int"),
    }
