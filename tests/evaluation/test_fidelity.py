"""Perplexity of plain text: what is read, what counts, and how sure a ratio is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal, special, stats

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.fidelity import (
    BLOCK,
    PASSAGE,
    SAME,
    STEPS,
    TOKENS,
    Passages,
    Reading,
    fidelity_columns,
    fidelity_rows,
    passages,
)
from kvgeom.prompts.sets import perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mean_of_blocks
from tests.builders.judges import ArbitraryJudge
from tests.builders.reading import read
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model(seed=1)
TEXT = passages(TINY, perplexity_text())
ROUGH = Recipe.uniform(3, Scheme(2))


def reading(nats: Sequence[float], tokens: Sequence[int], passages: Sequence[int]) -> Reading:
    """A reading of which only perplexity is looked at."""
    return Reading(tuple(nats), (0.0,) * len(nats), tuple(tokens), tuple(tokens), tuple(passages))


def logits_of(ids: Sequence[int], recipe: Recipe | None, placement: Placement, first: int) -> np.ndarray:
    """Logits [tokens from ``first`` on, vocabulary], each token fed by itself."""
    cache = TINY.new_cache(Quantizer(recipe, placement) if recipe else None)
    found = [TINY.forward(ids[:first], cache)]
    found += [TINY.forward([token], cache) for token in ids[first:-1]]
    return torch.cat([logits[-1:] for logits in found]).double().numpy()


def losses_of(ids: Sequence[int], recipe: Recipe | None, placement: Placement, first: int) -> list[float]:
    """Negative log-likelihood of the tokens from ``first`` on."""
    found = special.log_softmax(logits_of(ids, recipe, placement, first), -1)
    return [-float(row[token]) for row, token in zip(found, ids[first:], strict=True)]


@pytest.mark.parametrize("length", [2, 3, 100, PASSAGE, PASSAGE + 1, TOKENS, TOKENS + 1, 5000])
def test_a_text_is_cut_into_passages_of_one_length(length: int) -> None:
    text = (perplexity_text() * 2)[:length]
    tokens = TINY.tokens(text)
    found = passages(TINY, text)
    assert [token for part in found.ids for token in part] == tokens[:TOKENS]
    sizes = [len(part) for part in found.ids]
    assert max(sizes) <= PASSAGE
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-min(length, TOKENS) // PASSAGE)
    assert found.total == len(tokens) == length
    said = f"the first {TOKENS:,} of {length:,} tokens" if length > TOKENS else f"{length:,} tokens"
    windows = [len(window.ids) for window in found.windows(True)]
    assert sum(windows) == sum(sizes)
    assert max(windows) <= TINY.max_context
    assert str(found).startswith(f"{said} of plain text, in {len(windows)} window")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 30))
def test_a_window_holds_as_many_whole_passages_as_it_can(lengths: list[int], most: int) -> None:
    text = Passages(tuple((number,) * length for number, length in enumerate(lengths)), sum(lengths), most)
    windows = text.windows(True)
    assert [part for window in windows for part in window.passages] == list(text.ids)
    assert [window.first for window in windows] == list(np.cumsum([0, *(len(each.passages) for each in windows)])[:-1])
    for window, after in pairwise(windows):
        assert len(window.passages) == 1 or len(window.ids) <= most
        assert len(window.ids) + len(after.passages[0]) > most
    assert [window.passages for window in text.windows(False)] == [(ids,) for ids in text.ids]


def test_a_text_of_one_token_has_no_perplexity() -> None:
    with pytest.raises(InputError, match="at least two tokens, got 1"):
        passages(TINY, "x")


def test_the_shipped_text_is_of_several_subjects_and_long_enough() -> None:
    assert len(perplexity_text().strip().split("\n\n")) >= 10
    assert 2000 < len(perplexity_text().split()) < 2500


@pytest.mark.parametrize("recipe", [ROUGH, pytest.param(None, marks=pytest.mark.slow)])
def test_a_reading_sums_the_losses_of_plain_passes(recipe: Recipe | None) -> None:
    found = read(TINY, TEXT, recipe)
    losses = [np.array(losses_of(ids, recipe, Placement(), 1)) for ids in TEXT.ids]
    assert sum(found.tokens) == sum(map(len, losses))
    assert max(found.tokens) <= 1.5 * BLOCK
    np.testing.assert_allclose(sum(found.nats), sum(part.sum() for part in losses), rtol=1e-4)
    assert found.perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-4)
    starts = np.cumsum([0, *found.tokens[:-1]])
    np.testing.assert_allclose(found.nats, np.add.reduceat(np.concatenate(losses), starts), rtol=1e-3)
    for ends in np.cumsum(list(map(len, losses))):
        assert ends in np.cumsum(found.tokens), "no block spans two passages"


@pytest.mark.parametrize("placement", [Placement(), Placement(residual=16)])
def test_divergence_and_agreement_are_those_of_distributions(placement: Placement) -> None:
    """Against scipy's, from logits of tokens that are fed one by one; two passages in a window, and one by itself."""
    text = Passages(tuple(ids[:60] for ids in TEXT.ids[:3]), 180, 130)
    windows = [part.ids for part in text.windows(placement.one_pass)]
    assert list(map(len, windows)) == ([120, 60] if placement.one_pass else [60, 60, 60])
    found = read(TINY, text, ROUGH, placement)
    kl, agreed = [], []
    for ids in windows:
        first = 1 if placement.one_pass else len(ids) - STEPS
        ours, theirs = (logits_of(ids, recipe, placement, first) for recipe in (ROUGH, None))
        kl.append(stats.entropy(special.softmax(theirs, -1), special.softmax(ours, -1), axis=-1))
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
    assert sum(found.tokens) == sum(map(len, kl))
    np.testing.assert_allclose(sum(found.kl), np.concatenate(kl).sum(), rtol=1e-3)
    assert sum(found.agreed) == np.concatenate(agreed).sum()
    against = found.against(read(TINY, text, None, placement))
    assert against.kl.value == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert against.top1.value == pytest.approx(np.concatenate(agreed).mean())
    assert 0 <= against.top1.low < against.top1.value < against.top1.high <= 1
    assert against.kl.low < against.kl.value < against.kl.high
    assert fidelity_rows(xr.Dataset({n: ("r", v) for n, v in fidelity_columns([against, SAME]).items()})) == [
        against,
        SAME,
    ]


def test_the_exact_cache_is_itself() -> None:
    assert read(TINY, TEXT).against(read(TINY, TEXT)) == SAME


def test_what_is_no_number_agrees_with_nothing() -> None:
    nan = float("nan")
    broken = Reading((nan, nan), (nan, nan), (10, 10), (10, 10), (0, 1))
    found = broken.against(reading((1.0, 1.0), (10, 10), (0, 1)))
    assert np.isnan(list(chain(*astuple(found)))).all()


@pytest.mark.parametrize(
    "placement", [Placement(prefill_reads="exact"), Placement(residual=16), Placement(residual=8, sinks=2)]
)
def test_where_one_pass_rounds_nothing_the_last_tokens_come_one_by_one(placement: Placement) -> None:
    readings = read(TINY, TEXT, ROUGH, placement), read(TINY, TEXT, None, placement)
    for found, recipe in zip(readings, (ROUGH, None), strict=True):
        losses = [losses_of(ids, recipe, placement, len(ids) - STEPS) for ids in TEXT.ids]
        assert sum(found.tokens) == STEPS * len(TEXT.ids)
        assert len(found.tokens) == 2 * len(TEXT.ids)
        np.testing.assert_allclose(found.nats, np.reshape(losses, (len(found.tokens), -1)).sum(1), rtol=1e-3)
    rounded, exact = readings
    assert abs(rounded.ratio(exact).value - 1) > 1e-3


def test_a_ratio_is_of_the_same_tokens() -> None:
    """Paired: equal blocks give the interval of Student's t for their mean differences."""
    rng = np.random.default_rng(0)
    exact, more = rng.normal(200, 60, 20), rng.normal(4, 3, 20)
    sizes, each = (64,) * 20, tuple(range(20))
    ratio = reading(tuple(exact + more), sizes, each).ratio(reading(tuple(exact), sizes, each))
    expected = stats.ttest_1samp(more / 64, 0).confidence_interval(0.95)
    assert (ratio.low, ratio.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert ratio.value == pytest.approx(np.exp(more.mean() / 64))
    unpaired = stats.ttest_ind((exact + more) / 64, exact / 64).confidence_interval(0.95)
    assert np.log(ratio.high / ratio.low) < 0.2 * (unpaired.high - unpaired.low)


def test_what_is_known_and_what_is_not() -> None:
    exact = read(TINY, TEXT)
    same = exact.ratio(exact)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    short = passages(TINY, "no")
    ratio = read(TINY, short, ROUGH).ratio(read(TINY, short))
    assert np.isfinite(ratio.value)
    assert np.isnan([ratio.low, ratio.high]).all(), "one block says nothing of its own error"
    broken = reading((9e4, 8e4), (10, 10), (0, 1)).ratio(reading((1.0, 1.0), (10, 10), (0, 1)))
    assert np.isfinite([broken.value, broken.high]).all()


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 70)), min_size=2, max_size=12))
def test_mean_of_blocks_is_the_jackknife_s_to_first_order(blocks: list[tuple[float, int]]) -> None:
    """The same standard error as by leaving out one block after the other, where blocks are equally long."""
    sums = np.array([value for value, _ in blocks])
    found = mean_of_blocks(sums, [64] * len(sums))
    left = np.array([(sums.sum() - each) / (64 * (len(sums) - 1)) for each in sums])
    jackknife = np.sqrt((len(sums) - 1) / len(sums) * ((left - left.mean()) ** 2).sum())
    reach = stats.t.ppf(0.975, len(sums) - 1) * jackknife
    assert found.value == pytest.approx(sums.mean() / 64)
    assert found.high - found.low == pytest.approx(2 * reach, abs=1e-9)
    sizes = [count for _, count in blocks]
    unequal = mean_of_blocks(sums, sizes)
    assert unequal.value == pytest.approx(sums.sum() / sum(sizes))
    assert unequal.low <= unequal.value <= unequal.high


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Most tokens hardly change, a few cost much more."""
    return rng.exponential(size=shape) ** 2 - 2


@pytest.mark.parametrize("drawn", [_normal, _skewed])
@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_intervals_cover_the_truth_though_neighbours_err_alike(drawn: Callable[..., np.ndarray], memory: float) -> None:
    """Autoregressive differences in four passages: blocks cover as they should, and tokens taken by themselves do not.

    The standard error is compared with the exact one of such a process.
    """
    rng, samples, mean = np.random.default_rng(3), 2000, 0.05
    length = PASSAGE - 1
    noise = drawn(rng, (samples, 4, length + 100))
    series = np.zeros((samples, 4, length + 100))
    for at in range(1, length + 100):
        series[..., at] = memory * series[..., at - 1] + noise[..., at]
    series = series[..., 100:] + mean
    blocks = [
        part for passage in range(4) for part in np.array_split(series[:, passage], round(length / BLOCK), axis=-1)
    ]
    sizes = [part.shape[-1] for part in blocks]
    found = [mean_of_blocks(sums, sizes) for sums in np.stack([part.sum(-1) for part in blocks], axis=1)]
    covered = np.mean([each.low <= mean <= each.high for each in found])
    assert 0.925 <= covered <= 0.975
    flat = series.reshape(samples, -1)
    naive = np.abs(flat.mean(1) - mean) <= 1.96 * flat.std(1, ddof=1) / np.sqrt(flat.shape[1])
    assert (naive.mean() < 0.8) == (memory > 0)
    lags = np.arange(1, length)
    spread = (1 + 2 * ((1 - lags / length) * memory**lags).sum()) / (1 - memory**2) * noise.var() / (4 * length)
    widths = np.array([each.high - each.low for each in found])
    assert np.sqrt((widths**2).mean()) == pytest.approx(
        2 * stats.t.ppf(0.975, len(sizes) - 1) * np.sqrt(spread), rel=0.06
    )


@pytest.mark.parametrize(
    ("memory", "subject"), [(0.0, 0.0), (0.9, 0.0), (0.97, 0.0), (0.0, 0.1), (0.0, 0.2), (0.0, 0.5), (0.9, 0.5)]
)
def test_intervals_cover_text_like_this(memory: float, subject: float) -> None:
    """Where tokens err alike beyond a block, or passages differ by their subjects (in standard deviations of a token)."""
    rng, samples, length, mean = np.random.default_rng(5), 1200, PASSAGE - 1, 0.05
    noise = rng.standard_normal((samples, 4, length)) * np.sqrt(1 - memory**2)
    noise[..., 0] = rng.standard_normal((samples, 4))
    series = signal.lfilter([1], [1, -memory], noise, axis=-1) + subject * rng.standard_normal((samples, 4, 1)) + mean
    parts = [np.array_split(series[:, passage], round(length / BLOCK), axis=-1) for passage in range(4)]
    blocks = [(number, block) for number, split in enumerate(parts) for block in split]
    numbers, sizes = tuple(number for number, _ in blocks), tuple(block.shape[-1] for _, block in blocks)
    exact = reading((0.0,) * len(blocks), sizes, numbers)
    drawn = np.stack([block.sum(-1) for _, block in blocks], axis=1)
    ratios = [reading(tuple(sums), sizes, numbers).ratio(exact) for sums in drawn]
    assert np.mean([ratio.low <= np.exp(mean) <= ratio.high for ratio in ratios]) >= 0.93
    alone = [mean_of_blocks(sums, sizes) for sums in drawn]
    assert (np.mean([each.low <= mean <= each.high for each in alone]) < 0.9) == (memory > 0.9 or subject > 0)


def test_the_interval_of_passages_is_student_s() -> None:
    """Where blocks of a passage err alike, and passages do not: four means, three degrees of freedom."""
    means = np.repeat([1.0, 3.0, 2.0, 6.0], 6)
    found = mean_of_blocks(64 * means, [64] * 24, np.repeat(range(4), 6))
    expected = stats.ttest_1samp(means[::6], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("placements", "said"),
    [
        ([Placement()], "in 6 windows of 341 to 342"),
        (
            [Placement(residual=128, prefill_reads="exact")],
            f"in 6 passages, {6 * STEPS} tokens of which are scored under rounding",
        ),
        (
            [Placement(), Placement(residual=16)],
            f"in 6 windows of 341 to 342; under caches that round later in 6 passages, {6 * STEPS} tokens of which are scored",
        ),
        ([Placement(residual=512)], "in 6 passages, 0 tokens of which are scored under rounding"),
    ],
)
def test_what_was_read_says_how_much_was_scored_under_rounding(placements: list[Placement], said: str) -> None:
    assert TEXT.described(placements) == f"the first 2,048 of {TEXT.total:,} tokens of plain text, {said}"
    scored = TEXT.scored(placements[0])
    found = read(TINY, TEXT, ROUGH, placement=placements[0])
    assert scored in (sum(found.tokens), 0)
    assert (found.nats == pytest.approx(read(TINY, TEXT, placement=placements[0]).nats, rel=1e-5)) == (scored == 0)


def test_one_passage_says_nothing_of_other_text() -> None:
    assert "about this passage alone" in str(passages(TINY, "A short text."))
    assert "alone" not in str(TEXT)


def test_the_journal_keeps_sums_and_the_exact_cache_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    options = {"judge": ArbitraryJudge(), "max_new_tokens": 2, "progress": False, "journal": path}
    base = baseline(TINY, REQUESTS[:1], **options)
    recipes = [Recipe.uniform(3, Scheme(bits)) for bits in (8, 4)]
    found = [base.perplexity_ratio(recipe, where) for recipe in recipes for where in (None, Placement.paper())]
    waits = Placement(residual=16)
    found.append(base.perplexity_ratio(recipes[0], waits))
    base.journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    readings = [line for line in lines if line["key"]["measure"] == "reading"]
    windows = len(TEXT.ids)  # the tiny model's context holds no two passages
    assert sorted(line["key"]["recipe"] is None for line in readings) == [False] * 5 * windows + [True] * 2 * windows
    for line in readings:
        assert len(line["value"]["nats"]) == len(line["value"]["tokens"]) < 40
        assert len(json.dumps(line)) < 3000, "neither the text nor its tokens are written down"
    again = baseline(TINY, REQUESTS[:1], **options)
    before = path.read_bytes()
    assert found == [
        *(again.perplexity_ratio(recipe, where) for recipe in recipes for where in (None, Placement.paper())),
        again.perplexity_ratio(recipes[0], waits),
    ]
    assert path.read_bytes() == before
    ratio = read(TINY, TEXT, recipes[0]).ratio(read(TINY, TEXT))
    assert found[0] == ratio
    again.journal.close()
