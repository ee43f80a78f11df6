"""What a model answers under recipes, and how that differs from what it answers with an exact cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvgeom import progress
from kvgeom.checks import suggests
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, opened, versions
from kvgeom.evaluation.condition import COORDINATES, EXACT, Condition, as_conditions, check_name
from kvgeom.evaluation.config import RUN_OPTIONS, open_run
from kvgeom.evaluation.inputs import made_with
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.evaluation.padded import padded
from kvgeom.evaluation.scores import NONE_PREDICTS
from kvgeom.evaluation.speculative import Answer, generated, verified
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.prompts.load import as_requests
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe

#: What is known of one response, with the type of its column.
RESPONSE: dict[str, type] = {
    "text": object,
    "label": object,
    "reason": object,
    "margin": float,
    "kl": float,
    "divergence": int,
    "tokens": int,
    "likelihood": float,
}


@suggests(RUN_OPTIONS)
def evaluate(
    model: Any,
    recipes: Any,
    prompts: Any,
    *,
    placement: Placement | str | None = None,
    refused_only: bool = False,
    full_responses: bool = False,
    **options: Any,
) -> Outcomes:
    """Greedy responses and their labels under each recipe.

    The response with an exact cache serves as a draft. One pass over prompt and draft shows where a recipe would first
    have chosen another token; only from there on is anything generated, and only until the judge reads no further.
    Labels are those of plain generation, but for ties that the last digit of float arithmetic decides.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
        With a :class:`Baseline`, its model or None.
    recipes : mapping of name to recipe, or sequence of recipes
        A recipe is a :class:`~kvgeom.Recipe`, a :class:`~kvgeom.Scheme` or its name, the preset of an engine, or a
        :class:`~kvgeom.evaluation.condition.Condition`.
    prompts : PromptSet, name of one, sequence of str, or Baseline
        Of a set the harmful requests. With a :class:`Baseline` the responses with an exact cache are not made again,
        and its run options and journal are used.
    placement : Placement, "cache" or "paper", optional
        Of all recipes, instead of what a preset or a condition brings. By default each has its own, and what has none is
        rounded in the cache, as decoding does.
    refused_only : bool
        Only prompts refused with an exact cache; no others can flip.
    full_responses : bool
        Generate every response in full. Costs, per recipe and prompt, one prefill and ``max_new_tokens`` decode steps,
        and those of its reasoning.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig`, and options of :func:`kvgeom.load`.

    Returns
    -------
    Outcomes

    Raises
    ------
    InputError
        For an unknown option, recipes or prompts that cannot be used, or another model than the baseline's.
    """
    if isinstance(prompts, Baseline):
        _check_model(model, prompts.model)
        shown = bool(options.pop("progress", True))
        if options:
            raise InputError(f"{min(options)} belongs to the baseline that was given; set it in kvgeom.baseline(...)")
        prompts.journal.reopen()
        with progress.shown(shown):
            return run_conditions(
                prompts,
                as_conditions(recipes, prompts.model, placement),
                prompts=prompts.refused if refused_only else None,
                full_responses=full_responses,
            )
    loaded, run = open_run(model, options)
    conditions = as_conditions(recipes, loaded, placement)
    with opened(loaded, as_requests(prompts), run) as base:
        return run_conditions(
            base,
            conditions,
            prompts=base.refused if refused_only else None,
            full_responses=full_responses,
        )


def _check_model(given: Any, model: Model) -> None:
    """Check that a model that is given with a baseline is the baseline's."""
    if given is None or given is model or given is getattr(model, "hf_model", None):
        return
    found = load(given, progress=False)
    if found.fingerprint != model.fingerprint:
        raise InputError(
            f"the baseline is of {model.name}, got the model {found.name}; give None or the baseline's model, or make a "
            "baseline of this one"
        )


@suggests()
def run_conditions(
    base: Baseline,
    conditions: Mapping[str, Condition],
    *,
    prompts: Iterable[int] | None = None,
    full_responses: bool = False,
    title: str = "responses under recipes",
) -> Outcomes:
    """Responses of some prompts of a baseline under conditions; see :func:`evaluate`.

    Conditions with one placement share a pass over each prompt; of equal ones, one is run.

    Parameters
    ----------
    base : Baseline
    conditions : mapping of name to Condition
    prompts : iterable of int, optional
        Indices of the prompts; all by default.
    full_responses : bool
    title : str
        Of the progress bar.

    Raises
    ------
    InputError
        If a condition has the name of the model with an exact cache, or the model was changed since the baseline.
    """
    base.check_current()
    for name in conditions:
        check_name(name)
    chosen = tuple(range(len(base.prompts)) if prompts is None else map(int, prompts))
    if full_responses:  # what was read of the responses with an exact cache is not all of them
        exact = Condition(Recipe.exact(base.model.geometry.layers))
        conditions = {EXACT: exact, **conditions}
    # Of equal conditions the last stands for all.
    standing = {(each.recipe, each.placement): name for name, each in conditions.items()}
    found: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in standing.values()}
    todo: dict[Placement, dict[int, list[str]]] = {}
    for index in chosen:
        for name in found:
            key = _key(conditions[name], index, full_responses)
            if key in base.journal:
                found[name][index] = base.journal[key]
            else:
                todo.setdefault(conditions[name].placement, {}).setdefault(index, []).append(name)
    done = sum(map(len, found.values()))
    with base.run.bars(), progress.bar(title, len(found) * len(chosen), initial=done) as shown:
        for placement, work in todo.items():
            recipes = {name: conditions[name].recipe for names in work.values() for name in names}
            if placement.batch > 1:
                answers = padded(base, work, recipes, placement, full=full_responses)
            elif full_responses or not placement.allows_speculation or base.model.geometry.stepwise:
                answers = generated(base, work, recipes, placement, full=full_responses)
            else:
                answers = verified(base, work, recipes, placement)
            for answer in answers:
                record = _record(base, answer, full_responses)
                base.journal[_key(conditions[answer.recipe], answer.prompt, full_responses)] = record
                found[answer.recipe][answer.prompt] = record
                shown.update(1)
    rows = {name: found[standing[each.recipe, each.placement]] for name, each in conditions.items()}
    if not full_responses:
        conditions = {EXACT: Condition(Recipe.exact(base.model.geometry.layers)), **conditions}
        rows = {EXACT: {index: _exact(base, index) for index in chosen}, **rows}
    return _outcomes(base, conditions, rows, chosen, full_responses)


def _key(condition: Condition, index: int, full_responses: bool) -> dict[str, Any]:
    return {"measure": "response", **condition.key, "full": full_responses, "prompt": index}


def _record(base: Baseline, answer: Answer, full_responses: bool) -> dict[str, Any]:
    text, label, reason = base.judged(answer.prompt, answer.tokens)
    # Judges that come later, when the model is gone, ask for the likelihood of a full response.
    likelihood = base.log_likelihood(answer.prompt, answer.tokens) if full_responses else float("nan")
    return {
        "text": text,
        "label": label,
        "reason": reason,
        "margin": answer.margin,
        "kl": answer.kl,
        "divergence": answer.divergence,
        "tokens": len(answer.tokens),
        "likelihood": likelihood,
    }


def _exact(base: Baseline, index: int) -> dict[str, Any]:
    tokens = base.tokens[index]
    return {
        "text": base.reader.text(tokens),
        "label": base.labels[index],
        "reason": base.reasons[index],
        "margin": base.exact_margin(index),
        "kl": 0.0,
        "divergence": -1,
        "tokens": len(tokens),
        "likelihood": float("nan"),
    }


def _coordinates(condition: Condition) -> dict[str, Any]:
    """Where it stands; where it does not say, with width and granularity of the only scheme of its recipe."""
    found = {name: getattr(condition, name) for name in COORDINATES}
    scheme, *others = {scheme for pair in condition.recipe for scheme in pair}
    if scheme is not None and not others:
        found["bits"] = scheme.bits if condition.bits is None else condition.bits
        found["granularity"] = condition.granularity or scheme.granularity
    return found


def _outcomes(
    base: Baseline,
    conditions: Mapping[str, Condition],
    rows: Mapping[str, Mapping[int, Mapping[str, Any]]],
    chosen: Sequence[int],
    full_responses: bool,
) -> Outcomes:
    shape = (len(conditions), len(chosen))
    columns: dict[str, Any] = {
        column: (
            ("recipe", "prompt"),
            np.array([[rows[name][index][column] for index in chosen] for name in conditions], dtype=dtype).reshape(
                shape
            ),
        )
        for column, dtype in RESPONSE.items()
    }
    coords: dict[str, Any] = {
        "recipe": list(conditions),
        "prompt": list(chosen),
        "request": ("prompt", np.array([base.prompts[index].text for index in chosen], dtype=object)),
        "first_token": ("prompt", np.array([base.first_tokens[index] for index in chosen], dtype=int)),
        "placement": ("recipe", np.array([str(each.placement) for each in conditions.values()], dtype=object)),
    }
    stand = [_coordinates(each) for each in conditions.values()]
    for name in COORDINATES:
        values = [each[name] for each in stand]
        if name in ("family", "granularity"):
            coords[name] = ("recipe", np.array(values, dtype=object))
        else:
            coords[name] = ("recipe", np.array([-1 if value is None else value for value in values], dtype=int))
    meta = {
        **made_with(base.model, [prompt.text for prompt in base.prompts]),
        "recipes": {name: str(each.recipe) for name, each in conditions.items() if name != EXACT},
        "judge": base.judge.name,
        "max_new_tokens": base.max_new_tokens,
        "max_reasoning_tokens": base.run.max_reasoning_tokens,
        "begins_with_reasoning": base.begins_with_reasoning,
        "refusal_tokens": sorted(base.refusal_tokens),
        "no_margin": NONE_PREDICTS
        if base.refused and not base.refusal_tokens and not base.begins_with_reasoning
        else "",
        "asked": len(base.prompts),
        "full_responses": full_responses,
        "seed": base.run.seed,
        "versions": versions(),
    }
    return Outcomes(xr.Dataset(columns, coords=coords), meta)
