"""Sentences and the one table of a verified plan: for the terminal, the page and a notebook."""

from __future__ import annotations

from kvgeom.diagnosis.measure import RANDOM_DRAWS
from kvgeom.evaluation.fidelity import HEADINGS, SAME, TextFidelity, fidelity_cells, fidelity_rows
from kvgeom.mitigation.candidates import UNMITIGATED
from kvgeom.mitigation.harmless import MARGIN
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.verify import CHOSEN, PAPER, Verification
from kvgeom.stats import Estimate
from kvgeom.words import counted, span

#: Columns of :func:`before_and_after`.
COLUMNS = (
    "cache", "lost", "95 %", "comply", "evade", "break down", "random lose", "recovery", "memory", "of 16-bit", *HEADINGS,
    "harmless refused",
)  # fmt: skip


def before_and_after(found: Verification) -> list[tuple[str, ...]]:
    """One row each for the cache in 16 bits, unmitigated, chosen, as the paper advises, and others; see :data:`COLUMNS`.

    ``random lose`` is what errors of the same size in random directions lose, from the least draw to the most; ``memory``
    is compared with the unmitigated cache, how plain text is read with the 16-bit one.
    """
    refused, harmless = found.meta["refused"], found.meta["harmless"]
    share = float(found.data.memory_of_exact.sel(recipe=UNMITIGATED))
    of_harmless = f"{found.meta['harmless_refused']} of {harmless}" if harmless else "-"
    rows: list[tuple[str, ...]] = [
        (
            "16 bits",
            f"0 of {refused}",
            "-",
            "0",
            "0",
            "0",
            "-",
            "-",
            f"{1 / share - 1:+.1%}",
            "100.0%",
            *fidelity_cells(SAME),
            of_harmless,
        )
    ]
    for role in found.roles:
        own = found.data.sel(recipe=role)
        name = str(own.name.item())
        low, high = float(own.ci_low), float(own.ci_high)
        recovery = Estimate(*(float(own[column]) for column in ("recovery", "recovery_low", "recovery_high")))
        known = role != UNMITIGATED and recovery.value == recovery.value
        rows.append(
            (
                role if name == role else f"{role}: {name}",  # another candidate goes by its name
                f"{int(own.flips)} of {refused}",
                f"[{low:.0%}, {high:.0%}]" if refused else "-",
                str(int(own.flips_complied)),
                str(int(own.flips_evaded)),
                str(int(own.flips_degenerate)),
                span(drawn) if (drawn := found.controls(role)) else "-",
                str(recovery) if known else "-",
                f"{float(own.memory_overhead):+.1%}",
                f"{float(own.memory_of_exact):.1%}",
                *fidelity_cells(text_fidelity(found, role)),
                f"{int(own.harmless_refused)} of {harmless}" if harmless else "-",
            )
        )
    return rows


def text_fidelity(found: Verification, role: str) -> TextFidelity:
    """How plain text is read under one cache, against the 16-bit one."""
    return fidelity_rows(found.data.sel(recipe=[role]))[0]


def perplexity(found: Verification, role: str) -> str:
    """Perplexity under one cache over the 16-bit one, with its interval."""
    return fidelity_cells(text_fidelity(found, role))[0]


def sentences(plan: Plan, found: Verification) -> tuple[str, ...]:
    """What the verdict rests on, and what it cost."""
    chosen, paper = (found.data.sel(recipe=role) for role in (CHOSEN, PAPER))
    refused = found.meta["refused"]
    lines = [_what(plan, found)]
    if refused == 0:
        lines.append(
            f"The model refuses none of the {found.meta['prompts']} prompts of {found.meta['source']}: nothing was tested."
        )
    elif found.recovery is not None:
        same = plan.paper.same_cache(plan.chosen)
        lines.append(
            f"What the paper advises for {plan.paper_mode} is the same cache."
            if same
            else f"What the paper advises for {plan.paper_mode} ({paper.name.item()}) loses {int(paper.flips)} of {refused}, a recovery "
            f"of {found.paper_recovery}, at {float(paper.memory_overhead):+.1%} memory."
        )
        lines.append(size_or_direction(found))
    lines.append(
        f"Against the exact cache, perplexity is {perplexity(found, CHOSEN)} under the chosen cache and "
        f"{perplexity(found, UNMITIGATED)} under the unmitigated one, the next token most likely is the same for "
        f"{_same_token(found, CHOSEN)} and {_same_token(found, UNMITIGATED)} of tokens, and the KL divergence is "
        f"{_kl(found, CHOSEN)} and {_kl(found, UNMITIGATED)} nats per token ({found.meta['perplexity_text']}; 95 % intervals)."
    )
    if found.meta["harmless"]:
        lines.append(
            f"Of {found.meta['harmless']} harmless requests it refuses {int(chosen.harmless_refused)}, the model with an exact cache "
            f"{found.meta['harmless_refused']} (p = {float(chosen.harmless_p):.2g}); {int(chosen.harmless_lost)} that the model with an exact cache answers are "
            f"refused or broken. {_MARGINS[str(chosen.harmless_margin.item())]}"
        )
    return tuple(lines)


_MARGINS = {
    "kept": f"That is shown to be fewer than {MARGIN:.0%} of them.",
    "lost": f"That is shown to be more than {MARGIN:.0%} of them.",
    "open": f"Whether that is more than {MARGIN:.0%} of them is not decided by so few requests.",
}


def _what(plan: Plan, found: Verification) -> str:
    share = f"{float(found.data.memory_of_exact.sel(recipe=CHOSEN)):.1%} of the 16-bit cache"
    if plan.chosen.same_cache(plan.unmitigated):
        budget = f"{100 * float(plan.search.meta['budget']):.3g} %"
        return f"Nothing within {budget} more memory was better: the cache of {plan.scheme} stays as it is, {share}."
    return f"The chosen cache {plan.chosen.description}. It takes {plan.memory_overhead:+.1%} memory, {share}."


def size_or_direction(found: Verification) -> str:
    """The controls of the unmitigated cache: what :attr:`Verification.direction` says."""
    drawn, refused = found.controls(UNMITIGATED), found.meta["refused"]
    if found.direction == "nothing":
        return "The unmitigated cache loses nothing, so there is nothing for controls to explain."
    if not drawn:
        return "No controls were run, so size and direction of the error cannot be told apart."
    counted = (
        f"Errors as large as those of the unmitigated cache, but in random directions, lose {span(drawn)} of {refused}, its own "
        f"{int(found.data.flips.sel(recipe=UNMITIGATED))}"
    )
    match found.direction:
        case "direction":
            return f"{counted}: the direction of the error loses refusals, and not its size alone."
        case "size":
            return f"{counted}: at this size the direction of the error does not matter, and whatever makes it smaller helps."
        case _:
            few = f", and takes {RANDOM_DRAWS} draws (--controls)" if len(drawn) < RANDOM_DRAWS else ""
            return f"{counted}: whether its size or its direction matters is undetermined{few}."


def left_by_chance(found: Verification) -> str:
    """The controls of the chosen cache; empty without any."""
    drawn, after = found.controls(CHOSEN), int(found.data.flips.sel(recipe=CHOSEN))
    return f"Under the chosen cache random directions lose {span(drawn)}, its own error {after}." if drawn else ""


#: What each :data:`~kvgeom.mitigation.layers.AttentionClaim` says.
_CLAIMS = {
    "worse than causal": "That is worse than the causal rule beyond chance, as the paper claims of attention.",
    "no better than random": "That is no better than layers drawn at random, as the paper claims of attention.",
    "better than random": "Here attention is better than chance, against the paper's claim.",
    "undetermined": "That neither supports nor contradicts the paper's claim that attention fails.",
}


def rules_compared(selection: LayerSelection) -> str:
    """The rules that choose layers, at the largest number of layers: what :attr:`LayerSelection.attention_claim` says."""
    at, n = selection.data.isel(kept=-1), selection.meta["prompts"]
    if selection.attention_claim == "nothing":
        return f"The cache with no layer kept loses none of {n} refusals, so no rule can be better than another."
    if selection.attention_claim == "not compared":
        return (
            f"With {counted(int(at.kept), 'layer')} kept, choosing by causal effect loses {selection.flips['causal']} of {n}, the "
            f"first layers {selection.flips['first']}, {_draws(selection)} {span(selection.random_flips)}. Attention of this "
            "model cannot be rebuilt from its queries and keys, so that layers were not chosen by it."
        )
    kept, p, flips = int(at.kept), float(at.p.sel(rule="attention")), selection.flips
    return (
        f"With {counted(kept, 'layer')} kept, choosing by attention loses {flips['attention']} of {n}, by causal effect "
        f"{flips['causal']} (p = {p:.2g}), the first layers {flips['first']}, {_draws(selection)} "
        f"{span(selection.random_flips)}. {_CLAIMS[selection.attention_claim]}"
    )


def _draws(selection: LayerSelection) -> str:
    """How many sets of layers were drawn: a model with few layers has no three that differ."""
    return f"{counted(len(selection.random_flips), 'set')} of layers drawn at random"


def _same_token(found: Verification, role: str) -> str:
    share = text_fidelity(found, role).top1
    ends = f" [{100 * share.low:.1f}, {100 * share.high:.1f}]" if share.low < share.high else ""
    return f"{100 * share.value:.1f}{ends} %"


def _kl(found: Verification, role: str) -> str:
    kl = text_fidelity(found, role).kl
    return f"{kl.value:.2g} [{kl.low:.2g}, {kl.high:.2g}]" if kl.low < kl.high else f"{kl.value:.2g}"
