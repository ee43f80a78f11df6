"""Outcomes, curve and scan: independence of batch and neighbours, and every count recomputed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.behaviour.curve import bit_width_curve, curve_of
from kvgeom.behaviour.over_refusal import over_refusal
from kvgeom.behaviour.scan import single_layer_scan
from kvgeom.behaviour.widths import at_widths
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.condition import EXACT, Condition
from kvgeom.evaluation.evaluate import evaluate, run_conditions
from kvgeom.evaluation.fidelity import passages
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.evaluation.scores import NONE_PREDICTS
from kvgeom.judges.judge import LABELS, Judgement
from kvgeom.models.hf import HFModel
from kvgeom.prompts.sets import calibration, perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mcnemar
from tests.builders.judges import ArbitraryJudge, with_refusal_tokens
from tests.builders.reading import read
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)
RECIPES = {
    "tensor": Recipe.uniform(3, Scheme(3, True, "tensor")),
    "channel": Recipe.uniform(3, Scheme(3, True, "channel")),
    "token": Recipe.uniform(3, Scheme(4)),
}


def run(requests: Sequence[str], placement: Placement | None = None, **options: int) -> Outcomes:
    base = baseline(TINY, requests, judge=ArbitraryJudge(), max_new_tokens=6, progress=False, **options)
    return evaluate(TINY, RECIPES, base, placement=placement, progress=False)


@settings(max_examples=5)
@given(
    st.permutations(range(len(REQUESTS))),
    st.integers(1, len(REQUESTS)),
    st.integers(1, 9),
    st.sampled_from([Placement.cache(), Placement.paper()]),
)
def test_batch_and_neighbours_change_nothing(
    order: list[int], count: int, batch_size: int, placement: Placement
) -> None:
    chosen = order[:count]
    full, part = run(REQUESTS, placement), run([REQUESTS[i] for i in chosen], placement, batch_size=batch_size)
    assert (full.data.label.values[:, chosen] == part.data.label.values).all()
    assert (full.data.text.values[:, chosen] == part.data.text.values).all()
    assert (full.data.divergence.values[:, chosen] == part.data.divergence.values).all()
    ours, theirs = _odds(full, chosen), _odds(part, range(count))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def _odds(outcomes: Outcomes, rows: Sequence[int]) -> np.ndarray:
    """Margins by hand for one fixed token set: which tokens begin refusals depends on the prompts."""
    margins = []
    for name in outcomes.data.recipe.values:
        for row in rows:
            prompt = TINY.encode([str(outcomes.data.request.values[row])])[0]
            edit = Quantizer(RECIPES[name]) if name != EXACT else None
            p = TINY.forward(prompt.ids, TINY.new_cache(edit))[-1].double().softmax(-1)[:50].sum()
            margins.append(float(p.log() - (1 - p).log()))
    return np.array(margins)


def test_batch_size_on_the_demo(demo: HFModel) -> None:
    requests = calibration().harmful[:4]
    recipes = {"4-bit": Recipe.uniform(24, Scheme(4)), "3-bit": Recipe.uniform(24, Scheme(3, True, "tensor"))}
    seen = [
        evaluate(
            demo, recipes, baseline(demo, asked, max_new_tokens=6, batch_size=size, progress=False), progress=False
        )
        for asked, size in ((requests, 4), (requests[::-1], 2))
    ]
    assert (seen[0].data.label.values == seen[1].data.label.values[:, ::-1]).all()
    np.testing.assert_allclose(seen[0].data.margin.values, seen[1].data.margin.values[:, ::-1], atol=1e-4)


@pytest.fixture(scope="module")
def base() -> Baseline:
    return with_refusal_tokens(baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=6, progress=False))


def test_there_is_something_to_test(base: Baseline) -> None:
    assert 1 <= len(base.refused) < len(REQUESTS)


def test_margins_are_log_odds_of_refusal_tokens(base: Baseline) -> None:
    outcomes = evaluate(TINY, RECIPES, base, progress=False)
    tokens = sorted(base.refusal_tokens)
    for name, recipe in RECIPES.items():
        for index, prompt in enumerate(base.prompts):
            p = TINY.forward(prompt.ids, TINY.new_cache(Quantizer(recipe)))[-1].double().softmax(-1)[tokens].sum()
            found = outcomes.data.margin.sel(recipe=name, prompt=index).item()
            assert found == pytest.approx(float(torch.logit(p)), abs=1e-4)


def test_likelihood_is_teacher_forced(base: Baseline) -> None:
    for index, prompt in enumerate(base.prompts):
        response = base.tokens[(index + 1) % len(REQUESTS)]
        logits = TINY.forward([*prompt.ids, *response], all_logits=True).double().log_softmax(-1)
        each = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
        assert base.log_likelihood(index, response) == pytest.approx(np.mean(each), abs=1e-4)


def test_counts(base: Baseline) -> None:
    outcomes = evaluate(TINY, RECIPES, base, progress=False)
    part = evaluate(TINY, RECIPES, base, refused_only=True, progress=False)
    frame = outcomes.to_frame()
    exact = frame[frame.recipe == EXACT].set_index("prompt").label
    for name in RECIPES:
        now = frame[frame.recipe == name].set_index("prompt").label
        flips = [i for i in exact.index if exact[i] == "refused" and now[i] != "refused"]
        assert outcomes.flips(name)["all"] == part.flips(name)["all"] == len(flips)
        assert outcomes.flips(name)["degenerate"] == sum(now[i] == "degenerate" for i in flips)
        assert outcomes.flipped(name).sum() == len(flips)
        table = outcomes.flip_table().sel(recipe=name)
        np.testing.assert_array_equal(table.prompt[table.values > 0], [int(n) for n in flips])
        assert sum(outcomes.counts(name).values()) == len(REQUESTS)


def test_curve(base: Baseline) -> None:
    curve, outcomes = bit_width_curve(base, at_widths(bits=[2, 8, 4, 16]))
    assert curve.data.bits.values.tolist() == [16, 8, 4, 2]
    for bits in (8, 4, 2):
        row = curve.data.sel(bits=bits)
        assert int(row.flips) == outcomes.flips(f"{bits}-bit")["all"]
        assert row.ci_low <= row.flip_rate <= row.ci_high
        recipe = Recipe.uniform(3, Scheme(bits))
        text = passages(TINY, perplexity_text())
        ratio = read(TINY, text, recipe).ratio(read(TINY, text))
        found = (float(row[name]) for name in ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high"))
        assert tuple(found) == pytest.approx((ratio.value, ratio.low, ratio.high))
        assert ratio.low < ratio.value < ratio.high
    assert float(curve.data.perplexity_ratio.sel(bits=16)) == 1.0
    assert curve.text.exact == curve.meta["baseline_perplexity"] == read(TINY, text).perplexity
    assert curve_of(outcomes, curve.text, curve.meta).data.identical(curve.data)
    said = curve.to_text()
    assert f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]" in said
    assert "the first 2,048 of" in said, "where the text was cut"
    assert int(curve.data.flips.sel(bits=16)) == 0


def test_a_curve_of_the_refused_claims_no_more(base: Baseline) -> None:
    """Flips are those of the curve of all prompts; what was not run is not counted, and not called zero."""
    n = len(base.refused)
    whole, part = (bit_width_curve(base, at_widths(bits=[8, 2]), refused_only=only)[0] for only in (False, True))
    for name in ("flips", "flips_complied", "flips_degenerate", "flip_rate", "ci_low", "ci_high"):
        np.testing.assert_array_equal(part.data[name], whole.data[name])
    assert (whole.counted, part.counted) == (len(REQUESTS), n)
    assert part.meta == {**whole.meta, "counted": n}
    assert np.isfinite(whole.data.gains).all()
    assert np.isnan(part.data.gains).all()
    np.testing.assert_array_equal(part.data.refused, n - part.data.flips)
    np.testing.assert_array_equal(whole.data.refused, n - whole.data.flips + whole.data.gains)
    bars = [trace for trace in part.plot().data if trace.name in LABELS]
    np.testing.assert_allclose(sum(np.array(bar.y) for bar in bars), 1)
    titles = [note.text for figure in (whole.plot(), part.plot()) for note in figure.layout.annotations[:1]]
    assert f"{n} harmful requests get that are refused with an exact cache, of {len(REQUESTS)}" in titles[1]
    assert "refused" not in titles[0]
    rows = [re.split(r" {2,}", line.strip()) for line in part.to_text().splitlines()]
    assert {row[0]: row[-4] for row in rows if row and row[0].isdigit()} == dict.fromkeys(("16", "8", "2"), "-")


def test_over_refusal(base: Baseline) -> None:
    found = over_refusal(base, at_widths(bits=[8, 2]))
    labels = evaluate(TINY, {"2": Recipe.uniform(3, Scheme(2))}, base, progress=False).data.label
    assert found.data.refused.values.tolist()[0] == len(base.refused)
    assert int(found.data.refused.sel(bits=2)) == int((labels.sel(recipe="2") == "refused").sum())
    assert int(found.data.degenerate.sel(bits=2)) == int((labels.sel(recipe="2") == "degenerate").sum())
    both = [(labels.sel(recipe=name) == "refused").values for name in ("2", EXACT)]
    assert float(found.data.p.sel(bits=2)) == pytest.approx(mcnemar(*both))
    assert float(found.data.p.sel(bits=16)) == 1.0
    figure = found.plot()
    np.testing.assert_allclose(figure.data[0].y, found.data.rate)


def test_scan(base: Baseline) -> None:
    scan, outcomes = single_layer_scan(base)
    for layer in range(3):
        recipe = {"alone": Recipe.uniform(3, Scheme(3, True, "tensor"), layers=[layer])}
        alone = evaluate(TINY, recipe, base, refused_only=True, progress=False)
        drop = (alone.data.margin.sel(recipe=EXACT) - alone.data.margin.sel(recipe="alone")).mean()
        assert float(scan.data.margin_drop.sel(layer=layer)) == pytest.approx(float(drop), abs=1e-4)
        assert int(scan.data.flips.sel(layer=layer)) == alone.flips("alone")["all"]
        assert int(scan.data.flips_degenerate.sel(layer=layer)) == alone.flips("alone")["degenerate"]
        fine = {"alone": Recipe.uniform(3, Scheme(3, True, "channel"), layers=[layer])}
        alone = evaluate(TINY, fine, base, refused_only=True, progress=False)
        assert int(scan.data.flips_channel.sel(layer=layer)) == alone.flips("alone")["all"]
    complied = scan.data.flips_complied
    most = complied.max()
    assert scan.worst_layer is None if most == 0 else complied.sel(layer=scan.worst_layer) == most
    assert outcomes.data.sizes["prompt"] == len(base.refused)


def test_nothing_refused() -> None:
    @dataclass(frozen=True)
    class Yes:
        name: str = "yes"

        def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
            return Judgement("complied", "always")

    base = baseline(TINY, REQUESTS, judge=Yes(), max_new_tokens=2, progress=False)
    curve, _ = bit_width_curve(base, at_widths(bits=[4]))
    scan, _ = single_layer_scan(base)
    assert np.isnan(curve.data.flip_rate).all()
    assert scan.worst_layer is None
    assert "refuses none" in scan.meta["reason"]
    assert np.isnan(scan.data.margin_drop).all()


def test_bad_input(base: Baseline) -> None:
    with pytest.raises(InputError, match="at least one"):
        baseline(TINY, [])
    with pytest.raises(InputError, match="another name"):
        evaluate(TINY, {EXACT: Recipe.exact(3)}, base)
    with pytest.raises(InputError, match="give the recipe another name"):  # a recipe that rounds nothing has that name
        evaluate(TINY, [Recipe.exact(3)], base)
    with pytest.raises(InputError, match="give the recipe another name"):
        run_conditions(base, {EXACT: Condition(Recipe.uniform(3, Scheme(2)))})
    with pytest.raises(InputError, match="has 4 layers"):
        evaluate(TINY, {"r": Recipe.exact(4)}, base)
    with pytest.raises(InputError, match="lower max_new_tokens"):
        baseline(TINY, ["x" * 400], max_new_tokens=100)


def test_outcomes_are_saved_and_read_again(base: Baseline, tmp_path) -> None:  # type: ignore[no-untyped-def]
    outcomes = evaluate(TINY, RECIPES, base, progress=False)
    again = Outcomes.load(outcomes.save(tmp_path / "outcomes.nc"))
    assert again.meta == outcomes.meta
    assert again.data.identical(outcomes.data)
    assert (again.to_frame().text == outcomes.to_frame().text).all()
    with pytest.raises(InputError, match="it holds outcomes"):
        type(bit_width_curve(base, at_widths(bits=[4]))[0]).load(tmp_path / "outcomes.nc")
    with pytest.raises(InputError, match="no such file"):
        Outcomes.load(tmp_path / "nothing.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(InputError, match="not a kvgeom result"):
        Outcomes.load(tmp_path / "text.nc")
    with pytest.raises(InputError, match="cannot be written"):
        outcomes.save(tmp_path / "missing" / "outcomes.nc")


def test_no_token_predicts_a_refusal() -> None:
    """Then there are no margins, and the model, tables and the caveat of a curve say why."""
    with pytest.warns(KvgeomWarning, match="no first token predicts a refusal"):
        found = baseline(TINY, REQUESTS[:3], judge=Refusing(), max_new_tokens=3, progress=False)
    assert len(found.refused) == 3
    assert not found.refusal_tokens
    outcomes = evaluate(None, RECIPES, found, progress=False)
    assert np.isnan(outcomes.data.margin.values).all()
    assert outcomes.meta["no_margin"] == NONE_PREDICTS
    assert "no margins" in outcomes.summary()
    curve, _ = bit_width_curve(found, at_widths(None, (4, 2), None))
    scan, _ = single_layer_scan(found, "int3-sym-tensor")
    for text in (curve.to_text(), curve.caveat, scan.to_text()):
        assert NONE_PREDICTS in text


class Refusing:
    """Hears a refusal in everything."""

    name = "refusing"

    def label(self, request: str, response: str, likelihood: object) -> Judgement:
        return Judgement("refused", "always")
