"""From a diagnosis to a plan: candidates are made, tried on the calibration prompts, and one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import needs_bits, resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate, protect, whole_cache
from kvgeom.mitigation.decision_tree import advised
from kvgeom.mitigation.harmless import asked, harmless_under
from kvgeom.mitigation.layers import counts, layer_orders, protections, selection_of
from kvgeom.mitigation.plan import Plan, request_hash
from kvgeom.mitigation.reasons import advice_in_words, reasons
from kvgeom.mitigation.search import Search, check_budget, preference, search_of
from kvgeom.models.statistics import constants
from kvgeom.prompts.sets import calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme

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
    scheme: CacheConfig | Scheme | str | None = None,
    bits: int | None = None,
    placement: Placement | None = None,
) -> Plan:
    """Find a cache that keeps refusals; see :meth:`kvgeom.diagnosis.diagnose.Diagnosis.prescribe`."""
    check_budget(memory)
    base, geometry = diagnosis.baseline, diagnosis.baseline.model.geometry
    spec = scheme or diagnosis.curve.meta["scheme"]
    if bits is None and needs_bits(spec):
        bits = int(diagnosis.scan.meta["bits"])  # as diagnosed
    engine = resolve(spec, bits=bits, placement=placement)
    if engine.per_layer is not None:
        raise InputError("a plan starts from one scheme for all layers, got a recipe; give a scheme or a preset")
    if not base.refused:
        raise InputError(
            f"a plan was asked, but {base.model.name} refuses none of the {len(base.prompts)} prompts unquantized, so that "
            "none can be lost; give requests that it refuses"
        )
    harmless = diagnosis.prompts.harmless or calibration().harmless
    base.journal.reopen()
    with closing(base.journal), base.run.bars():
        # Of both kinds: what is rounded away then reads as neither.
        known = constants(base.model, [*diagnosis.prompts.harmful, *harmless])
        alike = whole_cache(engine, geometry, known)
        paper = advised(diagnosis.mode, diagnosis.scan, alike[0])
        orders = layer_orders(base, alike[0].recipe, engine.placement)
        kept = counts(geometry.layers)
        by_rule = protections(alike[0], orders, kept)
        parts = [protect(alike[0], orders["causal"][:n], sites) for n in kept for sites in KEPT[1:]]
        tried = [*alike, *by_rule.values(), *parts, paper]
        outcomes = _run(base, tried, engine.placement, "candidates")
        first = search_of(outcomes, alike, geometry, engine.placement, memory)
        combined = _combinations(first, alike, orders["causal"], kept)
        outcomes = outcomes.joined(_run(base, combined, engine.placement, "combinations"))
        tried += combined
    selection = selection_of(outcomes, by_rule, orders, geometry, engine.placement)
    # Layers that were drawn at random are there to compare with, and not to be chosen.
    drawn = {candidate.name for (rule, _), candidate in by_rule.items() if rule.startswith("random")}
    fair = _distinct([candidate for candidate in tried if candidate.name not in drawn])
    search = search_of(outcomes, fair, geometry, engine.placement, memory)
    with asked(base.model, harmless, base.run, "-harmless") as other:
        assert other is not None  # noqa: S101  # there are harmless requests
        search = _screened(search, fair, other, engine.placement)
    sizes = [c.bytes_per_token(geometry, engine.placement) for c in (paper, alike[0])]
    advice = advice_in_words(paper, outcomes.flips(paper.name)["all"], len(base.refused), sizes[0] / sizes[1] - 1)
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
        reasons=(*reasons(diagnosis.mode, engine.name, search, selection, advice), *_caveats(diagnosis, engine)),
        search=search,
        selection=selection,
        judge=base.judge.name,
        max_new_tokens=base.max_new_tokens,
        calibration=tuple(request_hash(text) for text in (*diagnosis.prompts.harmful, *harmless)),
    )


def _caveats(diagnosis: Diagnosis, engine: CacheConfig) -> list[str]:
    """That requests were too short to meet any rounding, if the diagnosed cache is the one to mend."""
    curve = diagnosis.curve
    same = (engine.name, str(engine.placement)) == (curve.meta["scheme"], curve.meta["placement"])
    return [curve.caveat] if same and curve.caveat else []


def _run(base: Baseline, tried: Sequence[Candidate], placement: Placement, title: str) -> Outcomes:
    conditions = {found.name: Condition(found.recipe, placement, family="mitigation") for found in tried}
    return run_conditions(base, conditions, prompts=base.refused, title=title)


def _combinations(
    first: Search, alike: Sequence[Candidate], order: Sequence[int], kept: Sequence[int]
) -> list[Candidate]:
    """Layers kept in 16 bits on top of what worked best in all layers, if that leaves something to gain."""
    rows = sorted(first.records()[1:], key=preference)
    best = [row["candidate"] for row in rows[:COMBINED] if row["flips"] > 0]
    named = {candidate.name: candidate for candidate in alike}
    return [protect(named[name], order[:n], sites) for name in best for n in kept[:2] for sites in KEPT[:2]]


def _screened(search: Search, candidates: Sequence[Candidate], harmless: Baseline, placement: Placement) -> Search:
    """Look at what the best candidates do to harmless requests, until the best ones spoil nothing."""
    recipes = {candidate.name: candidate.recipe for candidate in candidates}
    seen: set[str] = {UNMITIGATED}
    for within_budget in (True, False):
        while (best := next(iter(search.ranked(within_budget=within_budget)), UNMITIGATED)) not in seen:
            seen.add(best)
            asked_of = {name: recipes[name] for name in (UNMITIGATED, best)}
            search = search.with_harmless(harmless_under(harmless, asked_of, placement))
    return search


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each cache once, under the first of its names."""
    found: dict[Recipe, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.recipe, candidate)
    return list(found.values())
