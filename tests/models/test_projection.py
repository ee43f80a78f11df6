"""The paper's placement on the real demo model, against an independent straight-line reimplementation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.models.hf import HFModel
from kvgeom.prompts.sets import calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.straight_line import StraightLineQwen2

TOKENS = 12


@pytest.fixture(scope="module")
def straight(demo: HFModel) -> StraightLineQwen2:
    return StraightLineQwen2(dict(demo.hf_model.named_parameters()), demo.hf_model.config)


@pytest.fixture(scope="module")
def base(demo: HFModel) -> Baseline:
    """Of so many requests that their refusals tell which first tokens predict one, without which there is no margin."""
    return baseline(demo, calibration().harmful[:12], max_new_tokens=TOKENS, progress=False)


def test_straight_line_is_the_model(demo: HFModel, base: Baseline, straight: StraightLineQwen2) -> None:
    for index in range(2):
        response, first, _ = straight.generate(list(base.prompts[index].ids), {}, TOKENS, demo.stop_tokens)
        torch.testing.assert_close(first, base.prefill(index).logits, atol=2e-3, rtol=1e-3)
        assert tuple(response[: len(base.tokens[index])]) == base.tokens[index]


@pytest.mark.parametrize(
    ("layers", "granularity"), [((14,), "tensor"), ((3,), "channel"), (range(24), "tensor"), (range(24), "channel")]
)
def test_agrees_with_straight_line(
    demo: HFModel, base: Baseline, straight: StraightLineQwen2, layers: Sequence[int], granularity: str
) -> None:
    recipe = Recipe.uniform(24, Scheme(3, True, granularity), layers=layers)  # type: ignore[arg-type]
    rounding = dict.fromkeys(layers, (3, granularity == "channel"))
    outcomes = evaluate(demo, {"r": recipe}, base, placement=Placement.paper(), progress=False).data.sel(recipe="r")
    for index, prompt in enumerate(base.prompts[:4]):
        response, first, _ = straight.generate(list(prompt.ids), rounding, TOKENS, demo.stop_tokens)
        verdict = KeywordJudge().label(
            prompt.text, demo.decode(response), lambda i=index, r=response: likelihood(base, i, r)
        )
        assert outcomes.label.sel(prompt=index).item() == verdict.label
        # A value next to the border between two levels goes either way with the last digit, and the layers after it
        # drift apart, on one processor more than on another. So each layer is given what the other's read.
        ours, inputs = kv_errors(demo, recipe, prompt.ids)
        errors: list[tuple[int, str, torch.Tensor]] = []
        straight.step(list(prompt.ids), [], rounding, errors, inputs)
        theirs = {(layer, site): float((error**2).mean()) for layer, site, error in errors}
        assert ours == pytest.approx(theirs, rel=0.005)
        if len(layers) == 1:
            margin = base.margins(first[None])[0]
            assert outcomes.margin.sel(prompt=index).item() == pytest.approx(margin, abs=0.02)


def likelihood(base: Baseline, index: int, response: list[int]) -> float:
    """Mean log-probability of a response, from one pass over prompt and response."""
    prompt = base.prompts[index]
    logits = base.model.forward([*prompt.ids, *response[:-1]], all_logits=True)[len(prompt) - 1 :]
    found = float(logits.log_softmax(-1)[torch.arange(len(response)), response].mean())
    assert base.log_likelihood(index, response) == pytest.approx(found, abs=1e-3)
    return found


def kv_errors(
    demo: HFModel, recipe: Recipe, ids: tuple[int, ...]
) -> tuple[dict[tuple[int, str], float], dict[int, torch.Tensor]]:
    """Mean squared rounding error of keys and values at their projections, and what each layer read meanwhile."""
    seen: dict[tuple[int, str], float] = {}
    inputs: dict[int, torch.Tensor] = {}

    class Watching(Quantizer):
        def __call__(self, layer, site, x):  # type: ignore[no-untyped-def]
            rounded = super().__call__(layer, site, x)
            if self.recipe.scheme(layer, site) is not None:
                seen[layer, site] = float(((rounded - x) ** 2).mean())
            return rounded

    def read(layer, hidden):  # type: ignore[no-untyped-def]
        inputs[layer] = hidden[0].clone()

    handles = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: read(layer, args[0]))
        for layer, block in enumerate(demo.hf_model.model.layers)
    ]
    try:
        demo.forward(ids, demo.new_cache(Watching(recipe, Placement.paper())))
    finally:
        for handle in handles:
            handle.remove()
    return seen, inputs
