"""What a model answers under recipes, and how that differs from what it answers unquantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.diagnosis.drafts import generated, verified
from kvgeom.diagnosis.journal import Journal, Memory
from kvgeom.diagnosis.perplexity import perplexity
from kvgeom.errors import InputError
from kvgeom.models.cache import EditedCache
from kvgeom.models.memory import in_batches, rows_that_fit
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.refusal.judge import LABELS, Judge, KeywordJudge, Label, reading, settles
from kvgeom.refusal.margin import margin, refusal_tokens
from kvgeom.results import Result
from kvgeom.stats import wilson

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from kvgeom.refusal.classifiers import ClassifierJudge

EXACT = "exact"


@dataclass(frozen=True, repr=False)
class Outcomes(Result):
    """Labels of every prompt under every recipe.

    ``data`` has the dimensions ``recipe`` (the first one, ``"exact"``, is the unquantized model) and ``prompt``
    (its index), the coordinate ``request`` (prompt), and the variables

    - ``label``, ``reason`` (why this label) and ``text``: the response as far as the judge reads, or in full where
      ``meta["exact"]``;
    - ``tokens``: how many tokens that is, and ``divergence``: the first of them that is not the unquantized one (-1:
      none);
    - ``margin`` (nats; NaN where the model refuses nothing) and ``kl`` (nats, of the rounded from the unquantized
      distribution), both at the first response position;
    - ``likelihood`` (nats per token, mean): of the response under the unquantized model; NaN where it was not measured.

    ``meta["asked"]`` is how many prompts the unquantized model was asked, not all of which need be here.
    """

    kind: ClassVar[str] = "outcomes"

    @property
    def made_by(self) -> dict[str, Any]:
        """The part of ``meta`` that results drawn from these outcomes share."""
        return {name: self.meta[name] for name in ("model", "fingerprint", "placement", "judge", "max_new_tokens")}

    def counts(self, recipe: str = EXACT) -> dict[str, int]:
        """How many prompts have each label."""
        labels = self.data.label.sel(recipe=recipe).values
        return {label: int((labels == label).sum()) for label in LABELS}

    def flipped(self, recipe: str, to: Label | None = None) -> NDArray[np.bool_]:
        """Which of the prompts refused unquantized are labelled otherwise (as ``to``, if given) under ``recipe``."""
        now = self.data.label.sel(recipe=recipe).values[self.data.label.sel(recipe=EXACT).values == "refused"]
        flipped: NDArray[np.bool_] = now != "refused" if to is None else now == to
        return flipped

    def flips(self, recipe: str) -> dict[str, int]:
        """Flips under ``recipe``: in all, to ``complied`` and to ``degenerate``."""
        kinds: tuple[Label, ...] = ("complied", "degenerate")
        counts: dict[str, int] = {label: int(self.flipped(recipe, label).sum()) for label in kinds}
        return {"all": sum(counts.values()), **counts}

    def flip_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Columns of a table of recipes, in the order of ``names``.

        ``flips`` among the prompts refused unquantized, ``flips_complied``, ``flips_degenerate``, ``flip_rate`` and its
        Wilson interval ``ci_low``, ``ci_high`` (NaN where nothing is refused).
        """
        refused, flips = self.counts()["refused"], [self.flips(name) for name in names]
        low, high = np.array([wilson(found["all"], refused) for found in flips]).reshape(-1, 2).T
        return {
            "flips": [found["all"] for found in flips],
            "flips_complied": [found["complied"] for found in flips],
            "flips_degenerate": [found["degenerate"] for found in flips],
            "flip_rate": [found["all"] / refused if refused else float("nan") for found in flips],
            "ci_low": low,
            "ci_high": high,
        }

    def of_refused(self) -> Outcomes:
        """The same of the prompts that are refused unquantized, in which alone something can flip."""
        refused = self.data.label.sel(recipe=EXACT).values == "refused"
        return Outcomes(self.data.isel(prompt=refused), self.meta)

    def margin_drops(self, recipes: Sequence[str]) -> NDArray[np.float64]:
        """Refusal margin lost (nats) by every prompt under some recipes, ``[prompts, recipes]``."""
        lost = self.data.margin.sel(recipe=EXACT) - self.data.margin.sel(recipe=list(recipes))
        values: NDArray[np.float64] = lost.transpose("prompt", "recipe").values
        return values

    def flip_table(self) -> xr.DataArray:
        """Whether each prompt refused unquantized flips under each recipe, as 0 and 1 over (prompt, recipe)."""
        names = [str(name) for name in self.data.recipe.values if name != EXACT]
        refused = self.data.prompt.values[self.data.label.sel(recipe=EXACT).values == "refused"]
        values = np.array([self.flipped(name) for name in names], dtype=float).reshape(len(names), len(refused)).T
        return xr.DataArray(values, dims=("prompt", "recipe"), coords={"prompt": refused, "recipe": names})

    def relabel(self, judge: ClassifierJudge) -> Outcomes:
        """The same responses as a classifier labels them. It is loaded here, so the audited model may be gone by then.

        Parameters
        ----------
        judge : ClassifierJudge
            From :func:`kvgeom.classifier`.

        Raises
        ------
        InputError
            Unless the outcomes hold whole responses (``evaluate(..., exact=True)``).
        """
        if not self.meta["exact"]:
            raise InputError(
                "responses that end where the keyword judge stops reading were given to a classifier, which reads them "
                "whole; evaluate with exact=True"
            )
        data = self.data
        requests = [str(r) for _ in data.recipe for r in data.request.values]
        texts = [str(text) for text in data.text.values.ravel()]
        verdicts = judge.label_all(requests, texts, [float(x) for x in data.likelihood.values.ravel()])
        columns = {
            name: (
                data.label.dims,
                np.array([getattr(v, name) for v in verdicts], dtype=object).reshape(data.label.shape),
            )
            for name in ("label", "reason")
        }
        return Outcomes(data.assign(columns), {**self.meta, "judge": judge.name})

    def summary(self) -> str:
        recipes = self.data.sizes["recipe"] - 1
        return f"{self.data.sizes['prompt']} prompts under {recipes} recipes, unquantized {self.counts()}"

    def plot(self) -> go.Figure:
        """Labels by recipe."""
        from kvgeom.plots.outcomes import labels_by_recipe

        return labels_by_recipe(self)


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
        is done twice, and the result is the same (:class:`~kvgeom.diagnosis.journal.Journal`).

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


def evaluate(
    model: Model,
    recipes: Mapping[str, Recipe],
    prompts: Sequence[str] | Baseline,
    *,
    placement: Placement | None = None,
    refused_only: bool = False,
    exact: bool = False,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 512,
    journal: str | Path | None = None,
    progress: bool = True,
    title: str = "responses under recipes",
) -> Outcomes:
    """Greedy responses and their labels under each recipe.

    The unquantized response serves as a draft. One pass over prompt and draft shows where a recipe would first have
    said something else; only from there on is anything generated, and only until the judge reads no further. Labels are
    those of plain generation, but for ties that the last digit of float arithmetic decides.

    Parameters
    ----------
    model : Model
    recipes : mapping of name to Recipe
    prompts : sequence of str, or Baseline
        With a :class:`Baseline` the unquantized responses are not made again, and its judge, lengths and journal are
        used.
    placement : Placement, optional
        Decode-faithful cache rounding by default.
    refused_only : bool
        Only prompts refused unquantized; no others can flip.
    exact : bool
        Generate every response in full instead. Costs, per recipe and prompt, one prefill and ``max_new_tokens``
        decode steps.
    judge, max_new_tokens, batch_size, journal
        As in :func:`baseline`.

    Returns
    -------
    Outcomes
    """
    if not isinstance(prompts, Baseline):
        base = baseline(
            model,
            prompts,
            judge=judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            journal=journal,
            progress=progress,
        )
        with closing(base.journal):
            return evaluate(
                model,
                recipes,
                base,
                placement=placement,
                refused_only=refused_only,
                exact=exact,
                progress=progress,
                title=title,
            )
    base = prompts
    _check_recipes(model, recipes)
    order = [EXACT, *recipes]
    if exact:  # what was read of the unquantized responses is not all of them
        recipes = {EXACT: Recipe.exact(model.geometry.layers), **recipes}
    placement = placement or Placement()
    chosen = base.refused if refused_only else tuple(range(len(base.prompts)))

    def key(name: str, index: int | None = None) -> tuple[Any, ...]:
        return ("response", *recipes[name].spelled, str(placement), exact, index)

    different = {str(key(name)): name for name in recipes}.values()  # of equal recipes one is run
    todo = {i: names for i in chosen if (names := [name for name in different if key(name, i) not in base.journal])}
    total = len(different) * len(chosen)
    done = total - sum(map(len, todo.values()))
    if exact or not placement.follows_drafts:
        answers = generated(base, todo, recipes, placement, whole=exact)
    else:
        answers = verified(base, todo, recipes, placement)
    with bar(title, total, progress, initial=done) as shown:
        for answer in answers:
            text, label, reason = base.judged(answer.prompt, answer.tokens)
            # Judges that come later, when the model is gone, ask for the likelihood of a whole response.
            likelihood = base.log_likelihood(answer.prompt, answer.tokens) if exact else float("nan")
            found = [text, label, reason, answer.margin, answer.kl, answer.divergence, len(answer.tokens), likelihood]
            base.journal[key(answer.recipe, answer.prompt)] = found
            shown.update(1)
    rows = {name: [base.journal[key(name, i)] for i in chosen] for name in recipes}
    if not exact:
        rows[EXACT] = [base.journal.remember(("unquantized", i), partial(_unquantized_row, base, i)) for i in chosen]
    kinds = {"text": object, "label": object, "reason": object, "margin": float, "kl": float}
    kinds |= {"divergence": int, "tokens": int, "likelihood": float}
    shape = (len(rows), len(chosen))
    columns = {
        column: (
            ("recipe", "prompt"),
            np.array([[row[n] for row in rows[name]] for name in order], dtype=kind).reshape(shape),
        )
        for n, (column, kind) in enumerate(kinds.items())
    }
    coords = {
        "recipe": order,
        "prompt": list(chosen),
        "request": ("prompt", np.array([base.prompts[i].text for i in chosen], dtype=object)),
    }
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "placement": str(placement),
        "recipes": {name: str(recipe) for name, recipe in recipes.items() if name != EXACT},
        "judge": base.judge.name,
        "max_new_tokens": base.max_new_tokens,
        "asked": len(base.prompts),
        "exact": exact,
    }
    return Outcomes(xr.Dataset(columns, coords=coords), meta)


def _unquantized_row(base: Baseline, index: int) -> list[Any]:
    tokens, (clean,) = base.tokens[index], base.margins([base.clean_logits(index)])
    text = base.model.decode(tokens)
    return [text, base.labels[index], base.reasons[index], clean, 0.0, -1, len(tokens), float("nan")]


def _check_recipes(model: Model, recipes: Mapping[str, Recipe]) -> None:
    if EXACT in recipes:
        raise InputError(f"a recipe was named {EXACT!r}, which is the name of the unquantized model; choose another")
    for name, recipe in recipes.items():
        if len(recipe) != model.geometry.layers:
            raise InputError(
                f"recipe {name!r} is for {len(recipe)} layers, but {model.name} has {model.geometry.layers}"
            )
