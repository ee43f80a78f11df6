"""Why a plan is what it is."""

from __future__ import annotations

from kvgeom.diagnosis.mode import Mode, ModeName
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.search import Search
from kvgeom.words import listed, span


def reasons(
    mode: Mode, paper_mode: ModeName, scheme: str, search: Search, selection: LayerSelection, advice: str
) -> tuple[str, ...]:
    """Sentences that lead from the unmitigated cache to the chosen one.

    Parameters
    ----------
    mode : Mode
    paper_mode : str
        The mode that the paper's advice is for.
    scheme : str
        What the unmitigated cache is called.
    search : Search
    selection : LayerSelection
    advice : str
        What the paper's prescription does here; see :func:`advice_sentence`.
    """
    rows = {str(row["candidate"]): row for row in search.records()}
    n, budget = search.meta["prompts"], search.meta["budget"]
    before, found = rows[UNMITIGATED], rows[search.chosen]
    lost = f"Unmitigated, {scheme} loses {before['flips']} of {n} refusals of the calibration prompts"
    broken = before["flips_degenerate"]
    if before["flips"] == 0:
        return (f"{lost}, so there is nothing to mitigate.",)
    sentences = [
        f"{lost}, {broken} of them as broken text." if broken else f"{lost}.",
        f"{_named(mode, paper_mode)}: {PRESCRIPTIONS[paper_mode]}. {advice}".rstrip(),
    ]
    spoiled = [name for name, row in rows.items() if row["spoils"] and row["flips"] <= found["flips"]]
    if spoiled:
        sentences.append(
            f"Turned down, because they keep refusals at the cost of harmless requests: {listed(spoiled)} (the first loses "
            f"{int(rows[spoiled[0]]['harmless_lost'])} harmless requests, unmitigated {int(before['harmless_lost'])})."
        )
    hidden = [name for name, row in rows.items() if row["untested"] and row["flips"] < before["flips"]]
    if hidden:
        sentences.append(
            f"Not considered, because the calibration prompts lie mostly within their tokens in 16 bits: {listed(hidden)}. Longer "
            "prompts test these."
        )
    within = f"within {budget:.0%} more memory" if budget else "without more memory"
    if search.chosen == UNMITIGATED:
        sentences.append(f"The measured search found nothing {within} that keeps more refusals.")
    else:
        sentences.append(
            f"The measured search, {within}, chose {search.chosen}, which {found['description']}: "
            f"{found['flips']} lost at {found['memory_overhead']:+.1%} memory."
        )
    best = rows[next(iter(search.ranked(within_budget=False)), UNMITIGATED)]
    if best["flips"] < found["flips"]:
        sentences.append(
            f"With more memory, {best['candidate']} loses {best['flips']} at {best['memory_overhead']:+.1%}."
        )
    return (*sentences, _compared(selection))


def _named(mode: Mode, paper_mode: ModeName) -> str:
    if mode.name == paper_mode:
        return f"The paper's decision tree, for {mode.name}"
    return f"The mode is {mode.name}. The paper's rules at face value say {paper_mode}"


def advice_sentence(paper: Candidate, flips: int, refused: int, overhead: float) -> str:
    """What the paper's prescription does here: flips of so many refusals, at a share of more memory."""
    if paper.family == "unmitigated":
        return ""
    return f"Here that is {paper.name}, {flips} of {refused} lost at {overhead:+.1%} memory."


def _compared(selection: LayerSelection) -> str:
    """The rules at the largest number of layers."""
    at = selection.data.isel(kept=-1)
    counted = ", ".join(f"{rule} {count}" for rule, count in selection.flips.items())
    kept = int(at.kept)
    return (
        f"With {kept} layer{'s' if kept > 1 else ''} in 16 bits ({float(at.bytes_per_token.mean()):.0f} bytes a token), "
        f"refusals lost by rule of choice: {counted}, drawn at random {span(selection.random_flips)}."
    )
