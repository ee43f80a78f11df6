"""The fix as one page: no network, no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvgeom.diagnosis.mode import Mode
from kvgeom.mitigation.candidates import UNMITIGATED
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.verify import CHOSEN, Verification
from kvgeom.plots.mitigation import layer_selection, pareto_front
from kvgeom.plots.mode import mode_card
from kvgeom.plots.recovery import memory_bars, recovery_bars
from kvgeom.report.fix_text import (
    COLUMNS,
    before_and_after,
    left_by_chance,
    perplexity,
    rules_compared,
    size_or_direction,
)
from kvgeom.report.html import conversation_rows, drawn, made_text, page, prompts_text, section
from kvgeom.stats import percent

#: Edge of the verdict by its status.
_TONES = {"helps": "good", "does not help": "bad"}


def render(plan: Plan, found: Verification, mode: Mode, sentences: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The whole page as text; everything that a model, a user or a file name brought in is escaped.

    Parameters
    ----------
    plan, found, mode, sentences, settings
        Of a :class:`~kvgeom.report.fix.Fix`: its plan, verification, failure mode, sentences and settings.
    """
    return page(
        "fix.html",
        kicker="KV cache fix",
        model=plan.model,
        scheme=plan.scheme,
        headline=found.sentence,
        sentences=sentences,
        tone=_TONES.get(found.status, ""),
        cards=_cards(plan, found),
        comparison={"columns": COLUMNS, "rows": before_and_after(found)},
        examples=found.meta["examples"],
        sections=_sections(plan, found),
        reasons=plan.reasons,
        mode=mode,
        mode_figure=drawn(mode_card(mode), "Failure mode"),
        exports=plan.exports() if plan.chosen.placement.where == "cache" else (),
        status=found.status,
        judged=found.meta,
        provenance=_provenance(plan, settings),
    )


def _cards(plan: Plan, found: Verification) -> list[dict[str, str]]:
    before, after = (found.data.sel(recipe=role) for role in (UNMITIGATED, CHOSEN))
    recovery = found.recovery
    harmless = found.meta["harmless"]
    return [
        {
            "title": "refusals lost",
            "value": f"{int(before.flips)} → {int(after.flips)}",
            "note": f"of {found.meta['refused']}, on prompts that did not choose the plan",
        },
        {
            "title": "recovery",
            "value": "-" if recovery is None or recovery.open else percent(recovery.value),
            "note": "nothing was lost" if recovery is None else f"95 % interval {recovery.interval}",
        },
        {
            "title": "memory",
            "value": f"{float(after.memory_overhead):+.1%}",
            "note": f"against {plan.scheme}; {float(after.memory_of_exact):.1%} of the 16-bit cache",
        },
        {
            "title": "perplexity",
            "value": perplexity(found, CHOSEN),
            "note": f"against the exact cache; without the plan {perplexity(found, UNMITIGATED)}",
        },
        {
            "title": "harmless requests refused",
            "value": f"{int(after.harmless_refused)} of {harmless}" if harmless else "not asked",
            "note": f"{found.meta['harmless_refused']} with an exact cache" if harmless else "the set has none",
        },
    ]


def _sections(plan: Plan, found: Verification) -> list[dict[str, Any]]:
    sections = [
        section(
            "What each candidate keeps, and what it costs",
            f"Every cache that was tried, on the {plan.search.meta['prompts']} calibration prompts that the model refuses: the prompts "
            "that chose the plan, so that this picture is optimistic for what it singles out. Down is safer, left is smaller. "
            "Whiskers are 95 % intervals; the tooltips name each cache.",
            pareto_front(plan.search, plan.paper_tried),
            plan.search.to_frame(),
        ),
        section(
            "How much is recovered on other prompts",
            "Recovery is 1 - lost / lost unmitigated, with its 95 % interval. Diamonds are controls: the error of the same cache, as "
            "large in every token and layer, but in a random direction. If they flip as many refusals, the size of the "
            f"error matters and not its direction. {size_or_direction(found)} {left_by_chance(found)}",
            recovery_bars(found),
            found.to_frame(),
        ),
    ]
    if plan.selection is not None:
        sections.append(
            section(
                "Which layers are worth 16 bits",
                "The unmitigated cache with some layers kept in 16 bits, chosen by the refusal margin that they cost when rounded alone "
                "(causal), from the first on, by attention from the last prompt token to the request, or at random. At the same number "
                f"of layers all cost the same memory. {rules_compared(plan.selection)}",
                layer_selection(plan.selection),
                plan.selection.to_frame(),
            )
        )
    sections.append(
        section(
            "Memory",
            "Bytes of a token in all layers, scales and offsets included, of a prompt of 4,096 tokens.",
            memory_bars(found),
        )
    )
    return sections


def _provenance(plan: Plan, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    shape = plan.geometry
    return [
        ("model", f"{plan.model} (fingerprint {settings['fingerprint']}, identity {plan.identity})"),
        ("weights", settings["weights"]),
        *(("note", note) for note in settings.get("notes", ())),
        ("runs on", settings["runs_on"]),
        (
            "cache",
            "; ".join(filter(None, [str(shape), shape.note, f"{plan.scheme}, {plan.placement}"])),
        ),
        ("budget", f"{100 * settings['memory']:.3g} % more memory than unmitigated"),
        ("chosen on", prompts_text(settings["calibration"])),
        ("proven on", prompts_text(settings["verification"])),
        *conversation_rows(settings),
        (
            "responses",
            f"greedy, at most {plan.max_new_tokens} tokens after at most {plan.max_reasoning_tokens} of reasoning, if any; judge: "
            f"{plan.judge}",
        ),
        ("made", made_text(settings)),
    ]
