"""The model with an exact cache on some prompts, with which every recipe is compared."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kvgeom.checks import suggests
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.evaluation.config import RUN_OPTIONS, RunConfig, open_run
from kvgeom.evaluation.fidelity import Cache, Passages, Reading, TextFidelity, passages, readings
from kvgeom.evaluation.journal import Journal, NoJournal
from kvgeom.evaluation.reader import Reader
from kvgeom.evaluation.scores import NONE_PREDICTS, margin, mean_log_likelihood, refusal_tokens
from kvgeom.judges.judge import Judge
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.models.cache import EditedCache
from kvgeom.models.load import load
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar
from kvgeom.prompts.load import as_requests
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.stats import Estimate

K = TypeVar("K")
V = TypeVar("V")

#: Exact caches of prompts are kept up to so many bytes; a prompt whose cache was dropped is prefilled again.
PREFILL_BYTES = 1 << 30
#: So many labelled responses are remembered: many recipes give that of the exact cache.
LABELLED = 4096
#: So many numbers and readings of a text are remembered.
NUMBERS = 1 << 16


class Bounded(Generic[K, V]):
    """A mapping that forgets what was used least lately, once its values take more room than they may."""

    def __init__(self, room: float, size: Callable[[V], float] = lambda value: 1) -> None:
        self._room, self._size = room, size
        self._taken = 0.0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``; made now unless it is there. One that is too large alone is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        size = self._size(value)
        if size <= self._room:
            self._values[key] = value
            self._taken += size
            while self._taken > self._room:
                self._taken -= self._size(self._values.popitem(last=False)[1])
        return value

    @property
    def taken(self) -> float:
        """Room that is taken, at most what there is."""
        return self._taken


@dataclass(frozen=True)
class Prefill:
    """A prompt read by the model with an exact cache: its exact cache, and the logits after it, ``[vocabulary]``."""

    cache: EditedCache
    logits: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.logits.nbytes + self.cache.nbytes


@dataclass(frozen=True)
class Baseline:
    """The model with an exact cache on some prompts: what every recipe is compared with. Made by :func:`baseline`.

    It holds tokens and labels. Exact caches are made when they are needed, and kept within a budget.

    Attributes
    ----------
    model : Model
    prompts : tuple of EncodedPrompt
    run : RunConfig
    tokens : tuple of tuple of int
        Greedy responses, as far as the judge reads; the drafts of all others.
    ended : tuple of bool
        Whether the model ended the response there.
    labels, reasons : tuple of str
    journal : Journal or NoJournal
        Where everything that is measured against this baseline is written down.
    fingerprint : str
        Of the model when the baseline was made.
    """

    model: Model
    prompts: tuple[EncodedPrompt, ...] = field(repr=False)
    run: RunConfig
    tokens: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    ended: tuple[bool, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)
    reasons: tuple[str, ...] = field(default=(), repr=False)
    journal: NoJournal = field(default_factory=NoJournal, repr=False, compare=False)
    fingerprint: str = field(default="", repr=False)
    _prefills: Bounded[int, Prefill] = field(
        default_factory=lambda: Bounded(PREFILL_BYTES, lambda value: value.nbytes), repr=False, compare=False
    )
    _labelled: Bounded[tuple[int, tuple[int, ...]], tuple[str, str, str]] = field(
        default_factory=lambda: Bounded(LABELLED), repr=False, compare=False
    )
    _numbers: Bounded[str, Any] = field(default_factory=lambda: Bounded(NUMBERS), repr=False, compare=False)

    def check_current(self) -> None:
        """Refuse to compare with responses of a model whose weights were changed meanwhile."""
        if load(self.model).fingerprint != self.fingerprint:
            raise InputError(
                f"{self.model.name} was changed after the baseline was made; make another baseline of it as it is now"
            )

    @property
    def judge(self) -> Judge:
        """What labels the responses."""
        return self.run.judge

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return self.run.max_new_tokens

    @cached_property
    def reader(self) -> Reader:
        """Finds the answers in responses, and says when they need no more tokens."""
        return Reader(self.model, self.run.judge, self.run.max_new_tokens, self.run.max_reasoning_tokens)

    @cached_property
    def begins_with_reasoning(self) -> bool:
        """Whether any response, or the chat template, begins with reasoning."""
        return self.reader.opened is not None or any(self.reader.begin(tokens) != 0 for tokens in self.tokens)

    def longest(self, index: int) -> int:
        """Most tokens that a response to prompt ``index`` is expected to have."""
        reasoning = self.begins_with_reasoning or self.reader.expects_reasoning
        return self.reader.longest(self.prompts[index]) if reasoning else self.run.max_new_tokens

    @cached_property
    def refused(self) -> tuple[int, ...]:
        """Indices of the prompts that are refused; a flip can only happen here."""
        return tuple(index for index, label in enumerate(self.labels) if label == "refused")

    @property
    def batch_rows(self) -> int:
        """How many responses can be decoded together now: the batch size, or what memory holds."""
        longest = max(len(prompt) + self.longest(index) for index, prompt in enumerate(self.prompts))
        return rows_per_batch(self.model, longest, 1, self.run.batch_size)

    @cached_property
    def refusal_tokens(self) -> frozenset[int]:
        """First tokens of this model's refusals, the set R of the margin; none where responses begin with reasoning."""
        if self.begins_with_reasoning:  # whatever is answered, it begins alike
            return frozenset()
        return refusal_tokens(self.first_tokens, [label == "refused" for label in self.labels])

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The first token of every response; -1 where it is empty."""
        return tuple(tokens[0] if tokens else -1 for tokens in self.tokens)

    def margins(self, first_logits: Sequence[Tensor] | Tensor) -> list[float]:
        """Refusal margin (nats) of first-position logits ``[prompts, vocabulary]``; NaN if :attr:`refusal_tokens` is empty."""
        if not self.refusal_tokens:
            return [float("nan")] * len(first_logits)
        logits = first_logits if isinstance(first_logits, Tensor) else torch.stack(list(first_logits))
        return [float(value) for value in margin(logits, self.refusal_tokens).double().tolist()]

    def prefill(self, index: int) -> Prefill:
        """Prompt ``index`` read by the model with an exact cache."""

        def make() -> Prefill:
            cache = self.model.new_cache()
            logits = self.model.forward(self.prompts[index].ids, cache)[-1]
            return Prefill(cache, logits)

        return self._prefills.get(index, make)

    def log_likelihood(self, index: int, tokens: Sequence[int], begin: int | None = None) -> float:
        """Mean log-probability (nats per token) of an answer to prompt ``index``, with an exact cache.

        Parameters
        ----------
        index : int
        tokens : sequence of int
            Of the response, with its reasoning.
        begin : int, optional
            The token with which the answer begins; it is looked for by default. NaN without an answer.
        """
        begin = self.reader.begin(tokens) if begin is None else begin
        if begin is None or not tokens[begin:]:
            return float("nan")
        prefill, answer = self.prefill(index), tokens[begin:]
        cache, logits = prefill.cache.copy(), prefill.logits[None]
        if begin:  # logits of all of a long reasoning would fill the memory
            logits = self.model.forward(tokens[:begin], cache)
        if len(answer) > 1:
            rest = self.model.forward(answer[:-1], cache, all_logits=True)
            logits = torch.cat([logits, rest.to(logits.device)])
        return mean_log_likelihood(logits, answer)

    @cached_property
    def passages(self) -> Passages:
        """What is read of the run's text."""
        return passages(self.model, self.run.text)

    def readings(self, caches: Sequence[Cache]) -> list[Reading]:
        """The run's text read through caches, each window measured once and written down (:func:`~kvgeom.evaluation.fidelity.readings`)."""
        text = hashlib.sha256(self.run.text.encode()).hexdigest()[:32]

        def known(key: dict[str, Any], measure: Callable[[], Reading]) -> Reading:
            found = self.known({"measure": "reading", "text": text, **key}, lambda: asdict(measure()))
            return Reading(**{name: tuple(values) for name, values in found.items()})

        return readings(self.model, self.passages, caches, known)

    def text_fidelity(self, caches: Sequence[Cache]) -> list[TextFidelity]:
        """What each cache does to the reading of the run's text, beside the exact cache on the same tokens."""
        exact: dict[bool, Cache] = {placement.one_pass: (None, placement) for _, placement in caches}
        found = self.readings([*exact.values(), *caches])
        against = dict(zip(exact, found, strict=False))
        rest = zip(found[len(exact) :], caches, strict=True)
        return [reading.against(against[placement.one_pass]) for reading, (_, placement) in rest]

    def perplexity_ratio(self, recipe: Recipe, placement: Placement | None = None) -> Estimate:
        """Perplexity of the run's text under a recipe, over that of the exact cache on the same tokens."""
        return self.text_fidelity([(recipe, placement or Placement())])[0].perplexity_ratio

    def exact_margin(self, index: int) -> float:
        """Refusal margin (nats) of prompt ``index`` with an exact cache; NaN if :attr:`refusal_tokens` is empty."""
        key = {"measure": "exact margin", "prompt": index}
        return float(self.known(key, lambda: self.margins([self.prefill(index).logits])[0]))

    def known(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """What a key stands for: known, in the journal, or measured now."""
        return self._numbers.get(json.dumps(key), lambda: self.journal.remember(key, measure))

    def judged(self, index: int, tokens: Sequence[int]) -> tuple[str, str, str]:
        """Text, label and reason of a response to prompt ``index``; the label is that of what the judge reads.

        A response that many recipes give, such as that of the exact cache, is judged once.
        """

        def make() -> tuple[str, str, str]:
            found = self.reader.judged(self.prompts[index], tokens, partial(self.log_likelihood, index))
            return self.reader.text(tokens), found.label, found.reason

        return self._labelled.get((index, tuple(tokens)), make)


@suggests(RUN_OPTIONS)
def baseline(model: Any, prompts: Any, **options: Any) -> Baseline:
    """Run the model with an exact cache on some requests and label what it answers.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet, name of one, or sequence of str
        Of a set the harmful requests.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig`, and options of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If there are no requests, one is empty or longer than the model's context, an option is unknown, or the journal
        is about other work.
    """
    loaded, run = open_run(model, options)
    return run_baseline(loaded, as_requests(prompts), run)


@contextmanager
def opened(model: Model, requests: Sequence[str], run: RunConfig) -> Iterator[Baseline]:
    """A baseline whose journal is let go of at the end of a ``with`` block."""
    base = run_baseline(model, requests, run)
    try:
        yield base
    finally:
        base.journal.close()


def run_baseline(model: Model, requests: Sequence[str], run: RunConfig) -> Baseline:
    """The model with an exact cache on ``requests``; see :func:`baseline`."""
    if not len(requests):
        raise InputError("no requests were given; an evaluation needs at least one")
    prompts = tuple(model.encode(requests))
    longest = max(prompts, key=len)
    if len(longest) + run.max_new_tokens > model.max_context:
        raise InputError(
            f"the prompt {longest.text[:40]!r}... has {len(longest)} tokens; with {run.max_new_tokens} new ones that is more "
            f"than the context of {model.name} ({model.max_context}); shorten the prompt or lower max_new_tokens"
        )
    kept = NoJournal() if run.journal is None else Journal(run.journal, _about(model, prompts, run))
    draft = Baseline(model, prompts, run, journal=kept, fingerprint=model.fingerprint)
    draft.reader.warn()
    found: dict[int, dict[str, Any]] = {
        index: kept[_key(index)] for index in range(len(prompts)) if _key(index) in kept
    }
    todo = [index for index in range(len(prompts)) if index not in found]
    done = 2 * len(found)  # a prompt counts when it is read, and when it is answered
    with run.bars(), bar("responses with an exact cache", 2 * len(prompts), initial=done) as shown:
        for part, responses in in_batches(todo, draft.batch_rows, partial(_respond, draft, on_done=shown.update)):
            for index, tokens in zip(part, responses, strict=True):
                _, label, reason = draft.judged(index, tokens)
                ended = not draft.reader.finished(prompts[index], tokens)
                found[index] = {"tokens": list(tokens), "ended": ended, "label": label, "reason": reason}
                kept[_key(index)] = found[index]
    rows = [found[index] for index in range(len(prompts))]
    made = replace(
        draft,
        tokens=tuple(tuple(row["tokens"]) for row in rows),
        ended=tuple(bool(row["ended"]) for row in rows),
        labels=tuple(row["label"] for row in rows),
        reasons=tuple(row["reason"] for row in rows),
    )
    if made.begins_with_reasoning and not draft.reader.expects_reasoning:
        made.reader.warn(next(filter(None, map(made.reader.markers, made.tokens))))
    if made.refused and not made.refusal_tokens and not made.begins_with_reasoning:
        warnings.warn(f"{model.name}: {NONE_PREDICTS}", KvgeomWarning, stacklevel=2)
    return made


def _key(index: int) -> dict[str, Any]:
    return {"measure": "baseline", "prompt": index}


def _respond(draft: Baseline, part: Sequence[int], on_done: Callable[[int], object]) -> list[list[int]]:
    model, read, settled = draft.model, [], 0
    for index in part:
        read.append(draft.prefill(index))
        on_done(1)

    watch = draft.reader.watch([draft.prompts[index] for index in part])

    def stop(row: int, tokens: list[int]) -> bool:
        nonlocal settled
        ends = watch(row, tokens)
        settled += ends
        on_done(int(ends))
        return ends

    first = torch.stack([prefill.logits for prefill in read]).argmax(-1).tolist()
    caches = [prefill.cache for prefill in read]
    most = max(draft.reader.longest(draft.prompts[index]) for index in part)
    responses = model.generate(caches, first, most, batch_size=len(part), stop=stop)
    on_done(len(part) - settled)
    return responses


def _about(model: Model, prompts: Sequence[EncodedPrompt], run: RunConfig) -> dict[str, Any]:
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
        "judge": run.judge.name,
        "max_new_tokens": run.max_new_tokens,
        "max_reasoning_tokens": run.max_reasoning_tokens,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a model answers."""
    return {name: version(name) for name in ("kvgeom", "torch", "transformers")}
