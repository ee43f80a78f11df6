"""Draft-verified responses against plain generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.speculative import OPENING
from kvgeom.judges.judge import Judgement
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.models.cache import BatchedEdit, EditedCache
from kvgeom.models.hf import HFModel
from kvgeom.prompts.sets import calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics
from tests.builders.judges import CountingJudge
from tests.builders.recipes import recipes
from tests.builders.requests import REQUESTS as ALL_REQUESTS
from tests.builders.tiny import KINDS, tiny_model

pytestmark = pytest.mark.long

#: Fewer requests, which are evaluated many times.
REQUESTS = ALL_REQUESTS[:6]
PLACEMENTS = [Placement.cache(), Placement.paper(), Placement(prefill_reads="exact"), Placement(scales="call")]
TINY = {kind: tiny_model(kind, seed=1) for kind in KINDS}


@settings(max_examples=8)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(PLACEMENTS),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sets(st.integers(0, len(REQUESTS) - 1), min_size=1),
)
def test_drafts_give_what_generation_gives(
    kind: str, placement: Placement, reads: int, length: int, batch_size: int, chosen: set[int]
) -> None:
    """Random models diverge everywhere, so every path is taken: at once, later, at the end, never."""
    model, asked = TINY[kind], [REQUESTS[i] for i in sorted(chosen)]
    base = baseline(
        model, asked, judge=CountingJudge(reads), max_new_tokens=length, batch_size=batch_size, progress=False
    )
    fast, full = (
        evaluate(model, recipes(3), base, placement=placement, full_responses=slow, progress=False)
        for slow in (False, True)
    )
    for name in fast.data.recipe.values:
        for prompt in fast.data.prompt.values:
            one, other = (x.data.sel(recipe=name, prompt=prompt) for x in (fast, full))
            assert other.text.item().startswith(one.text.item().rstrip("\ufffd"))  # half a character may be read
            for column in ("label", "reason", "divergence"):
                assert one[column].item() == other[column].item(), (name, column)
            assert one.margin.item() == pytest.approx(other.margin.item(), abs=1e-3, nan_ok=True)
            assert one.kl.item() == pytest.approx(other.kl.item(), abs=1e-3)
            assert int(one.tokens) <= int(other.tokens)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement(prefill_reads="exact"),
        Placement(prefill_reads="last"),
        Placement(residual=4, prefill_reads="exact"),
        Placement(residual=4, prefill_reads="exact", flush="all"),
        Placement(sinks=3),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name",
    [
        "center",
        "int3-asym-channel-group4",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hadamard", "fp8_e4m3")),
    ],
)
def test_drafts_under_what_engines_do(name: str, placement: Placement) -> None:
    """Offsets that turn with their position, blocks, windows and sinks: fast and full agree on every label."""
    model = TINY["qwen2"]
    scheme = Scheme.parse(
        {"center": "int4-asym-token+center", "hadamard": "int3-asym-token-head+hadamard"}.get(name, name)
    )
    offsets = Statics.of("key bias", model.key_biases(), rotary=True)
    made = {
        "all": Recipe.uniform(3, scheme).with_statics(offsets=offsets),
        "one": Recipe.uniform(3, scheme, layers=[1]).with_statics(offsets=offsets),
        "plain": Recipe.uniform(3, Scheme(3)),
    }
    base = baseline(model, REQUESTS, judge=CountingJudge(6), max_new_tokens=8, progress=False)
    fast, full = (
        evaluate(model, made, base, placement=placement, full_responses=slow, progress=False).data
        for slow in (False, True)
    )
    assert (fast.label.values == full.label.values).all()
    assert (fast.divergence.values == full.divergence.values).all()
    np.testing.assert_allclose(fast.margin.values, full.margin.values, atol=1e-3)
    if placement.allows_speculation and name == "center":
        plain, centred = (float(abs(fast.kl.sel(recipe=r)).mean()) for r in ("plain", "all"))
        assert plain != centred


def test_every_path_is_taken() -> None:
    """The test above would mean nothing if no draft survived, or all did."""
    base = baseline(TINY["qwen2"], REQUESTS, judge=CountingJudge(6), max_new_tokens=8, progress=False)
    found = evaluate(TINY["qwen2"], recipes(3), base, progress=False).data
    divergence = found.divergence.values[1:]
    assert (divergence == -1).any()
    assert (divergence == 0).any()
    assert ((divergence > 0) & (divergence < OPENING)).any()
    assert (divergence >= OPENING).any()


def test_who_has_diverged_runs_no_further() -> None:
    """Rows of each pass, counted where all branches are in: those that the opening has lost are not in the second."""
    model, passes = tiny_model("qwen2", seed=1), list[tuple[int, int]]()
    base = baseline(model, REQUESTS, judge=CountingJudge(6), max_new_tokens=8, progress=False)
    model._layers[-1].register_forward_hook(lambda _module, _args, output: passes.append(tuple(output.shape[:2])))
    generate, pools = model.generate, list[int]()

    def counted(caches: Sequence[EditedCache], *args: Any, **kwargs: Any) -> list[list[int]]:
        pools.append(len(caches))
        before = len(passes)
        response = generate(caches, *args, **kwargs)
        del passes[before:]
        return response

    model.generate = counted  # type: ignore[method-assign]
    found = evaluate(model, recipes(3), base, progress=False).data.sel(recipe=[n for n in recipes(3) if n != "nothing"])
    expected = []
    for index, prompt in enumerate(base.prompts):
        at, tokens = found.divergence.sel(prompt=index).values, len(base.tokens[index]) - (not base.ended[index])
        expected.append((1 + len(at), len(prompt) + min(tokens, OPENING - 1)))
        agree = int(((at < 0) | (at >= OPENING)).sum())
        if agree and tokens > OPENING - 1:
            expected.append((1 + agree, tokens - OPENING + 1))
    assert [size for size in passes if size[0] > 1] == expected
    assert any(1 < rows < 1 + len(found.recipe) for rows, _ in expected)
    assert len(pools) == 1  # what diverges is decoded together, of all prompts and recipes
    assert 0 < pools[0] <= (found.divergence.values >= 0).sum()


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.sampled_from(PLACEMENTS), st.sets(st.integers(0, 5), min_size=1), st.integers(1, 4))
def test_branches_leave_a_pass(kind: str, placement: Placement, stay: set[int], late: int) -> None:
    """Those that stay go on as if the others were still there, in the layers that all, some or none of them have reached."""
    model = TINY[kind]
    made = sorted((r for r in recipes(3).values() if r.touched), key=lambda recipe: min(recipe.touched))
    prompt = model.encode(["open the door"])[0].ids
    response = model.tokens("well, no")[:late]
    logits = []
    for chosen in (list(range(6)), sorted(stay)):
        edits = [Quantizer(recipe, placement, prompt_tokens=len(prompt)) for recipe in made]
        first = [min(recipe.touched) for recipe in made]
        cache = model.branching_cache(edits)
        model.forward_branches(prompt, edits, first, cache=cache)
        if len(chosen) < 6:
            cache.keep(torch.tensor([0, *(row + 1 for row in chosen)]))
        left = [first[row] for row in chosen]
        logits.append(model.forward_branches(response, [edits[i] for i in chosen], left, cache=cache, last=late))
        rows = [cache.row(place + 1, len(prompt) + late).layers[2].keys for place in range(len(chosen))]
        logits.append(torch.cat(rows))
    full, keys, part, part_keys = logits
    torch.testing.assert_close(part, full[[0, *(row + 1 for row in sorted(stay))]], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(part_keys, keys[sorted(stay)], atol=1e-3, rtol=1e-3)


def test_the_same_is_done_once() -> None:
    """Equal recipes under two names are one row, and equal responses are judged once."""
    asked: list[tuple[str, str]] = []

    @dataclass(frozen=True)
    class Noting(CountingJudge):
        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
            asked.append((request, response))
            return super().label(request, response, likelihood)

    model = TINY["qwen2"]
    base = baseline(model, REQUESTS, judge=Noting(6), max_new_tokens=8, progress=False)
    rows: list[int] = []

    def counted(self: HFModel, ids: Sequence[int], edits: Sequence[object], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(edits))
        return HFModel.forward_branches(self, ids, edits, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward_branches", partial(counted, model), raising=False)
        found = evaluate(model, {"one": recipes(3)["middle"], "two": recipes(3)["middle"]}, base, progress=False).data
    assert rows
    assert max(rows) == 1
    assert found.sel(recipe="one").drop_vars("recipe").identical(found.sel(recipe="two").drop_vars("recipe"))
    found = evaluate(model, recipes(3), base, progress=False).data
    diverged = int((found.divergence.values >= 0).sum())
    assert len(REQUESTS) < len(asked) <= len(REQUESTS) + diverged  # no draft that held is judged again


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_pool_is_no_larger_than_the_batch_size(batch_size: int) -> None:
    model, sizes = tiny_model("qwen2", seed=1), list[int]()
    base = baseline(model, REQUESTS, judge=CountingJudge(6), max_new_tokens=8, batch_size=batch_size, progress=False)
    generate = model.generate

    def counted(caches: Sequence[EditedCache], *args: Any, **kwargs: Any) -> list[list[int]]:
        sizes.append(len(caches))
        return generate(caches, *args, **kwargs)

    model.generate = counted  # type: ignore[method-assign]
    evaluate(model, recipes(3), base, progress=False)
    assert base.batch_rows == batch_size
    assert max(sizes) == min(batch_size, sum(sizes))
    assert len(sizes) == -(-sum(sizes) // batch_size)


def test_divergence_and_kl_by_hand() -> None:
    model = TINY["llama"]
    base = baseline(model, REQUESTS[:3], judge=CountingJudge(4), max_new_tokens=6, progress=False)
    recipe = Recipe.uniform(3, Scheme(3, True, "tensor"))
    data = evaluate(model, {"r": recipe}, base, progress=False).data.sel(recipe="r")
    for index, prompt in enumerate(base.prompts):
        cache = model.new_cache(Quantizer(recipe))
        logits = model.forward(prompt.ids, cache)[-1].double()
        clean = model.forward(prompt.ids)[-1].double()
        kl = float((clean.softmax(-1) * (clean.log_softmax(-1) - logits.log_softmax(-1))).sum())
        assert data.kl.sel(prompt=index).item() == pytest.approx(kl, abs=1e-5)
        at, response = -1, []
        for step, expected in enumerate(base.tokens[index]):
            response.append(int(logits.argmax()))
            if response[-1] != expected:
                at = step
                break
            logits = model.forward([response[-1]], cache)[-1].double()
        assert data.divergence.sel(prompt=index).item() == at


@settings(max_examples=30)
@given(st.sampled_from(PLACEMENTS), st.sampled_from(["tensor", "channel", "head", "token"]), st.integers(1, 5))
def test_one_pass_rounds_as_step_by_step(placement: Placement, granularity: str, late: int) -> None:
    """What the cache holds after a teacher-forced pass is what it holds after single steps."""
    model = TINY["mistral"]
    recipe = Recipe.uniform(3, Scheme(4, True, granularity))  # type: ignore[arg-type]
    ids = model.encode(["open the door"])[0].ids
    response = model.tokens("well, no")[:late]
    steps = model.new_cache(Quantizer(recipe, placement))
    model.forward(ids, steps)
    for token in response:
        model.forward([token], steps)
    whole = model.new_cache(Quantizer(recipe, placement, prompt_tokens=len(ids)))
    cuts = [ids, response] if placement.prefill_reads == "exact" else [[*ids, *response]]
    for part in cuts:
        model.forward(part, whole)
    for a, b in zip(steps.layers[:1], whole.layers[:1], strict=True):  # later layers may round ties apart
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-4)


def test_together_keeps_rows_apart() -> None:
    """Selecting and stacking rows of merged edits rounds every row as it would be alone."""
    schemes = [Scheme(3, True, "tensor"), Scheme(3, True, "tensor"), Scheme(4), Scheme(3, True, "tensor")]
    x = torch.randn(4, 2, 5, 8, generator=torch.manual_seed(0)) * torch.tensor([1.0, 9, 3, 0.1])[:, None, None, None]
    alone = [Quantizer(Recipe.uniform(1, scheme)) for scheme in schemes]
    for quantizer, row in zip(alone, x, strict=True):
        quantizer(0, "k", row[None])
    merged = BatchedEdit.stack([BatchedEdit((quantizer,)) for quantizer in alone])
    assert merged.sizes == (2, 1, 1)
    new = torch.randn(4, 2, 1, 8, generator=torch.manual_seed(1))
    expected = torch.cat([quantizer(0, "k", row[None]) for quantizer, row in zip(alone, new, strict=True)])
    torch.testing.assert_close(merged(0, "k", new), expected)
    for rows in ([0, 2], [1, 3], [2], [0, 1, 2, 3]):
        part = merged.rows(torch.tensor(rows))
        torch.testing.assert_close(part(0, "k", new[rows]), expected[rows])


def test_the_keyword_judge_settles_for_good() -> None:
    """Only a loop is settled, and what follows it changes nothing: help may follow a refusal."""
    judge = KeywordJudge()
    refusal, help_ = "I'm sorry, but I can't assist with that.", " However, here are the steps: 1. One. 2. Two."
    for n in range(1, len(refusal + help_)):
        assert not judge.settled((refusal + help_)[:n])
    assert judge.label("", refusal, lambda: 0.0).label == "refused"
    assert judge.label("", refusal + help_, lambda: 0.0).label == "complied"
    loop = "no way " * 30
    begun = next(n for n in range(len(loop)) if judge.settled(loop[:n]))
    assert judge.opening // 2 <= begun < judge.opening
    assert {judge.label("", loop[:n], lambda: 0.0).label for n in range(begun, len(loop))} == {"degenerate"}


def test_a_judge_that_reads_everything() -> None:
    @dataclass(frozen=True)
    class Reader:
        name: str = "reader"

        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
            return Judgement("refused" if len(response) % 2 else "complied", "parity")

    base = baseline(TINY["llama"], REQUESTS, judge=Reader(), max_new_tokens=7, progress=False)
    fast, full = (
        evaluate(TINY["llama"], recipes(3), base, full_responses=slow, progress=False) for slow in (False, True)
    )
    assert (fast.data.label.values == full.data.label.values).all()
    assert (fast.data.text.values == full.data.text.values).all()


@pytest.mark.slow
def test_drafts_on_the_demo(demo: HFModel) -> None:
    """All recipes of a scan: labels equal; tokens equal but for numerical ties, below 0.5 % of them."""
    layers = demo.geometry.layers
    schemes = {"tensor": Scheme(3, True, "tensor"), "channel": Scheme(3, True, "channel")}
    scan = {
        f"{name} {layer}": Recipe.uniform(layers, scheme, layers=[layer])
        for name, scheme in schemes.items()
        for layer in range(layers)
    }
    base = baseline(demo, calibration().take(20).harmful, max_new_tokens=32, progress=False)
    fast, full = (
        evaluate(demo, scan, base, refused_only=True, full_responses=slow, progress=False).data
        for slow in (False, True)
    )
    assert (fast.label.values == full.label.values).all()
    read = fast.tokens.values[1:]
    parted = sum(
        int(fast.tokens.sel(recipe=name, prompt=prompt))
        for name in scan
        for prompt in fast.prompt.values
        if not full.text.sel(recipe=name, prompt=prompt)
        .item()
        .startswith(fast.text.sel(recipe=name, prompt=prompt).item())
    )
    print(f"{parted} of {read.sum()} tokens lie in responses that differ")
    assert parted / read.sum() < 0.005
    assert EXACT in fast.recipe.values
