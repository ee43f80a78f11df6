"""The full diagnosis against the same recipes by plain batched generation: wall time, labels, tokens, profile.

Run:  python benchmarks/diagnosis.py [--model demo] [--new-tokens 64] [--sample 12] [--prompts 20]

Timed twice: all that a diagnosis runs, and the least that one must run (sweep, all single layers per-tensor
and per-channel, channel ablation, PCR). All sides run in one process on the same machine, after each other. Plain
generation prefills every prompt under every recipe and decodes in batches to the end, for all prompts. Because it takes
so long, it is timed on every n-th recipe (--sample of them, 0 for all) and scaled up; labels are compared on the same
recipes.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import Tensor

import kvgeom
from kvgeom.behaviour.ablation import channel_magnitudes, channel_subsets
from kvgeom.behaviour.scan import scan_of, single_layers
from kvgeom.behaviour.widths import at_widths
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.evaluation.speculative import Answer, generated, verified
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: The module, in which a function is replaced while recipes are noted.
evaluation: Any = importlib.import_module("kvgeom.evaluation.evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sample", type=int, default=12)
    options = parser.parse_args()
    model = kvgeom.load(options.model)
    prompts = kvgeom.calibration().take(options.prompts)
    model.forward(model.encode(prompts.harmful[:1])[0].ids)  # warm up

    spent, ran = Clock(model), Recipes()
    begin = time.perf_counter()
    found = kvgeom.diagnose(model, prompts, max_new_tokens=options.new_tokens, geometry=False, progress=False)
    fast = time.perf_counter() - begin
    spent.stop()
    recipes = ran.stop()
    perplexities = spent.seconds.pop("perplexity", 0.0)
    fast -= perplexities  # the same on both sides
    print(
        f"{model!r}, {len(prompts.harmful)} prompts, {len(found.baseline.refused)} refused, {options.new_tokens} tokens"
    )
    print(f"diagnosis: {len(recipes)} recipes in {fast:.0f} s (without {perplexities:.0f} s for perplexities)")
    for name, seconds in sorted(spent.seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:<32} {seconds:7.1f} s  {seconds / fast:4.0%}  {spent.calls[name]} calls")
    rest = fast - sum(spent.seconds.values())
    print(f"  {'everything else':<32} {rest:7.1f} s  {rest / fast:4.0%}")

    ran = Recipes()
    begin = time.perf_counter()
    run_list(model, prompts, options.new_tokens)
    fast_list = time.perf_counter() - begin
    listed = ran.stop()
    print(f"sweep, single layers, channels, PCR: {len(listed)} recipes in {fast_list:.0f} s")

    step = max(1, len(recipes) // options.sample) if options.sample else 1
    base, labels, same, tokens, parted = found.baseline, 0, 0, 0, list[str]()
    plain = dict[tuple[Recipe, Placement], float]()
    for recipe, placement in recipes[::step]:
        begin = time.perf_counter()
        answers = list(generated(base, {i: ["r"] for i in range(len(base.prompts))}, {"r": recipe}, placement))
        judged = {answer.prompt: base.judged(answer.prompt, answer.tokens)[1] for answer in answers}
        plain[recipe, placement] = time.perf_counter() - begin
        responses = {answer.prompt: answer.tokens for answer in answers}
        for quick in verified(base, {i: ["r"] for i in base.refused}, {"r": recipe}, placement):
            labels, tokens = labels + 1, tokens + len(quick.tokens)
            same += base.judged(quick.prompt, quick.tokens)[1] == judged[quick.prompt]
            if quick.tokens != responses[quick.prompt][: len(quick.tokens)]:
                parted.append(parting(base, quick, responses[quick.prompt], recipe, placement))
    print(f"labels equal: {same} of {labels}; responses that part: {len(parted)}, tokens compared: {tokens}")
    for line in parted:
        print(line)
    for what, timed, chosen in (("diagnosis", fast, recipes), ("list", fast_list, listed)):
        timings = [plain[recipe] for recipe in chosen if recipe in plain]
        whole = float(np.mean(timings)) * len(chosen)
        print(f"{what}: plain generation {whole:.0f} s (from {len(timings)} recipes), ratio {whole / timed:.1f}x")


def parting(base: Baseline, quick: Answer, plain: Sequence[int], recipe: Recipe, placement: Placement) -> str:
    """Where two responses part, and how much more (nats) each way of computing likes the one's token than the other's."""
    model, ids = base.model, base.prompts[quick.prompt].ids
    at = next(at for at, (a, b) in enumerate(zip_longest(quick.tokens, plain)) if a != b)
    steps = model.new_cache(Quantizer(recipe, placement))
    logits = model.forward(ids, steps)[-1]
    for token in plain[:at]:
        logits = model.forward([token], steps)[-1]
    whole = model.new_cache(Quantizer(recipe, placement, prompt_tokens=len(ids)))
    at_once = model.forward([*ids, *plain[:at]], whole)[-1]
    ends = list(model.stop_tokens)

    def gap(row: Tensor) -> float:
        one, other = (row[list(tokens[at : at + 1]) or ends].max() for tokens in (quick.tokens, plain))
        return float(one - other)

    return (
        f"  prompt {quick.prompt}, draft left at {quick.divergence}, parts at {at} of {len(quick.tokens)}: "
        f"{gap(logits):+.2e} by steps, {gap(at_once):+.2e} in one pass, logits differ by "
        f"{float((logits - at_once).abs().max()):.1e} ({recipe}, {placement})"
    )


def run_list(model: Any, prompts: PromptSet, new_tokens: int) -> None:
    """The least that a diagnosis must run, from responses with an exact cache on."""
    tensor, n_layers = Scheme(3, symmetric=True, granularity="tensor"), model.geometry.layers
    base = kvgeom.baseline(model, prompts.harmful, max_new_tokens=new_tokens, progress=False)

    def run(conditions: Mapping[str, Condition]) -> Outcomes:
        return run_conditions(base, conditions, prompts=base.refused)

    scan = single_layers(n_layers, tensor)
    worst = scan_of(run({**scan, **at_widths().conditions(model)}), tensor).worst_layer
    where = range(n_layers) if worst is None else [worst]
    run(channel_subsets(channel_magnitudes(base), tensor, where))
    if worst is not None:
        run(single_layers(n_layers, tensor, Placement.paper(), where))


class Clock:
    """Seconds and calls of the model's methods while it is on; nested calls count once."""

    def __init__(self, model: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._model, self._depth = model, 0
        names = {
            "forward_branches": "drafts, teacher-forced",
            "generate": "decoding",
            "forward": "prefill, likelihood, perplexity",
        }
        for method, name in names.items():
            setattr(model, method, self._timed(getattr(model, method), name))
        self._methods = names

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    long = len(args[0]) > 300 if name.startswith("prefill") else False
                    label = "perplexity" if long else name.replace(", perplexity", "")
                    self.seconds[label] += time.perf_counter() - begin
                    self.calls[label] += 1

        return run

    def stop(self) -> None:
        for method in self._methods:
            delattr(self._model, method)


class Recipes:
    """All recipes that are evaluated while it is on, each once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Recipe, Placement], None] = {}
        self._verified = evaluation.verified

        def noted(base: Any, work: Any, recipes: Any, placement: Placement) -> Any:
            for name in {name for names in work.values() for name in names}:
                self._found[recipes[name], placement] = None
            return self._verified(base, work, recipes, placement)

        evaluation.verified = noted

    def stop(self) -> list[tuple[Recipe, Placement]]:
        evaluation.verified = self._verified
        found = list(self._found)
        order = np.random.default_rng(0).permutation(len(found))
        return [found[index] for index in order]


if __name__ == "__main__":
    main()
