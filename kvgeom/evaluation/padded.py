"""Responses of prompts that share scales in padded batches, as the code released with arXiv:2606.09864 makes them.

Here what a prompt answers depends on its neighbours. The batches are those of all prompts of the baseline in their order,
whichever of them is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from kvgeom.errors import ModelError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.scores import kl_divergence
from kvgeom.evaluation.speculative import Answer, diverges_at
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.shared import BatchQuantizer


@dataclass(frozen=True)
class Batch:
    """What a batch answers.

    Attributes
    ----------
    prompts : list of int
    tokens : list of list of int
    margins, kl : list of float
        At the first response position, in nats.
    error, calls : float, int
        Sum, over so many calls of projections that were rounded, of the mean squared error of each.
    """

    prompts: list[int]
    tokens: list[list[int]]
    margins: list[float]
    kl: list[float]
    error: float
    calls: int


def padded(
    base: Baseline,
    work: Mapping[int, Sequence[str]],
    recipes: Mapping[str, Recipe],
    placement: Placement,
    *,
    full: bool = False,
) -> Iterator[Answer]:
    """Answers to some prompts under some recipes. Costs, for each batch and recipe, a prefill and the decoding of the batch.

    Parameters
    ----------
    base : Baseline
    work : mapping of prompt number to names of recipes
    recipes : mapping of name to Recipe
    placement : Placement
        With ``batch`` above 1.
    full : bool
        Decode every batch to its end, else until the judge reads no further in any of its responses.
    """
    for name, recipe in recipes.items():
        wanted = {index for index, names in work.items() if name in names}
        for number in sorted({index // placement.batch for index in wanted}):
            batch = run_batch(base, Condition(recipe, placement), number, full=full)
            for row, index in enumerate(batch.prompts):
                if index in wanted:
                    tokens = batch.tokens[row]
                    at = diverges_at([*tokens, None], base.tokens[index], base.ended[index])
                    yield Answer(name, index, tuple(tokens), batch.margins[row], batch.kl[row], at)


def mean_error(base: Baseline, condition: Condition, *, full: bool = False) -> float:
    """KV MSE as the released code has it: mean over all calls of all batches, padding included, each call counted alike."""
    size = condition.placement.batch
    batches = [run_batch(base, condition, number, full=full) for number in range(-(-len(base.prompts) // size))]
    calls = sum(batch.calls for batch in batches)
    return sum(batch.error for batch in batches) / calls if calls else float("nan")


def run_batch(base: Baseline, condition: Condition, number: int, *, full: bool) -> Batch:
    """One batch, made once and written down."""
    key = {"measure": "padded batch", **condition.key, "batch": number, "full": full}
    return Batch(**base.known(key, lambda: asdict(_run(base, condition, number, full))))


def _run(base: Baseline, condition: Condition, number: int, full: bool) -> Batch:
    generate = getattr(base.model, "generate_padded", None)
    if generate is None:
        raise ModelError(
            f"{base.model.name} runs no padded batches (no generate_padded), which '{condition.placement}' needs; use "
            "Placement.paper(), which rounds each prompt alone"
        )
    size = condition.placement.batch
    indices = list(range(number * size, min((number + 1) * size, len(base.prompts))))
    prompts = [base.prompts[index] for index in indices]
    quantizer = BatchQuantizer(condition.recipe, condition.placement)
    found = generate(
        [prompt.ids for prompt in prompts],
        quantizer,
        max(base.longest(index) for index in indices),
        stop=base.reader.watch(prompts, to_end=full),
    )
    kl = [
        float(kl_divergence(base.prefill(index).logits, found.first_logits[row])) for row, index in enumerate(indices)
    ]
    errors = [error for calls in quantizer.errors.values() for error in calls]
    return Batch(indices, found.tokens, base.margins(found.first_logits), kl, sum(errors), len(errors))
