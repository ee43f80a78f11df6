"""From a diagnosis to a plan: candidates are made, tried on the calibration prompts, and one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from kvgeom.diagnosis.evaluate import Baseline, Outcomes, evaluate
from kvgeom.diagnosis.taxonomy import Mode
from kvgeom.errors import InputError
from kvgeom.mitigation.advice import advised
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate, constants, protect, whole_cache
from kvgeom.mitigation.layers import LayerSelection, counts, layer_orders, protections, selection_of
from kvgeom.mitigation.plan import Plan, request_hash
from kvgeom.mitigation.search import Search, search_of
from kvgeom.quant.placement import Placement
from kvgeom.quant.presets import resolve
from kvgeom.quant.recipe import Site

if TYPE_CHECKING:
    from kvgeom.diagnosis.diagnose import Diagnosis

#: How many of the caches that treat all layers alike are tried once more with layers kept in 16 bits.
COMBINED = 2
#: What of a layer may be kept.
KEPT: tuple[tuple[Site, ...], ...] = (("k", "v"), ("k",), ("v",))


def prescribe(
    diagnosis: Diagnosis,
    *,
    memory: float = 0.02,
    scheme: str | None = None,
    bits: int | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Find a cache that keeps refusals; see :meth:`kvgeom.diagnosis.diagnose.Diagnosis.prescribe`."""
    if not memory >= 0:
        raise InputError(f"a memory budget of {memory} was asked; give a share of the cache such as 0.02, 0 or more")
    base, geometry = diagnosis.baseline, diagnosis.baseline.model.geometry
    engine = resolve(scheme or diagnosis.curve.meta["scheme"], _width(scheme, bits, diagnosis), placement)
    if not base.refused:
        raise InputError(
            f"a plan was asked, but {base.model.name} refuses none of the {len(base.prompts)} prompts unquantized, so that "
            "none can be lost; give requests that it refuses"
        )
    base.journal.reopen()
    with closing(base.journal):
        known = constants(base.model, [prompt.text for prompt in base.prompts])
        alike = whole_cache(engine, geometry.layers, known)
        paper = advised(diagnosis.mode, diagnosis.scan, alike[0])
        orders = layer_orders(base, (engine.k, engine.v), engine.placement, seed=seed, progress=progress)
        kept = counts(geometry.layers)
        by_rule = protections(alike[0], orders, kept)
        parts = [protect(alike[0], orders["causal"][:n], sites) for n in kept for sites in KEPT[1:]]
        tried = [*alike, *by_rule.values(), *parts, paper]
        outcomes = _run(base, tried, engine.placement, progress, "candidates")
        first = search_of(outcomes, alike, geometry, engine.placement, memory)
        tried += _combinations(first, alike, orders["causal"], kept)
        outcomes = _run(base, tried, engine.placement, progress, "combinations")
    selection = selection_of(outcomes, by_rule, orders, geometry, engine.placement)
    # Layers that were drawn at random are there to compare with, and not to be chosen.
    drawn = {candidate.name for (rule, _), candidate in by_rule.items() if rule.startswith("random")}
    fair = _distinct([candidate for candidate in tried if candidate.name not in drawn])
    search = search_of(outcomes, fair, geometry, engine.placement, memory)
    sizes = [c.bytes_per_token(geometry, engine.placement) for c in (paper, alike[0])]
    advice = f"{paper.name}, {outcomes.flips(paper.name)['all']} of {len(base.refused)} lost at {sizes[0] / sizes[1] - 1:+.1%}"
    chosen = next(candidate for candidate in fair if candidate.name == search.chosen)
    return Plan(
        model=base.model.name,
        identity=base.model.identity,
        geometry=geometry,
        scheme=engine.name,
        placement=engine.placement,
        mode=diagnosis.mode.name,
        chosen=chosen,
        paper=paper,
        candidates=tuple(fair),
        reasons=_reasons(diagnosis.mode, engine.name, search, selection, advice),
        search=search,
        selection=selection,
        judge=base.judge.name,
        max_new_tokens=base.max_new_tokens,
        calibration=tuple(request_hash(prompt.text) for prompt in base.prompts),
    )


def _width(scheme: str | None, bits: int | None, diagnosis: Diagnosis) -> int | None:
    """Of the cache to mend: as asked, else as diagnosed; none where a scheme spells its own."""
    spelled = (scheme or diagnosis.curve.meta["scheme"]).startswith(("sym-", "asym-"))
    return bits if bits is not None or not spelled else int(diagnosis.scan.meta["bits"])


def _run(base: Baseline, tried: Sequence[Candidate], placement: Placement, progress: bool, title: str) -> Outcomes:
    recipes = {candidate.name: candidate.recipe for candidate in tried}
    return evaluate(base.model, recipes, base, placement=placement, refused_only=True, progress=progress, title=title)


def _combinations(
    first: Search, alike: Sequence[Candidate], order: Sequence[int], kept: Sequence[int]
) -> list[Candidate]:
    """Layers kept in 16 bits on top of what worked best in all layers, if that leaves something to gain."""
    rows = sorted(first.records()[1:], key=lambda row: (row["flips"], row["bytes_per_token"], row["margin_drop"]))
    best = [row["candidate"] for row in rows[:COMBINED] if row["flips"] > 0]
    named = {candidate.name: candidate for candidate in alike}
    return [protect(named[name], order[:n], sites) for name in best for n in kept[:2] for sites in KEPT[:2]]


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each cache once, under the first of its names."""
    found: dict[object, Candidate] = {}
    for candidate in candidates:
        found.setdefault((candidate.recipe.layers, candidate.recipe.offsets, candidate.recipe.factors), candidate)
    return list(found.values())


def _reasons(mode: Mode, scheme: str, search: Search, selection: LayerSelection, advice: str) -> tuple[str, ...]:
    rows = {str(row["candidate"]): row for row in search.records()}
    n, budget = search.meta["prompts"], search.meta["budget"]
    before, found = rows[UNMITIGATED], rows[search.chosen]
    said = [
        f"Unmitigated, {scheme} loses {before['flips']} of {n} refusals of the calibration prompts, "
        f"{before['flips_degenerate']} of them as broken text.",
        f"The paper's decision tree, for {mode.name}: {mode.prescription}. Here that is {advice} memory.",
    ]
    if before["flips"] == 0:
        said.append("Nothing is lost, so that there is nothing to mend.")
    elif search.chosen == UNMITIGATED:
        said.append(f"The measured search found nothing within {budget:.0%} more memory that keeps more refusals.")
    else:
        said.append(
            f"The measured search, within {budget:.0%} more memory, chose {search.chosen}, which {found['words']}: "
            f"{found['flips']} lost at {found['memory_overhead']:+.1%} memory."
        )
    better = [row for row in rows.values() if row["flips"] < found["flips"]]
    if better:
        cheapest = min(better, key=lambda row: (row["flips"], row["bytes_per_token"]))
        said.append(
            f"With more memory, {cheapest['candidate']} loses {cheapest['flips']} at {cheapest['memory_overhead']:+.1%}."
        )
    if before["flips"]:
        said.append(_compared(selection))
    return tuple(said)


def _compared(selection: LayerSelection) -> str:
    """The rules at the largest number of layers, in words."""
    at = selection.data.isel(kept=-1)
    flips = {str(rule): int(at.flips.sel(rule=rule)) for rule in at.rule.values}
    drawn = [count for rule, count in flips.items() if rule.startswith("random")]
    said = ", ".join(f"{rule} {count}" for rule, count in flips.items() if not rule.startswith("random"))
    return (
        f"With {int(at.kept)} layers in 16 bits ({float(at.bytes_per_token.mean()):.0f} bytes a token), refusals lost by rule "
        f"of choice: {said}, drawn at random {min(drawn)} to {max(drawn)}."
    )
