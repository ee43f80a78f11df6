"""KIVI against a scale for each token."""

from __future__ import annotations

from kvgeom.engines.registry import resolve
from kvgeom.evaluation.condition import Condition
from kvgeom.paper.cells import flip_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, recovered
from kvgeom.quant.scheme import Scheme

BITS = (4, 2)


@paper_table("flips under KIVI against a scale for each token", suites=["advbench"], passes=lambda layers: 2 * 3 + 1)
def kivi(study: Study, protocol: Protocol) -> Measured:
    """KIVI beside the uniform cache at 4 and 2 bits, and what it recovers of what that loses.

    ``released``: the simulation of the released code, which has neither a residual window nor groups of tokens, once as it is and
    once with zero points that are not clamped. ``faithful``: KIVI's own cache, groups of 32, the newest 128 tokens exact.
    """
    conditions = {f"{cache} {bits}": condition for bits in BITS for cache, condition in caches(protocol, bits).items()}
    found = study.outcomes(conditions, "advbench", "KIVI")
    rows: list[Row] = []
    for bits in BITS:
        before = found.flipped(f"a scale for each token {bits}")
        for cache in caches(protocol, bits):
            at: dict[str, int | str] = {"bits": bits, "cache": cache}
            rows += flip_rows(at, found, f"{cache} {bits}")
            if cache != "a scale for each token":
                rows.append(recovered(at, "recovery", before, found.flipped(f"{cache} {bits}")))
    note = ""
    if protocol.mode == "faithful":
        longest = max(len(prompt) for prompt in study.base("advbench").prompts) + study.run.max_new_tokens
        if longest <= 128:
            note = f"No sequence has more than {longest} tokens, so that KIVI's residual window of 128 holds all: nothing is rounded."
    return Measured(rows, (note,))


def caches(protocol: Protocol, bits: int) -> dict[str, Condition]:
    """The uniform cache and what KIVI makes of it, by name."""
    uniform = {"a scale for each token": protocol.over(protocol.by_token(bits), family="bits")}
    if protocol.mode == "faithful":
        config = resolve("kivi", bits=bits)
        recipe = config.recipe(protocol.geometry.layers)
        return uniform | {
            "KIVI": protocol.each(lambda layer: recipe.layers[layer], family="kivi", placement=config.placement)
        }

    def simulated(form: str) -> Condition:
        keys = Scheme(bits, False, "channel", format=form)
        values = Scheme(bits, False, "group", 32, format=form)
        return protocol.over(keys, values=values, family="kivi", placement=protocol.kivi_placement)

    return uniform | {"KIVI, clamped": simulated("released"), "KIVI, not clamped": simulated("int")}
