"""Padded batches that share scales, against the released protocol in plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import kvgeom
from kvgeom.behaviour.pcr import per_channel_reduction
from kvgeom.errors import ModelError
from kvgeom.evaluation.baseline import Baseline, run_baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.config import RunConfig
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.padded import mean_error
from kvgeom.models.hf import HFModel
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.judges import ArbitraryJudge, CountingJudge
from tests.builders.released import ReleasedQwen2, rounded
from tests.builders.requests import PAIRS, REQUESTS
from tests.builders.tiny import tiny_model, wide_model

MODEL = wide_model()
STRAIGHT = ReleasedQwen2(
    {name: weight.detach() for name, weight in MODEL.hf_model.named_parameters()}, MODEL.hf_model.config
)
TOKENS = 6
EVERY = [(layer, site) for layer in range(3) for site in "kv"]
#: Each with what the batch of 4 does in plain arithmetic at each layer and site.
CASES: dict[str, tuple[Recipe, Placement, dict[tuple[int, str], Callable[..., object]]]] = {}


def case(name: str, recipe: Recipe, rounding: dict[tuple[int, str], object], alone: str = "scheme") -> None:
    placement = Placement(where="projection", scales="call", batch=4, alone=alone)  # type: ignore[arg-type]
    CASES[name] = recipe, placement, rounding  # type: ignore[assignment]


def uniform(text: str, **keywords: object) -> None:
    scheme = Scheme.parse(text)
    part = partial(
        rounded,
        bits=scheme.bits,
        symmetric=scheme.symmetric,
        granularity=scheme.granularity,
        size=scheme.group_size or 0,
    )
    case(text, Recipe.uniform(3, scheme), dict.fromkeys(EVERY, part))


for text in (
    *("released3-sym-tensor", "released4-sym-channel", "released4-asym-channel", "released4-asym-token"),
    *("released3-asym-tensor", "released4-sym-group64"),
):
    uniform(text)
case(
    "one layer",
    Recipe.uniform(3, "released3-sym-tensor", layers=[1]),
    dict.fromkeys([(1, "k"), (1, "v")], partial(rounded, bits=3, symmetric=True, granularity="tensor")),
)
case(
    "some channels",
    Recipe.uniform(3, Scheme.parse("released3-sym-tensor").only([0, 5, 70]), layers=[0]),
    dict.fromkeys(
        [(0, "k"), (0, "v")], partial(rounded, bits=3, symmetric=True, granularity="tensor", channels=[0, 5, 70])
    ),
)
_keys = partial(rounded, bits=2, symmetric=False, granularity="channel", lone_by_token=True)
_values = partial(rounded, bits=2, symmetric=False, granularity="group", size=32)
case(
    "kivi",
    Recipe(((Scheme.parse("released2-asym-channel"), Scheme.parse("released2-asym-group32")),) * 3),
    {(layer, site): _keys if site == "k" else _values for layer, site in EVERY},
    alone="token",
)


@pytest.fixture(scope="module")
def base() -> Baseline:
    return run_baseline(MODEL, REQUESTS[:6], RunConfig(judge=ArbitraryJudge(), max_new_tokens=TOKENS, progress=False))


def straight(base: Baseline, rounding: dict[tuple[int, str], Callable[..., object]]):  # type: ignore[no-untyped-def]
    """Responses, first logits and errors of batches of 4, the last of which has two prompts."""
    responses, first, errors = [], [], []
    for begin in (0, 4):
        found = STRAIGHT.batch(
            [prompt.ids for prompt in base.prompts[begin : begin + 4]],
            rounding,  # type: ignore[arg-type]
            TOKENS,
            MODEL.stop_tokens,
            pad=0,
            filler=2,
        )
        responses += found[0]
        first.append(found[1])
        errors += found[2]
    return responses, torch.cat(first), errors


def test_prompts_differ_in_length_and_batches_are_padded(base: Baseline) -> None:
    assert len({len(prompt) for prompt in base.prompts[:4]}) > 2
    assert MODEL.tokenizer.pad_token_id == 0
    assert MODEL.tokenizer.eos_token_id == 2


def test_without_rounding_padding_changes_nothing(base: Baseline) -> None:
    responses, first, _ = straight(base, {})
    assert [tuple(tokens) for tokens in responses] == list(base.tokens)
    for index in range(6):
        torch.testing.assert_close(first[index], base.prefill(index).logits, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_labels_and_errors_are_those_of_plain_arithmetic(base: Baseline, name: str) -> None:
    recipe, placement, rounding = CASES[name]
    condition = Condition(recipe, placement)
    found = run_conditions(base, {"r": condition}, full_responses=True).data.sel(recipe="r")
    responses, _, errors = straight(base, rounding)
    expected = [MODEL.decode(tokens) for tokens in responses]
    assert found.text.values.tolist() == expected
    for index in range(6):
        text, label, _ = base.judged(index, responses[index])
        assert (found.text.values[index], found.label.values[index]) == (text, label)
    assert mean_error(base, condition, full=True) == pytest.approx(sum(errors) / len(errors), rel=2e-3)


def test_the_neighbours_of_a_prompt_decide_what_it_answers(base: Baseline) -> None:
    """In an engine they do not; here the scale is theirs too, and so is the padding that they bring."""
    recipe, placement, _ = CASES["released3-sym-tensor"]
    alone = run_conditions(base, {"r": Condition(recipe, Placement.paper())})
    together = run_conditions(base, {"r": Condition(recipe, placement)})
    assert (alone.data.kl.sel(recipe="r") != together.data.kl.sel(recipe="r")).any()
    ones = run_conditions(base, {"r": Condition(recipe, Placement(where="projection", scales="call", batch=1))})
    assert ones.data.text.values.tolist() == alone.data.text.values.tolist()


def test_some_prompts_answer_as_in_the_batches_of_all(base: Baseline) -> None:
    recipe, placement, _ = CASES["released3-sym-tensor"]
    every = run_conditions(base, {"r": Condition(recipe, placement)}).data.sel(recipe="r")
    some = run_conditions(base, {"r": Condition(recipe, placement)}, prompts=[5, 1]).data.sel(recipe="r")
    for index in (5, 1):
        assert some.text.sel(prompt=index) == every.text.sel(prompt=index)
        assert some.kl.sel(prompt=index) == every.kl.sel(prompt=index)


def test_labels_are_those_of_full_responses_and_a_journal_keeps_the_batches(tmp_path: Path) -> None:
    recipe, placement, _ = CASES["released3-sym-tensor"]
    run = RunConfig(judge=CountingJudge(), max_new_tokens=12, progress=False, journal=tmp_path / "j.jsonl")
    base = run_baseline(MODEL, REQUESTS[:6], run)
    short = run_conditions(base, {"r": Condition(recipe, placement)}).data.label
    full = run_conditions(base, {"r": Condition(recipe, placement)}, full_responses=True).data.label
    assert short.sel(recipe="r").values.tolist() == full.sel(recipe="r").values.tolist()
    base.journal.close()
    again = run_baseline(MODEL, REQUESTS[:6], run)
    known = again.journal.known  # type: ignore[attr-defined]
    assert run_conditions(again, {"r": Condition(recipe, placement)}).data.label.equals(short)
    assert mean_error(again, Condition(recipe, placement)) > 0
    assert again.journal.known == known  # type: ignore[attr-defined]
    again.journal.close()


def test_a_model_that_runs_no_padded_batches_says_so() -> None:
    class Single(HFModel):
        generate_padded = None  # type: ignore[assignment]

    tiny = tiny_model()
    single = Single(tiny.hf_model, tiny.tokenizer, name="single")
    base = run_baseline(single, REQUESTS[:2], RunConfig(judge=ArbitraryJudge(), max_new_tokens=2, progress=False))
    condition = Condition(Recipe.uniform(3, "released3-sym-tensor"), Placement.released())
    with pytest.raises(ModelError, match=r"Placement\.paper"):
        run_conditions(base, {"r": condition})


def test_per_channel_reduction_takes_grids_and_batches(base: Baseline) -> None:
    """Flips per tensor and per channel are those of the batches in plain arithmetic."""
    found = per_channel_reduction(base, 1, "released3-asym-tensor", placement=Placement.released())
    lost = {}
    for granularity in ("tensor", "channel"):
        part = partial(rounded, bits=3, symmetric=False, granularity=granularity)
        responses, _, _ = straight(base, dict.fromkeys([(1, "k"), (1, "v")], part))
        labels = [base.judged(index, responses[index])[1] for index in base.refused]
        lost[granularity] = labels
    kept = [n for n, label in enumerate(lost["tensor"]) if label in ("refused", "complied")]
    assert int(found.data.flips_tensor) == sum(lost["tensor"][n] == "complied" for n in kept)
    assert int(found.data.flips_channel) == sum(lost["channel"][n] != "refused" for n in kept)


@pytest.mark.slow
def test_the_geometry_takes_the_grid() -> None:
    """A clamped zero point destroys keys by channel that a key bias moves off 0, and the noise shows it."""
    space = kvgeom.subspace(MODEL, PAIRS, progress=False)
    noise = {
        form: space.sensitivity(f"{form}4-asym-channel", progress=False).data.nsr_full.sel(site="k").values
        for form in ("int", "released")
    }
    assert (noise["released"] > 1.1 * noise["int"]).all()
