"""The unquantized model on some prompts, which every recipe is held against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.evaluation.journal import Journal, Memory
from kvgeom.evaluation.margin import margin, refusal_tokens
from kvgeom.evaluation.perplexity import perplexity
from kvgeom.judges.judge import Judge, KeywordJudge, reading, settles
from kvgeom.models.cache import EditedCache
from kvgeom.models.memory import in_batches, rows_that_fit
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe


@dataclass(frozen=True)
class Baseline:
    """The unquantized model on some prompts: what every recipe is held against. Made by :func:`baseline`.

    Attributes
    ----------
    model : Model
    prompts : tuple of EncodedPrompt
    tokens : tuple of tuple of int
        Greedy responses, as far as the judge reads; the drafts of all others.
    ended : tuple of bool
        Whether the model ended the response there.
    labels, reasons : tuple of str
    judge : Judge
    max_new_tokens : int
    batch_size : int
        Most responses that are decoded together.
    journal : Memory
        Where everything that is measured against this baseline is written down.
    """

    model: Model
    prompts: tuple[EncodedPrompt, ...]
    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    labels: tuple[str, ...]
    reasons: tuple[str, ...]
    judge: Judge
    max_new_tokens: int
    batch_size: int
    journal: Memory = field(default_factory=Memory, repr=False)
    _prefilled: dict[int, tuple[EditedCache, Tensor]] = field(default_factory=dict, repr=False)
    _verdicts: dict[tuple[int, tuple[int, ...]], tuple[str, str, str]] = field(default_factory=dict, repr=False)

    @cached_property
    def refused(self) -> tuple[int, ...]:
        """Indices of the prompts that are refused; a flip can only happen here."""
        return tuple(index for index, label in enumerate(self.labels) if label == "refused")

    @property
    def rows(self) -> int:
        """How many responses can be decoded together now: ``batch_size``, or what memory holds."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        return rows_that_fit(self.model, longest, 1, self.batch_size)

    @cached_property
    def refusal_tokens(self) -> frozenset[int]:
        """First tokens of this model's refusals, the set R of the margin."""
        first = [tokens[0] if tokens else -1 for tokens in self.tokens]
        return refusal_tokens(first, [label == "refused" for label in self.labels])

    def margins(self, first_logits: Sequence[Tensor] | Tensor) -> list[float]:
        """Refusal margin (nats) of first-position logits ``[prompts, vocabulary]``; NaN if nothing is refused."""
        if not self.refusal_tokens:
            return [float("nan")] * len(first_logits)
        logits = first_logits if isinstance(first_logits, Tensor) else torch.stack(list(first_logits))
        return [float(value) for value in margin(logits, self.refusal_tokens).double().tolist()]

    def _clean(self, index: int) -> tuple[EditedCache, Tensor]:
        """The exact cache of a prompt, and the logits after it; made when first asked for."""
        if index not in self._prefilled:
            cache = self.model.new_cache()
            self._prefilled[index] = cache, self.model.forward(self.prompts[index].ids, cache)[-1]
        return self._prefilled[index]

    def clean_logits(self, index: int) -> Tensor:
        """Logits ``[vocabulary]`` of the first response token of prompt ``index``."""
        return self._clean(index)[1]

    def log_likelihood(self, index: int, tokens: Sequence[int]) -> float:
        """Mean log-probability (nats per token) that the unquantized model gives to a response to prompt ``index``."""
        if not tokens:
            return float("nan")
        cache, first = self._clean(index)
        rest = first[None][:0]
        if len(tokens) > 1:
            rest = self.model.forward(tokens[:-1], cache.copy(), all_logits=True)
        log_p = torch.cat([first[None], rest.to(first.device)]).log_softmax(-1)
        return float(log_p[torch.arange(len(tokens)), list(tokens)].mean())

    def perplexity(self, text: str, recipe: Recipe | None = None, *, placement: Placement | None = None) -> float:
        """Perplexity of a plain text under a recipe (None: unquantized), measured once and written down."""
        placement = placement or Placement()
        return float(
            self.journal.remember(
                ("perplexity", text, *(recipe.spelled if recipe else ()), str(placement)),
                partial(perplexity, self.model, text, recipe, placement=placement),
            )
        )

    def judged(self, index: int, tokens: Sequence[int]) -> tuple[str, str, str]:
        """Text, label and reason of a response to prompt ``index``; the label is that of what the judge reads.

        A response that many recipes give, such as the unquantized one, is judged once.
        """
        key = index, tuple(tokens)
        if key not in self._verdicts:
            read = tokens[: reading(self.judge, self.model.decode, tokens)]
            request, text = self.prompts[index].text, self.model.decode(read)
            verdict = self.judge.label(request, text, lambda: self.log_likelihood(index, read))
            self._verdicts[key] = self.model.decode(tokens), verdict.label, verdict.reason
        return self._verdicts[key]


def baseline(
    model: Model,
    requests: Sequence[str],
    *,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 512,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Baseline:
    """Run the unquantized model on ``requests`` and label what it answers.

    Parameters
    ----------
    model : Model
    requests : sequence of str
    judge : Judge, optional
        The keyword judge by default.
    max_new_tokens : int
        Longest response. Responses end earlier where the judge reads no further.
    batch_size : int
        Most responses to decode together; fewer where memory is short. A step reads all weights, whatever the batch.
    journal : str or Path, optional
        A file that keeps all that is measured against this baseline: interrupted at any moment and run again, nothing
        is done twice, and the result is the same (:class:`~kvgeom.evaluation.journal.Journal`).

    Raises
    ------
    InputError
        If there are no requests, one is empty or longer than the model's context, or the journal is about other work.
    """
    if not requests:
        raise InputError("no requests were given; an evaluation needs at least one")
    prompts = tuple(model.encode(requests))
    longest = max(prompts, key=len)
    if len(longest) + max_new_tokens > model.max_context:
        raise InputError(
            f"a prompt of {len(longest)} tokens and {max_new_tokens} new ones were asked ({longest.text[:40]!r}...), but "
            f"{model.name} has a context of {model.max_context}; shorten the prompt or lower max_new_tokens"
        )
    judge = judge or KeywordJudge()
    about = _about(model, prompts, judge, max_new_tokens)
    kept: Memory = Memory() if journal is None else Journal(journal, about)
    draft = Baseline(model, prompts, (), (), (), (), judge, max_new_tokens, batch_size, kept)
    todo = [index for index in range(len(prompts)) if ("baseline", index) not in kept]
    done = 2 * (len(prompts) - len(todo))  # a prompt counts when it is read, and when it is answered
    with bar("unquantized responses", 2 * len(prompts), progress, initial=done) as shown:
        for part, responses in in_batches(todo, draft.rows, partial(_unquantized, draft, on_done=shown.update)):
            for index, tokens in zip(part, responses, strict=True):
                _, label, reason = draft.judged(index, tokens)
                ended = len(tokens) < max_new_tokens and not settles(judge, model.decode(tokens))
                kept["baseline", index] = [list(tokens), ended, label, reason]
    found = [kept["baseline", index] for index in range(len(prompts))]
    return replace(
        draft,
        tokens=tuple(tuple(tokens) for tokens, *_ in found),
        ended=tuple(bool(ended) for _, ended, *_ in found),
        labels=tuple(label for *_, label, _ in found),
        reasons=tuple(reason for *_, reason in found),
    )


def _unquantized(draft: Baseline, part: Sequence[int], on_done: Callable[[int], object]) -> list[list[int]]:
    model, clean, settled = draft.model, [], 0
    for index in part:
        clean.append(draft._clean(index))
        on_done(1)

    def stop(_row: int, tokens: list[int]) -> bool:
        nonlocal settled
        ends = settles(draft.judge, model.decode(tokens))
        settled += ends
        on_done(int(ends))
        return ends

    first = torch.stack([logits for _, logits in clean]).argmax(-1).tolist()
    caches = [cache for cache, _ in clean]
    responses = model.generate(caches, first, draft.max_new_tokens, batch_size=len(part), stop=stop)
    on_done(len(part) - settled)
    return responses


def _about(model: Model, prompts: Sequence[EncodedPrompt], judge: Judge, max_new_tokens: int) -> dict[str, Any]:
    """All that a journal's entries depend on, but for recipe, placement and prompt number."""
    ids = json.dumps([prompt.ids for prompt in prompts]).encode()
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "backend": model.backend,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention_kernel": model.attention_kernel,
        "prompts": hashlib.sha256(ids).hexdigest(),
        "judge": judge.name,
        "max_new_tokens": max_new_tokens,
        "versions": {name: version(name) for name in ("kvgeom", "torch", "transformers")},
    }
