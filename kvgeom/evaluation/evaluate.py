"""What a model answers under recipes, and how that differs from what it answers unquantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.outcomes import EXACT, Outcomes
from kvgeom.evaluation.speculative import generated, verified
from kvgeom.judges.judge import Judge
from kvgeom.models.model import Model
from kvgeom.progress import bar
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe


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
