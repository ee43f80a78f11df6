"""Rounding against plain numpy, and its properties."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvgeom.errors import InputError
from kvgeom.quant.fake_quantize import apply, encode, fake_quantize, fit
from kvgeom.quant.placement import MOST_TOKENS, Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import MOST_CHANNELS, Scheme

SHAPES = st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 6)))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    granularity = draw(st.sampled_from(["tensor", "token", "channel", "group", "head", "token-head", "channel-group"]))
    # As large as it may be, too: larger than all there is.
    largest = {"group": MOST_CHANNELS, "channel-group": MOST_TOKENS}.get(granularity)
    size = None if largest is None else draw(st.integers(1, 9) | st.just(largest))
    return Scheme(draw(st.integers(2, 8)), draw(st.booleans()), granularity, size)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    finite = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4)
    return torch.from_numpy(draw(hnp.arrays(np.float32, draw(SHAPES), elements=finite)))


def reference(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Block by block in float64, written from the definition."""
    batch, heads, tokens, dim = x.shape
    out = np.empty(x.shape)
    channels = heads * dim

    def blocks() -> list[list[tuple[int, int, int]]]:
        every = [(h, t, d) for h in range(heads) for t in range(tokens) for d in range(dim)]
        key = {
            "tensor": lambda h, t, d: 0,
            "token": lambda h, t, d: t,
            "channel": lambda h, t, d: (h, d),
            "head": lambda h, t, d: h,
            "group": lambda h, t, d: (t, (h * dim + d) // (scheme.group_size or channels)),
            "token-head": lambda h, t, d: (t, h),
            "channel-group": lambda h, t, d: (h, d, t // (scheme.group_size or 1)),
        }[scheme.granularity]
        grouped: dict[object, list[tuple[int, int, int]]] = {}
        for index in every:
            grouped.setdefault(key(*index), []).append(index)
        return list(grouped.values())

    for row in range(batch):
        for block in blocks():
            values = np.array([x[row][index] for index in block], dtype=np.float64)
            if scheme.symmetric:
                top = 2 ** (scheme.bits - 1) - 1
                step = np.abs(values).max() / top
                codes = np.zeros_like(values) if step == 0 else np.clip(np.round(values / step), -top, top)
                rounded = codes * step
            else:
                low, levels = values.min(), 2**scheme.bits - 1
                step = (values.max() - low) / levels
                rounded = low + (np.zeros_like(values) if step == 0 else np.round((values - low) / step) * step)
            for index, value in zip(block, rounded, strict=True):
                out[row][index] = value
    return out


@given(tensors(), schemes())
def test_agrees_with_numpy(x: torch.Tensor, scheme: Scheme) -> None:
    ours, theirs = fake_quantize(x.double(), scheme).numpy(), reference(x.numpy(), scheme)
    # A value exactly between two levels may go to either; nothing else may differ.
    step = np.broadcast_to(_steps(x, scheme), x.shape)
    different = np.abs(ours - theirs) > 1e-6 * (1 + np.abs(theirs))
    tie = np.abs(np.abs(x.numpy() - ours) - step / 2) < 1e-6 * (1 + step)
    assert not (different & ~tie).any()


def _steps(x: torch.Tensor, scheme: Scheme) -> np.ndarray:
    step = fit(x.double(), scheme).step
    if scheme.granularity == "channel-group":
        size = min(scheme.group_size or 1, x.shape[2])
        return step.expand(-1, -1, -1, size, -1).flatten(2, 3)[:, :, : x.shape[2]].numpy()
    if scheme.granularity != "group":
        return step.numpy()
    size = min(scheme.group_size or 1, x.shape[1] * x.shape[3])
    if step.ndim == 5:
        return step.expand(*step.shape[:-1], size).flatten(-2).numpy()
    flat = step.expand(*step.shape[:-1], size).flatten(-2)[..., : x.shape[1] * x.shape[3]]
    return flat.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2).numpy()


@given(tensors(), schemes())
def test_error_is_at_most_half_a_step(x: torch.Tensor, scheme: Scheme) -> None:
    error = (fake_quantize(x, scheme) - x).abs().numpy()
    # float32 arithmetic is as precise as the largest value of the block allows, not as the value itself does.
    arithmetic = 8 * np.finfo(np.float32).eps * np.abs(x.numpy()).max()
    assert (error <= _steps(x, scheme) / 2 + arithmetic).all()


@given(tensors(), schemes())
def test_idempotent(x: torch.Tensor, scheme: Scheme) -> None:
    once = fake_quantize(x, scheme)
    torch.testing.assert_close(apply(once, scheme, fit(x, scheme)), once, rtol=1e-5, atol=1e-4)


@given(tensors(), schemes(), st.sampled_from([0.25, 2.0, 64.0]))
def test_scale_equivariant(x: torch.Tensor, scheme: Scheme, factor: float) -> None:
    torch.testing.assert_close(
        fake_quantize(x * factor, scheme), fake_quantize(x, scheme) * factor, rtol=1e-5, atol=1e-4
    )


@given(tensors(), schemes())
def test_sequences_never_share_a_scale(x: torch.Tensor, scheme: Scheme) -> None:
    together = fake_quantize(x, scheme)
    for row in range(len(x)):
        assert torch.equal(together[row : row + 1], fake_quantize(x[row : row + 1], scheme))


@given(schemes(), st.floats(-100, 100, width=16))
def test_constants_survive(scheme: Scheme, value: float) -> None:
    x = torch.full((1, 2, 3, 4), value)
    torch.testing.assert_close(fake_quantize(x, scheme), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    assert fake_quantize(torch.randn(1, 2, 3, 4, dtype=dtype), Scheme(4)).dtype == dtype


@given(schemes())
def test_spelling_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme(1),
        lambda: Scheme(9),
        lambda: Scheme(16),
        lambda: Scheme(4, granularity="row"),  # type: ignore[arg-type]
        lambda: Scheme(4, granularity="group"),
        lambda: Scheme(4, group_size=8),
        lambda: Scheme.parse("q4_0-token"),
        lambda: Scheme(4, symmetric="yes"),  # type: ignore[arg-type]
        lambda: Scheme(4, granularity="group", group_size=1.5),  # type: ignore[arg-type]
        lambda: Scheme(4.0),  # type: ignore[arg-type]
        lambda: Scheme(4).only([0.5]),  # type: ignore[list-item]
        lambda: Scheme(4).only(None),  # type: ignore[arg-type]
        lambda: Scheme(4).only([10**12]),
        lambda: Scheme(4, channels=3.5),  # type: ignore[arg-type]
        lambda: Recipe.uniform(4, Scheme(4), sites=None),  # type: ignore[arg-type]
        lambda: Recipe.uniform(0, Scheme(4)),
        lambda: Placement(residual=10**30),
        lambda: Placement(sinks=2**40),
        lambda: Recipe.uniform(4, Scheme(4), layers=[4]),
        lambda: Recipe.uniform(4, Scheme(4), layers=[0.5]),  # type: ignore[list-item]
        lambda: Recipe.uniform(4, Scheme(4), layers=[True, False]),
        lambda: Recipe.uniform(4, Scheme(4), layers=2),  # type: ignore[arg-type]
        lambda: Recipe.uniform(4, Scheme(4), sites=("keys", "values")),  # type: ignore[arg-type]
        lambda: Recipe.uniform(4, Scheme(4), sites=()),
        lambda: Recipe.uniform(4, 4),  # type: ignore[arg-type]
        lambda: Recipe.uniform(2.5, Scheme(4)),  # type: ignore[arg-type]
        lambda: Recipe.uniform(4, Scheme(4)).keep_ends(first=-1),
        lambda: Recipe.uniform(4, Scheme(4)).with_random_directions(-1),
        lambda: Recipe.uniform(4, Scheme(4)).with_random_directions("a"),  # type: ignore[arg-type]
        lambda: Recipe((Scheme(4), Scheme(4))),  # type: ignore[arg-type]
        lambda: Recipe("kv"),  # type: ignore[arg-type]
    ],
)
def test_bad_schemes_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]


def test_recipes() -> None:
    scheme = Scheme(4)
    assert Recipe.exact(3).touched == ()
    assert Recipe.uniform(3, scheme).keep([1]).touched == (0, 2)
    assert Recipe.uniform(3, scheme, sites=["k"]).layers[0] == (scheme, None)
    assert str(Recipe.uniform(3, scheme, layers=[2])) == "int4-asym-token in layers 2"
    assert str(Recipe.uniform(3, scheme, sites=["k"]).keep([1])) == "k int4-asym-token, v exact in layers 0,2"


def test_recipes_however_they_are_written() -> None:
    """Names for schemes, lists for tuples and numpy's integers make the same recipe, which can be written as JSON."""
    recipe = Recipe.uniform(3, Scheme(4), layers=[0, 2]).with_random_directions(7)
    text = "int4-asym-token"
    layers: Any = [[text, Scheme(np.int64(4), np.bool_(False))], [None, None], (text, text)]
    for again in (
        Recipe(layers, random_directions=np.int64(7)),  # type: ignore[arg-type]
        Recipe.uniform(3, text, layers=np.array([0, 2])).with_random_directions(7),
    ):
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert json.dumps(again.record()) == json.dumps(recipe.record())
    grouped = Scheme(4, granularity="group", group_size=np.int64(8), channels=[np.int64(1)])  # type: ignore[arg-type]
    assert grouped == Scheme.parse("int4-asym-group8@1")


def test_recipes_that_differ_have_different_records_and_names() -> None:
    """A journal knows a recipe by its record, a list of recipes by its name."""
    a, b, n = Scheme(4), Scheme(4, True, "tensor"), None
    pairs = [(a, b), (b, a), (a, a), (a, n), (n, a), (n, n)]
    recipes = [Recipe((one, two)) for one in pairs for two in pairs]
    assert len({repr(recipe.record()) for recipe in recipes}) == len(recipes) == len(set(recipes))
    assert len({str(recipe) for recipe in recipes}) == len(recipes)


@given(tensors(), schemes(), st.data())
def test_only_some_channels(x: torch.Tensor, scheme: Scheme, data: st.DataObject) -> None:
    """The chosen channels get the noise they would get anyway, the others none; the spelling reads back."""
    flat = x.shape[1] * x.shape[3]
    some = scheme.only(data.draw(st.sets(st.integers(0, flat - 1), min_size=1)))
    assert Scheme.parse(str(some)) == some
    whole, part = fake_quantize(x, scheme), fake_quantize(x, some)
    for channel in range(flat):
        head, dim = divmod(channel, x.shape[3])
        expected = whole if channel in some.channels else x  # type: ignore[operator]
        assert torch.equal(part[:, head, :, dim], expected[:, head, :, dim])


def test_bad_channels() -> None:
    with pytest.raises(InputError, match="0 to 3, got 4"):
        fake_quantize(torch.zeros(1, 2, 3, 2), Scheme(4).only([4]))
    with pytest.raises(InputError, match="ascending"):
        Scheme(4, channels=(2, 1))
    with pytest.raises(InputError, match="at least one"):
        Scheme(4).only([])
    with pytest.raises(InputError, match="3-,"):
        Scheme.parse("int4-asym-token@3-,")


@given(tensors(), schemes(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_what_is_not_finite_spoils_its_block_alone(
    x: torch.Tensor, scheme: Scheme, bad: float, data: st.DataObject
) -> None:
    """Blocks without it come out as they would otherwise; its own is NaN all over."""
    index = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    marked, spoilt = torch.zeros_like(x), x.clone()
    marked[index], spoilt[index] = 1.0, bad
    block = torch.from_numpy(np.broadcast_to(_steps(marked, replace(scheme, symmetric=True)), x.shape) > 0)
    found = fake_quantize(spoilt, scheme)
    assert found[block].isnan().all()
    assert torch.equal(found[~block], fake_quantize(x, scheme)[~block])


@given(tensors(), schemes())
def test_codes_stay_in_range(x: torch.Tensor, scheme: Scheme) -> None:
    """Under their own scales, and under those of smaller values, where they saturate."""
    lowest = -(2 ** (scheme.bits - 1)) + 1 if scheme.symmetric else 0
    highest = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
    for scales in (None, fit(x / 3, scheme)):
        codes = encode(x, scheme, scales).codes
        assert codes.min() >= lowest
        assert codes.max() <= highest
        assert torch.equal(codes, codes.round())


@given(tensors(), schemes(), st.integers(1, 5), st.booleans())
def test_one_pass_is_token_by_token(x: torch.Tensor, scheme: Scheme, prompt: int, per_call: bool) -> None:
    """Scales of the prompt, or of each call: a pass that knows its prompt holds what a streaming cache holds."""
    placement = Placement(scales="call" if per_call else "prompt")
    prompt = min(prompt, x.shape[2])
    recipe = Recipe.uniform(1, scheme)
    at_once = Quantizer(recipe, placement, prompt_tokens=prompt)(0, "k", x)
    stream = Quantizer(recipe, placement)
    parts = [stream(0, "k", x[:, :, :prompt])]
    parts += [stream(0, "k", x[:, :, n : n + 1]) for n in range(prompt, x.shape[2])]
    assert torch.equal(at_once, torch.cat(parts, dim=2))
    for sinks in (1, 2, 4):
        kept = replace(placement, sinks=sinks)
        whole = Quantizer(recipe, kept, prompt_tokens=prompt).flush(0, "k", x, x.shape[2])
        stream, held = Quantizer(recipe, kept), x[:, :, :0]
        for first, stop in zip((0, *range(prompt, x.shape[2])), range(prompt, x.shape[2] + 1), strict=True):
            held = stream.flush(0, "k", torch.cat([held, x[:, :, first:stop]], dim=2), stop - first)
        assert torch.equal(whole, held)
        assert torch.equal(whole[:, :, :sinks], x[:, :, :sinks])


@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 5), st.sampled_from(["oldest", "all"]), st.booleans())
def test_what_is_due(prompt: int, residual: int, sinks: int, flush: str, whole: bool) -> None:
    """Tokens are settled in order, none twice (but with flush="all"), and as many wait as may."""
    placement = Placement(residual=residual, sinks=sinks, flush=flush if residual else "oldest")  # type: ignore[arg-type]
    settled, held, exact = -1, 0, 0
    for new in (prompt, *[1] * 30):
        held += new
        first_call = settled < 0
        start, stop = placement.next_span(settled, held, whole)
        assert min(sinks, held) <= start <= stop <= held
        if placement.flush == "oldest":
            assert start == max(settled, min(sinks, held))
        elif start < stop:
            assert (start, stop) == (min(sinks, held), held)
        settled = stop
        exact = held - stop
        if residual == 0 or (first_call and placement.flush == "all"):
            assert exact == 0
        else:
            assert exact < residual if whole or placement.flush == "all" else exact <= max(residual, 0)


@given(
    st.integers(1, 12),
    st.integers(0, 8),
    st.integers(0, 9),
    st.integers(0, 3),
    st.sampled_from(["oldest", "all"]),
    st.sampled_from(["rounded", "exact"]),
    st.booleans(),
)
def test_whether_a_sequence_meets_the_rounding(
    prompt: int, generated: int, residual: int, sinks: int, flush: str, reads: str, whole: bool
) -> None:
    """Told from lengths alone; seen here from what each token reads."""
    flush = flush if residual else "oldest"
    placement = Placement(residual=residual, sinks=sinks, flush=flush, prefill_reads=reads)  # type: ignore[arg-type]
    scheme = Scheme(2, granularity="tensor" if whole else "token", symmetric=True)
    x = torch.randn(1, 1, prompt + generated, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    quantizer, held, met = Quantizer(Recipe.uniform(1, scheme), placement), x[:, :, :0], False
    for stop in range(prompt, prompt + generated + 1):
        first = held.shape[2]
        before = torch.cat([held, x[:, :, first:stop]], dim=2)
        held = quantizer.flush(0, "k", before, stop - first)
        exactly = residual > 0 or (reads == "exact" and stop == prompt)
        met |= not torch.equal(before if exactly else held, x[:, :, :stop])
    assert placement.rounds(prompt, prompt + generated, whole) == met


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"where": "projections"}, "did you mean 'projection'"),
        ({"prefill_reads": "round"}, "did you mean 'rounded'"),
        ({"scales": "calls"}, "did you mean 'call'"),
        ({"flush": None, "residual": 4}, "unknown flush of a placement None"),
        *(
            ({"residual": bad}, "residual must be a whole number, 0 to 2147483648")
            for bad in (float("nan"), 1.5, None, "4", True)
        ),
        ({"sinks": -1}, "sinks must be a whole number, 0 to 2147483648, got -1"),
    ],
)
def test_a_placement_checks_all_that_it_is_made_of(given: dict[str, object], found: str) -> None:
    with pytest.raises(InputError, match=found):
        Placement(**given)  # type: ignore[arg-type]


def test_a_placement_takes_integers_of_numpy() -> None:
    placement = Placement(residual=np.int64(4))  # type: ignore[arg-type]
    assert placement == Placement(residual=4)
    assert type(placement.residual) is int


def test_windows_cannot_go_in_one_pass() -> None:
    assert not Placement(prefill_reads="exact").one_pass
    assert not Placement(residual=4).one_pass
    with pytest.raises(InputError, match="token by token"):
        Quantizer(Recipe.uniform(1, Scheme(4)), Placement(residual=4), prompt_tokens=3)


@given(tensors())
def test_sixteen_bits_are_the_identity(x: torch.Tensor) -> None:
    recipe = Recipe.exact(1)
    for placement in (Placement(), Placement.paper(), Placement(residual=3, sinks=1)):
        quantizer = Quantizer(recipe, placement)
        assert quantizer(0, "k", x) is x
        assert quantizer.flush(0, "v", x, x.shape[2]) is x
