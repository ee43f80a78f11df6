"""Responses read under a rounded cache instead of made anew: what a cache does to each token, without any generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvgeom import progress
from kvgeom.checks import suggests
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.scores import kl_divergence
from kvgeom.evaluation.speculative import diverges_at
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.quant.quantizer import Quantizer


@dataclass(frozen=True)
class ForcedReading:
    """How a cache reads the response that the exact cache gave to one prompt.

    Attributes
    ----------
    margin : float
        Refusal margin (nats) at the first response position; NaN where the model has none.
    kl : tuple of float
        Divergence (nats) of the next-token distribution from that with an exact cache, at every token of the response.
    agreed : int
        Tokens of the response that are the most likely ones under the cache too.
    divergence : int
        The first token that is not; -1 if there is none.
    """

    margin: float
    kl: tuple[float, ...]
    agreed: int
    divergence: int


@suggests()
def forced_readings(
    base: Baseline,
    conditions: Mapping[str, Condition],
    prompts: Iterable[int],
    *,
    first_only: bool = False,
    title: str = "reading responses",
) -> dict[str, list[ForcedReading]]:
    """The responses of the exact cache to some prompts, read under each condition.

    Costs, per prompt and condition, one pass over the prompt and its response (less the layers below the first that is
    rounded); where a window waits for tokens that are decoded, the response comes token by token.

    Parameters
    ----------
    base : Baseline
    conditions : mapping of name to Condition
    prompts : iterable of int
        Numbers of prompts of the baseline. Empty responses are read as well: their first position is.
    first_only : bool
        Read no more than the first token of each response: a pass over the prompt alone.
    title : str
        Of the progress bar.

    Returns
    -------
    dict of name to list of ForcedReading
        One for each prompt, in their order.

    Raises
    ------
    InputError
        For scales that the prompts of a batch share: what is read then hangs on all of them.
    """
    base.check_current()
    chosen = list(prompts)
    for name, condition in conditions.items():
        if condition.placement.batch > 1:
            raise InputError(
                f"{name} shares scales between the prompts of a batch, so that no response can be read by itself; give batch=1, or run a sweep"
            )
    found: dict[tuple[str, int], ForcedReading] = {}
    with base.run.bars(), progress.bar(title, len(chosen) * len(conditions)) as shown:
        for index in chosen:
            todo = dict(conditions)
            for name, condition in conditions.items():
                if (key := _key(condition, index, first_only)) in base.journal:
                    found[name, index] = _of_record(base.journal[key])
                    shown.update(1)
                    del todo[name]
            for part, read in in_batches(
                _in_order(todo),
                _rows(base, index, first_only),
                partial(_read, base, index, first_only, conditions=todo),
            ):
                for name, reading in zip(part, read, strict=True):
                    base.journal[_key(todo[name], index, first_only)] = asdict(reading)
                    found[name, index] = reading
                    shown.update(1)
    return {name: [found[name, index] for index in chosen] for name in conditions}


def _key(condition: Condition, index: int, first_only: bool) -> dict[str, Any]:
    return {"measure": "forced reading", **condition.key, "prompt": index, "first_only": first_only}


def _of_record(record: Mapping[str, Any]) -> ForcedReading:
    return ForcedReading(record["margin"], tuple(record["kl"]), record["agreed"], record["divergence"])


def _in_order(conditions: Mapping[str, Condition]) -> list[str]:
    """Those that one pass serves beside each other, by the first layer that they touch, as branches must be."""
    return sorted(conditions, key=lambda name: (str(conditions[name].placement), conditions[name].recipe.first_touched))


def _rows(base: Baseline, index: int, first_only: bool) -> int:
    read = 1 if first_only else len(base.tokens[index]) + 1
    return rows_per_batch(base.model, len(base.prompts[index]) + read, read, base.run.batch_size)


def _read(
    base: Baseline, index: int, first_only: bool, part: Sequence[str], *, conditions: Mapping[str, Condition]
) -> list[ForcedReading]:
    """One prompt and its response under several conditions."""
    response = base.tokens[index][:1] if first_only else base.tokens[index]
    exact: Tensor | None = None
    found: dict[str, ForcedReading] = {}
    branching: dict[str, list[str]] = {}
    for name in part:
        placement = conditions[name].placement
        if placement.allows_speculation and not base.model.geometry.stepwise:
            branching.setdefault(str(placement), []).append(name)
    for names in branching.values():
        logits = _branches(base, index, response, [conditions[name] for name in names])
        exact = logits[0]
        found |= {name: _compared(base, response, row, exact) for name, row in zip(names, logits[1:], strict=True)}
    for name in part:
        if name not in found:
            exact = _stepwise(base, index, response, None) if exact is None else exact
            found[name] = _compared(base, response, _stepwise(base, index, response, conditions[name]), exact)
    return [found[name] for name in part]


def _branches(base: Baseline, index: int, response: Sequence[int], conditions: Sequence[Condition]) -> Tensor:
    """Logits [1 + conditions, response, vocabulary] that predict the response; row 0 is the exact cache."""
    model, prompt = base.model, base.prompts[index].ids
    placement = conditions[0].placement
    edits = [Quantizer(each.recipe, placement, prompt_tokens=len(prompt)) for each in conditions]
    first = [each.recipe.first_touched if model.branches_late else 0 for each in conditions]
    cache = model.branching_cache(edits)
    if placement.prefill_reads != "exact":
        ids = [*prompt, *response[:-1]]
        return model.forward_branches(ids, edits, first, cache=cache, last=max(len(response), 1))
    # An engine whose prefill reads exact values rounds after it: prompt and response are two calls there.
    logits = [model.forward_branches(prompt, edits, first, cache=cache)]
    if len(response) > 1:
        rest = response[:-1]
        logits.append(model.forward_branches(rest, edits, first, cache=cache, last=len(rest)))
    return torch.cat(logits, dim=1)


def _stepwise(base: Baseline, index: int, response: Sequence[int], condition: Condition | None) -> Tensor:
    """The same logits [response, vocabulary] of one cache, token by token as decoding runs them."""
    model = base.model
    cache = model.new_cache(Quantizer(condition.recipe, condition.placement) if condition else None)
    logits = [model.forward(base.prompts[index].ids, cache)[-1:]]
    logits += [model.forward([token], cache)[-1:] for token in response[:-1]]
    return torch.cat(logits)


def _compared(base: Baseline, response: Sequence[int], logits: Tensor, exact: Tensor) -> ForcedReading:
    argmax = [None if token in base.model.stop_tokens else token for token in logits.argmax(-1).tolist()]
    return ForcedReading(
        margin=base.margins(logits[:1])[0],
        kl=tuple(kl_divergence(exact, logits).double().tolist()),
        agreed=sum(a == b for a, b in zip(argmax, response, strict=False)),
        divergence=diverges_at(argmax[: len(response)], response, False),
    )
