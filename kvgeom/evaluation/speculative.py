"""Speculative decoding of responses under recipes: the response with an exact cache is the draft of each.

A teacher-forced pass over prompt and draft shows the first token at which a recipe's argmax is another one: up to there
its greedy response is the draft. Only what diverges is generated, from its first divergence on, on the cache that the
pass has left. All recipes share the pass; one that leaves the first layers alone joins it above them, and one that has
diverged in the first few tokens leaves it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.respond import respond
from kvgeom.evaluation.scores import kl_divergence
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.models.cache import EditedCache
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe

#: So many tokens of a draft are checked in the pass over its prompt. Recipes that round the whole cache have mostly left
#: it by then; single layers mostly never do, and the second pass costs them nothing but reading the weights once more.
OPENING = 4
#: The rest is checked in pieces of so many tokens: reasoning is long, and the logits of all of it would fill the memory.
PIECE = 256


@dataclass(frozen=True)
class Answer:
    """The response to one prompt under one recipe, as far as it was needed.

    Attributes
    ----------
    recipe : str
    prompt : int
    tokens : tuple of int
    margin, kl : float
        At the first response position, in nats; NaN for a margin where the model refuses nothing.
    divergence : int
        The first token that is not that of the exact cache, -1 if there is none as far as was read.
    """

    recipe: str
    prompt: int
    tokens: tuple[int, ...]
    margin: float
    kl: float
    divergence: int


@dataclass(frozen=True)
class PartialResponse:
    """A response to prompt number ``prompt``: its tokens so far, the next one, and the cache of all before that."""

    prompt: int
    tokens: Sequence[int]
    next_token: int
    cache: EditedCache


@dataclass(frozen=True)
class _Diverged:
    """An answer that leaves its draft, as far as it is known."""

    answer: Answer
    partial: PartialResponse


def verified(
    base: Baseline,
    work: Mapping[int, Sequence[str]],
    recipes: Mapping[str, Recipe],
    placement: Placement,
) -> Iterator[Answer]:
    """Answers to some prompts under some recipes, in the order in which they are settled.

    Costs, per prompt and recipe (less the layers below the first that it touches), a pass over the prompt and the opening
    of its draft; over the rest of the draft where the opening holds; and decoding of what diverges, as many together as
    memory holds, whatever their prompt and recipe.

    Parameters
    ----------
    base : Baseline
    work : mapping of prompt number to names of recipes
    recipes : mapping of name to Recipe
    placement : Placement
    """
    rows, diverged = base.batch_rows, list[_Diverged]()
    for index, names in work.items():
        for found in _verify_prompt(base, index, {name: recipes[name] for name in names}, placement):
            if isinstance(found, Answer):
                yield found
            else:
                diverged.append(found)
        # Neighbours of one recipe are rounded as one batch.
        diverged.sort(key=lambda row: row.answer.recipe)
        while len(diverged) >= rows:
            batch, diverged = diverged[:rows], diverged[rows:]
            yield from _continue(base, batch)
    yield from _continue(base, diverged)


def _verify_prompt(
    base: Baseline, index: int, recipes: Mapping[str, Recipe], placement: Placement
) -> Iterator[Answer | _Diverged]:
    """Compare one prompt's draft with what each recipe would have answered."""
    draft = base.tokens[index]
    for name in recipes:
        if not recipes[name].touched:
            yield Answer(name, index, draft, base.exact_margin(index), 0.0, -1)
    names = sorted((name for name in recipes if recipes[name].touched), key=lambda name: recipes[name].first_touched)
    stages = _stages(base, index, placement)
    rows = rows_per_batch(base.model, sum(map(len, stages)), max(OPENING, *map(len, stages[1:]), 1))
    for _, found in in_batches(names, rows, lambda part: _verify_batch(base, index, part, recipes, placement, stages)):
        yield from found


def _stages(base: Baseline, index: int, placement: Placement) -> list[Sequence[int]]:
    """Prompt and draft in the pieces in which they are run: up to the opening's last check, and what is left of the draft."""
    prompt, draft = base.prompts[index].ids, base.tokens[index]
    # The last token of a draft is only read where one more argmax, the end, is to be checked.
    ids = [*prompt, *(draft if base.ended[index] else draft[:-1])]
    # An engine whose prefill reads exact values rounds after it: prompt and response are two calls there.
    cut = len(prompt) + (0 if placement.prefill_reads == "exact" else OPENING - 1)
    rest = [ids[begin : begin + PIECE] for begin in range(cut, len(ids), PIECE)]
    return [ids[:cut], *rest]


def _verify_batch(
    base: Baseline,
    index: int,
    part: Sequence[str],
    recipes: Mapping[str, Recipe],
    placement: Placement,
    stages: Sequence[Sequence[int]],
) -> list[Answer | _Diverged]:
    """One batch of recipes against the draft; those that have left it do not run the later stages."""
    model, draft, prompt_tokens = base.model, base.tokens[index], len(base.prompts[index])
    edits = [Quantizer(recipes[name], placement, prompt_tokens=prompt_tokens) for name in part]
    cache = model.branching_cache(edits)
    found: list[Answer | _Diverged] = []
    alive, checked = list(range(len(part))), 0
    scores: list[tuple[float, float]] = []
    for ids in stages:
        last = len(ids) if checked else len(ids) - prompt_tokens + 1
        first = [recipes[part[row]].first_touched if model.branches_late else 0 for row in alive]
        logits = model.forward_branches(ids, [edits[row] for row in alive], first, cache=cache, last=last)
        # One transfer for the batch instead of one for each number.
        argmax = [[None if t in model.stop_tokens else t for t in row] for row in logits[1:].argmax(-1).tolist()]
        if not scores:
            kl = kl_divergence(logits[:1, 0], logits[1:, 0]).double().tolist()
            scores = list(zip(base.margins(logits[1:, 0]), kl, strict=True))
        agree = []
        for place, row in enumerate(alive):
            at = diverges_at([*draft[:checked], *argmax[place]], draft, base.ended[index])
            if at < 0:
                agree.append(place)
                continue
            answer = Answer(part[row], index, draft[:at], *scores[row], at)
            token = argmax[place][at - checked]
            if token is None:
                found.append(answer)
            else:
                left = cache.row(place + 1, prompt_tokens + at)
                found.append(_Diverged(answer, PartialResponse(index, answer.tokens, token, left)))
        alive, checked = [alive[place] for place in agree], checked + last
        if not alive:
            break
        if len(agree) < len(argmax):
            cache.keep(torch.tensor([0, *(place + 1 for place in agree)], device=model.device))
    return found + [Answer(part[row], index, draft, *scores[row], -1) for row in alive]


def diverges_at(response: Sequence[int | None], draft: Sequence[int], ended: bool) -> int:
    """Where a response leaves its draft, as far as both are known; -1 if it does not.

    Parameters
    ----------
    response : sequence of int or None
        Its tokens; None is the end.
    draft : sequence of int
    ended : bool
        Whether the draft ends there.
    """
    expected = [*draft, None] if ended else draft
    return next((at for at, (a, b) in enumerate(zip(response, expected, strict=False)) if a != b), -1)


def _continue(base: Baseline, diverged: Sequence[_Diverged]) -> Iterator[Answer]:
    """Go on from the first divergence."""
    responses = complete(base, [row.partial for row in diverged])
    for row, tokens in zip(diverged, responses, strict=True):
        yield replace(row.answer, tokens=tokens)


def complete(base: Baseline, partial: Sequence[PartialResponse]) -> Iterator[tuple[int, ...]]:
    """Whole responses, each until its label is settled; as many are decoded together as memory holds."""

    def run(part: Sequence[PartialResponse]) -> list[list[int]]:
        prompts = [base.prompts[row.prompt] for row in part]
        watch = base.reader.watch(prompts)
        return base.model.generate(
            [row.cache for row in part],
            [row.next_token for row in part],
            max(base.reader.longest(prompt) for prompt in prompts),
            batch_size=len(part),
            stop=lambda row, tokens: watch(row, [*part[row].tokens, *tokens]),
        )

    for part, responses in in_batches(partial, base.batch_rows, run):
        for row, tokens in zip(part, responses, strict=True):
            yield (*row.tokens, *tokens)


def generated(
    base: Baseline,
    work: Mapping[int, Sequence[str]],
    recipes: Mapping[str, Recipe],
    placement: Placement,
    *,
    full: bool = True,
) -> Iterator[Answer]:
    """The same answers, each generated: a prefill for every prompt and recipe, then decoding in batches.

    With ``full`` to the end, else until the label is settled.
    """
    model, rows = base.model, base.batch_rows
    for name in recipes:
        chosen = [index for index, names in work.items() if name in names]
        for begin in range(0, len(chosen), rows):
            part = chosen[begin : begin + rows]
            prompts = [base.prompts[index] for index in part]
            found = respond(
                model,
                prompts,
                max(base.reader.longest(prompt) for prompt in prompts),
                caches=[model.new_cache(Quantizer(recipes[name], placement)) for _ in part],
                batch_size=rows,
                stop=base.reader.watch(prompts, to_end=full),
            )
            margins = base.margins(found.first_logits)
            for row, (index, tokens) in enumerate(zip(part, found.tokens, strict=True)):
                kl = float(kl_divergence(base.prefill(index).logits, found.first_logits[row]))
                # Where it is shorter than its draft it has ended, for both were read by one judge.
                at = diverges_at([*tokens, None], base.tokens[index], base.ended[index])
                yield Answer(name, index, tuple(tokens), margins[row], kl, at)
