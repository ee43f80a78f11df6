"""Greedy responses under recipes, with the unquantized response as a draft of each.

One teacher-forced pass over prompt and draft shows the first token at which a recipe's argmax is another one: up to
there its greedy response is the draft. Only what diverges is generated, from its first divergence on, on the cache that
the pass has left. All recipes share the pass; one that leaves the first layers alone joins it above them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvgeom.models.cache import EditedCache
from kvgeom.models.memory import in_batches, rows_that_fit
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.rounder import Rounder
from kvgeom.refusal.judge import settles

if TYPE_CHECKING:
    from kvgeom.diagnosis.evaluate import Baseline


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
        The first token that is not the unquantized one, -1 if there is none as far as was read.
    """

    recipe: str
    prompt: int
    tokens: tuple[int, ...]
    margin: float
    kl: float
    divergence: int


@dataclass(frozen=True)
class _Diverged:
    """A response that leaves its draft: what is known of it, and the cache to go on with."""

    answer: Answer
    token: int
    cache: EditedCache


def verified(
    base: Baseline,
    work: Mapping[int, Sequence[str]],
    recipes: Mapping[str, Recipe],
    placement: Placement,
) -> Iterator[Answer]:
    """Answers to some prompts under some recipes, in the order in which they are settled.

    Costs, per prompt, one pass over prompt and draft, one more for each recipe (less the layers below the first that
    it touches), and decoding of what diverges.

    Parameters
    ----------
    base : Baseline
    work : mapping of prompt number to names of recipes
    recipes : mapping of name to Recipe
    placement : Placement
    """
    rows, diverged = base.rows, list[_Diverged]()
    for index, names in work.items():
        for found in _drafted(base, index, {name: recipes[name] for name in names}, placement):
            if isinstance(found, Answer):
                yield found
            else:
                diverged.append(found)
        # Neighbours of one recipe are rounded as one batch.
        diverged.sort(key=lambda row: row.answer.recipe)
        while len(diverged) >= rows:
            batch, diverged = diverged[:rows], diverged[rows:]
            yield from _continued(base, batch)
    yield from _continued(base, diverged)


def _drafted(
    base: Baseline, index: int, recipes: Mapping[str, Recipe], placement: Placement
) -> Iterator[Answer | _Diverged]:
    """Hold one prompt's draft against what each recipe would have said."""
    model, prompt, draft, ended = base.model, base.prompts[index], base.tokens[index], base.ended[index]
    # The last token of a draft is only read where one more argmax, the end, is to be checked.
    ids = [*prompt.ids, *(draft if ended else draft[:-1])]
    last = len(ids) - len(prompt) + 1
    # An engine whose prefill reads exact values rounds after it: prompt and response are two calls there.
    apart = placement.prefill_reads == "exact" and last > 1

    def run(part: Sequence[str]) -> tuple[Tensor, EditedCache]:
        edits = [Rounder(recipes[name], placement, prompt_tokens=len(prompt)) for name in part]
        first = [_first(recipes[name]) if model.branches_late else 0 for name in part]
        cache = model.branching_cache(edits)
        if not apart:
            return model.forward_branches(ids, edits, first, cache=cache, last=last), cache
        opening = model.forward_branches(prompt.ids, edits, first, cache=cache)
        rest = model.forward_branches(ids[len(prompt) :], edits, first, cache=cache, last=last - 1)
        return torch.cat([opening, rest], dim=1), cache

    for name in recipes:
        if not recipes[name].touched:
            yield Answer(name, index, draft, base.margins([base.clean_logits(index)])[0], 0.0, -1)
    names = sorted((name for name in recipes if recipes[name].touched), key=lambda name: _first(recipes[name]))
    for part, (logits, cache) in in_batches(names, rows_that_fit(model, len(ids), last), run):
        log_p, log_q = logits[:1, 0].log_softmax(-1), logits[1:, 0].log_softmax(-1)
        # One transfer for the batch instead of one for each number.
        kl, margins = (log_p.exp() * (log_p - log_q)).sum(-1).double().tolist(), base.margins(logits[1:, 0])
        said = logits[1:].argmax(-1).tolist()
        for row, name in enumerate(part):
            at = _divergence(said[row], draft, ended, model.stop_tokens)
            answer = Answer(name, index, draft[:at] if at >= 0 else draft, margins[row], kl[row], at)
            if at < 0 or said[row][at] in model.stop_tokens:
                yield answer
            else:
                yield _Diverged(answer, said[row][at], cache.row(row + 1, len(prompt) + at))


def _first(recipe: Recipe) -> int:
    """The first layer that a recipe touches, their number if it touches none."""
    return min(recipe.touched, default=len(recipe))


def _divergence(said: Sequence[int], draft: Sequence[int], ended: bool, stop_tokens: Iterable[int]) -> int:
    for at, (token, expected) in enumerate(zip(said, draft, strict=False)):
        if token != expected:
            return at
    return len(draft) if ended and said[len(draft)] not in stop_tokens else -1


def _continued(base: Baseline, diverged: Sequence[_Diverged]) -> Iterator[Answer]:
    """Go on from the first divergence, until the label is settled."""

    def run(part: Sequence[_Diverged]) -> list[list[int]]:
        def stop(row: int, tokens: list[int]) -> bool:
            return _settled(base, [*part[row].answer.tokens, *tokens])

        return base.model.generate(
            [row.cache for row in part],
            [row.token for row in part],
            base.max_new_tokens,
            batch_size=len(part),
            stop=stop,
        )

    for part, responses in in_batches(diverged, base.rows, run):
        for row, tokens in zip(part, responses, strict=True):
            yield Answer(**{**row.answer.__dict__, "tokens": (*row.answer.tokens, *tokens)})


def _settled(base: Baseline, tokens: Sequence[int]) -> bool:
    """Whether a response needs no more tokens."""
    return len(tokens) >= base.max_new_tokens or settles(base.judge, base.model.decode(tokens))


def generated(
    base: Baseline,
    work: Mapping[int, Sequence[str]],
    recipes: Mapping[str, Recipe],
    placement: Placement,
    *,
    whole: bool = True,
) -> Iterator[Answer]:
    """The same answers, each generated: a prefill for every prompt and recipe, then decoding in batches.

    With ``whole`` to the end, else until the label is settled.
    """
    model, rows = base.model, base.rows
    stop = None if whole else lambda _row, tokens: _settled(base, tokens)
    for name in recipes:
        chosen = [index for index, names in work.items() if name in names]
        for begin in range(0, len(chosen), rows):
            part = chosen[begin : begin + rows]
            caches = [model.new_cache(Rounder(recipes[name], placement)) for _ in part]
            prefilled = [model.forward(base.prompts[i].ids, cache)[-1] for i, cache in zip(part, caches, strict=True)]
            first = torch.stack(prefilled)
            responses = model.generate(
                caches, first.argmax(-1).tolist(), base.max_new_tokens, batch_size=rows, stop=stop
            )
            margins = base.margins(first)
            for row, (index, tokens) in enumerate(zip(part, responses, strict=True)):
                log_p, log_q = base.clean_logits(index).log_softmax(-1), first[row].log_softmax(-1)
                kl = float((log_p.exp() * (log_p - log_q)).sum())
                yield Answer(name, index, tuple(tokens), margins[row], kl, _parted(tokens, base, index))


def _parted(tokens: Sequence[int], base: Baseline, index: int) -> int:
    """Where a full response leaves the unquantized one, as far as either was read."""
    draft, ended = base.tokens[index], base.ended[index]
    for at, (token, expected) in enumerate(zip(tokens, draft, strict=False)):
        if token != expected:
            return at
    if len(tokens) < len(draft) or (ended and len(tokens) > len(draft)):
        return min(len(tokens), len(draft))
    return -1
