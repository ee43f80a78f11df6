"""From a diagnosis to a plan: candidates are made, tried on the calibration prompts, and one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import needs_bits, resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.mitigation.candidates import KEPT, UNMITIGATED, Candidate, protect
from kvgeom.mitigation.decision_tree import advised
from kvgeom.mitigation.harmless import harmless_outcomes, harmless_under, opened_on
from kvgeom.mitigation.layers import counts, layer_orders, protections, selection_of
from kvgeom.mitigation.methods.registry import Setting, candidates_of
from kvgeom.mitigation.plan import Plan, request_hash
from kvgeom.mitigation.reasons import advice_sentence, reasons
from kvgeom.mitigation.search import Search, as_budget, preference, search_of
from kvgeom.models.statistics import constants
from kvgeom.prompts.sets import calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.diagnosis.diagnose import Diagnosis

#: How many of the caches that treat all layers alike are tried once more with layers kept in 16 bits.
COMBINED = 2


def prescribe(
    diagnosis: Diagnosis,
    *,
    memory: float = 0.02,
    scheme: CacheConfig | Scheme | str | None = None,
    bits: int | None = None,
    placement: Placement | None = None,
) -> Plan:
    """Find a cache that keeps refusals; see :meth:`kvgeom.diagnosis.diagnose.Diagnosis.prescribe`."""
    memory = as_budget(memory)
    base, geometry = diagnosis.baseline, diagnosis.baseline.model.geometry
    spec = scheme or diagnosis.curve.meta["scheme"]
    if bits is None and needs_bits(spec):
        bits = int(diagnosis.scan.meta["bits"])  # as diagnosed
    config = resolve(spec, bits=bits, placement=placement)
    if config.per_layer is not None:
        raise InputError("a plan starts from one scheme for all layers, got a recipe; give a scheme or a preset")
    if not base.refused:
        raise InputError(
            f"{base.model.name} refuses none of the {len(base.prompts)} prompts with an exact cache, so there is no refusal to keep; "
            "give requests that it refuses"
        )
    harmless = diagnosis.prompts.harmless or calibration().harmless
    base.journal.reopen()
    with closing(base.journal), base.run.bars():
        # Of both kinds: what is rounded away then reads as neither.
        known = constants(base.model, [*diagnosis.prompts.harmful, *harmless])
        setting = Setting(config, geometry, known, {})
        unmitigated = setting.unmitigated
        setting = replace(setting, orders=layer_orders(base, unmitigated.recipe, config.placement))
        paper = advised(diagnosis.paper_mode, diagnosis.scan, unmitigated)
        kept = counts(len(geometry.stores))
        by_rule = protections(unmitigated, setting.orders, kept)
        alike = [unmitigated, *candidates_of(setting, "cache", [unmitigated])]
        layered = candidates_of(setting, "layers", alike)
        placed = candidates_of(setting, "placement", [*alike, *layered])
        outcomes = _run(base, [*alike, *by_rule.values(), *layered, paper, *placed], "candidates")
        lengths = [len(base.prompts[index]) for index in base.refused]
        first = search_of(outcomes, alike, geometry, memory, lengths)
        combined = _combinations(first, alike, setting.orders["causal"], kept)
        if combined:
            outcomes = outcomes.joined(_run(base, combined, "combinations"))
    selection = selection_of(outcomes, by_rule, setting.orders, geometry)
    tried = _distinct([*alike, *layered, paper, *combined, *placed])
    search = search_of(outcomes, tried, geometry, memory, lengths)
    with opened_on(base.model, harmless, base.run, "-harmless") as other:
        assert other is not None  # noqa: S101  # there are harmless requests
        search = _screened(search, tried, other)
    sizes = [each.bytes_per_token(geometry) for each in (paper, unmitigated)]
    advice = advice_sentence(paper, outcomes.flips(paper.name)["all"], len(base.refused), sizes[0] / sizes[1] - 1)
    return Plan(
        model=base.model.name,
        identity=base.model.identity,
        geometry=geometry,
        scheme=config.name,
        mode=diagnosis.mode.name,
        paper_mode=diagnosis.paper_mode,
        chosen=next(candidate for candidate in tried if candidate.name == search.chosen),
        paper=paper,
        candidates=tuple(tried),
        reasons=(
            *reasons(diagnosis.mode, diagnosis.paper_mode, config.name, search, selection, advice),
            *_caveats(diagnosis, config),
        ),
        search=search,
        selection=selection,
        judge=base.judge.name,
        max_new_tokens=base.max_new_tokens,
        max_reasoning_tokens=base.run.max_reasoning_tokens,
        calibration=tuple(request_hash(text) for text in (*diagnosis.prompts.harmful, *harmless)),
    )


def _caveats(diagnosis: Diagnosis, config: CacheConfig) -> list[str]:
    """That requests were too short to meet any rounding, if the diagnosed cache is the one to mitigate."""
    curve = diagnosis.curve
    same = (config.name, str(config.placement)) == (curve.meta["scheme"], curve.meta["placement"])
    return [curve.caveat] if same and curve.caveat else []


def _run(base: Baseline, tried: Sequence[Candidate], title: str) -> Outcomes:
    conditions = {found.name: found.condition() for found in tried}
    return run_conditions(base, conditions, prompts=base.refused, title=title)


def _combinations(
    first: Search, alike: Sequence[Candidate], order: Sequence[int], kept: Sequence[int]
) -> list[Candidate]:
    """Layers kept in 16 bits on top of what worked best in all layers, if that leaves something to gain."""
    rows = sorted(first.records()[1:], key=preference)
    best = [row["candidate"] for row in rows[:COMBINED] if row["flips"] > 0]
    named = {candidate.name: candidate for candidate in alike}
    return [protect(named[name], order[:n], sites) for name in best for n in kept[:2] for sites in KEPT[:2]]


def _screened(search: Search, candidates: Sequence[Candidate], harmless: Baseline) -> Search:
    """Look at what the best candidates do to harmless requests, until the best ones spoil nothing."""
    by_name = {candidate.name: candidate for candidate in candidates}
    seen, outcomes = {UNMITIGATED}, None
    for within_budget in (True, False):
        while (best := next(iter(search.ranked(within_budget=within_budget)), UNMITIGATED)) not in seen:
            seen.add(best)
            outcomes = harmless_outcomes(harmless, {name: by_name[name] for name in (UNMITIGATED, best)}, outcomes)
            search = search.with_harmless(harmless_under(outcomes))
    return search


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each cache once, under the first of its names."""
    found: dict[tuple[Recipe, Placement], Candidate] = {}
    for candidate in candidates:
        found.setdefault((candidate.recipe, candidate.placement), candidate)
    return list(found.values())
