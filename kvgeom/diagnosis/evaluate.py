"""What a model answers under recipes, and how that differs from what it answers unquantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from kvgeom.errors import InputError
from kvgeom.models.cache import EditedCache
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.rounder import Rounder
from kvgeom.refusal.judge import LABELS, Judge, KeywordJudge
from kvgeom.refusal.margin import margin, refusal_tokens
from kvgeom.refusal.respond import Responses, respond
from kvgeom.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

EXACT = "exact"


@dataclass(frozen=True, repr=False)
class Outcomes(Result):
    """Labels of every prompt under every recipe.

    ``data`` has the dimensions ``recipe`` (the first one, ``"exact"``, is the unquantized model) and ``prompt``
    (its index) and the variables ``label``, ``text``, ``reason`` (why this label) and ``margin`` (nats; NaN where
    the model refuses nothing), and the coordinate ``request`` (prompt).
    """

    kind: ClassVar[str] = "outcomes"

    def counts(self, recipe: str = EXACT) -> dict[str, int]:
        """How many prompts have each label."""
        labels = self.data.label.sel(recipe=recipe).values
        return {label: int((labels == label).sum()) for label in LABELS}

    def flipped(self, recipe: str) -> NDArray[np.bool_]:
        """Which of the prompts refused unquantized are labelled otherwise under ``recipe``, in prompt order."""
        refused = self.data.label.sel(recipe=EXACT).values == "refused"
        flipped: NDArray[np.bool_] = self.data.label.sel(recipe=recipe).values[refused] != "refused"
        return flipped

    def flips(self, recipe: str) -> dict[str, int]:
        """Flips under ``recipe``: in all, to ``complied`` and to ``degenerate``."""
        refused = self.data.label.sel(recipe=EXACT).values == "refused"
        now = self.data.label.sel(recipe=recipe).values[refused]
        kinds = {label: int((now == label).sum()) for label in ("complied", "degenerate")}
        return {"all": sum(kinds.values()), **kinds}

    def flip_table(self) -> xr.DataArray:
        """Whether each prompt refused unquantized flips under each recipe, as 0 and 1 over (prompt, recipe)."""
        names = [str(name) for name in self.data.recipe.values if name != EXACT]
        refused = self.data.prompt.values[self.data.label.sel(recipe=EXACT).values == "refused"]
        values = np.array([self.flipped(name) for name in names], dtype=float).reshape(len(names), len(refused)).T
        return xr.DataArray(values, dims=("prompt", "recipe"), coords={"prompt": refused, "recipe": names})

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
    responses : Responses
    labels, reasons : tuple of str
    caches : tuple of EditedCache
        The exact cache of every prompt, from which the likelihood of any response is one pass over that response.
    """

    model: Model
    prompts: tuple[EncodedPrompt, ...]
    responses: Responses
    labels: tuple[str, ...]
    reasons: tuple[str, ...]
    caches: tuple[EditedCache, ...] = field(repr=False)
    judge: Judge
    max_new_tokens: int
    batch_size: int

    @cached_property
    def refused(self) -> tuple[int, ...]:
        """Indices of the prompts that are refused; a flip can only happen here."""
        return tuple(index for index, label in enumerate(self.labels) if label == "refused")

    @cached_property
    def refusal_tokens(self) -> frozenset[int]:
        """First tokens of this model's refusals, the set R of the margin."""
        first = self.responses.first_logits.argmax(-1).tolist()
        return refusal_tokens(first, [label == "refused" for label in self.labels])

    def margins(self, first_logits: torch.Tensor) -> NDArray[np.float64]:
        """Refusal margin (nats) of first-position logits ``[prompts, vocabulary]``; NaN if nothing is refused."""
        if not self.refusal_tokens:
            return np.full(len(first_logits), np.nan)
        return margin(first_logits, self.refusal_tokens).double().cpu().numpy()

    def log_likelihood(self, index: int, tokens: Sequence[int]) -> float:
        """Mean log-probability (nats per token) that the unquantized model gives to a response to prompt ``index``."""
        if not tokens:
            return float("nan")
        first = self.responses.first_logits[index][None]
        rest = first[:0]
        if len(tokens) > 1:
            rest = self.model.forward(tokens[:-1], self.caches[index].copy(), all_logits=True)
        log_p = torch.cat([first, rest.to(first.device)]).log_softmax(-1)
        return float(log_p[torch.arange(len(tokens)), list(tokens)].mean())

    def judged(self, index: int, tokens: Sequence[int]) -> tuple[str, str, str]:
        """Text, label and reason of a response to prompt ``index``."""
        text = self.model.decode(tokens)
        verdict = self.judge.label(self.prompts[index].text, text, lambda: self.log_likelihood(index, tokens))
        return text, verdict.label, verdict.reason


def baseline(
    model: Model,
    requests: Sequence[str],
    *,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    progress: bool = True,
) -> Baseline:
    """Run the unquantized model on ``requests`` and label what it answers.

    Raises
    ------
    InputError
        If there are no requests, or one is empty or longer than the model's context.
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
    caches = [model.new_cache() for _ in prompts]
    with bar("unquantized responses", 2 * len(prompts), progress) as shown:
        responses = respond(model, prompts, max_new_tokens, caches=caches, batch_size=batch_size, on_done=shown.update)
    draft = Baseline(
        model=model,
        prompts=prompts,
        responses=responses,
        labels=(),
        reasons=(),
        caches=tuple(caches),
        judge=judge or KeywordJudge(),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    verdicts = [draft.judged(index, tokens) for index, tokens in enumerate(responses.tokens)]
    labels, reasons = tuple(v[1] for v in verdicts), tuple(v[2] for v in verdicts)
    return Baseline(**{**draft.__dict__, "labels": labels, "reasons": reasons})


def evaluate(
    model: Model,
    recipes: Mapping[str, Recipe],
    prompts: Sequence[str] | Baseline,
    *,
    placement: Placement | None = None,
    refused_only: bool = False,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    progress: bool = True,
    title: str = "responses under recipes",
) -> Outcomes:
    """Greedy responses and their labels under each recipe.

    Costs, per recipe and prompt, one prefill and at most ``max_new_tokens`` decode steps (in batches).

    Parameters
    ----------
    model : Model
    recipes : mapping of name to Recipe
    prompts : sequence of str, or Baseline
        With a :class:`Baseline` the unquantized responses are not made again, and its judge and lengths are used.
    placement : Placement, optional
        Decode-faithful cache rounding by default.
    refused_only : bool
        Only prompts refused unquantized; no others can flip.

    Returns
    -------
    Outcomes
    """
    if isinstance(prompts, Baseline):
        base = prompts
    else:
        base = baseline(
            model, prompts, judge=judge, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
    _check_recipes(model, recipes)
    chosen = base.refused if refused_only else tuple(range(len(base.prompts)))
    rows = [[base.judged(i, base.responses.tokens[i])[0] for i in chosen]]
    labels, reasons = [[base.labels[i] for i in chosen]], [[base.reasons[i] for i in chosen]]
    margins = [base.margins(base.responses.first_logits[list(chosen)])]
    encoded = [base.prompts[i] for i in chosen]
    with bar(title, 2 * len(recipes) * len(chosen), progress) as shown:
        for recipe in recipes.values():
            caches = [model.new_cache(Rounder(recipe, placement)) for _ in chosen]
            responses = respond(
                model,
                encoded,
                base.max_new_tokens,
                caches=caches,
                batch_size=base.batch_size,
                on_done=shown.update,
            )
            verdicts = [base.judged(i, tokens) for i, tokens in zip(chosen, responses.tokens, strict=True)]
            rows.append([v[0] for v in verdicts])
            labels.append([v[1] for v in verdicts])
            reasons.append([v[2] for v in verdicts])
            margins.append(base.margins(responses.first_logits))
    dims = ("recipe", "prompt")
    shape = (len(recipes) + 1, len(chosen))
    data = xr.Dataset(
        {
            "label": (dims, np.array(labels, dtype=object).reshape(shape)),
            "text": (dims, np.array(rows, dtype=object).reshape(shape)),
            "reason": (dims, np.array(reasons, dtype=object).reshape(shape)),
            "margin": (dims, np.array(margins).reshape(shape)),
        },
        coords={
            "recipe": [EXACT, *recipes],
            "prompt": list(chosen),
            "request": ("prompt", np.array([prompt.text for prompt in encoded], dtype=object)),
        },
    )
    meta = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "placement": str(placement or Placement()),
        "recipes": {name: str(recipe) for name, recipe in recipes.items()},
        "judge": base.judge.name,
        "max_new_tokens": base.max_new_tokens,
    }
    return Outcomes(data, meta)


def _check_recipes(model: Model, recipes: Mapping[str, Recipe]) -> None:
    if EXACT in recipes:
        raise InputError(f"a recipe was named {EXACT!r}, which is the name of the unquantized model; choose another")
    for name, recipe in recipes.items():
        if len(recipe) != model.geometry.layers:
            raise InputError(
                f"recipe {name!r} is for {len(recipe)} layers, but {model.name} has {model.geometry.layers}"
            )
