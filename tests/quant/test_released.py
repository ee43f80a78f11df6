"""The grids of the paper's code: against plain arithmetic, and what the clamp of the zero point does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.shared import BatchQuantizer
from tests.builders.released import block, rounded

HEADS, SIZE = 2, 6


def drawn(seed: int, rows: int, tokens: int, offset: float = 0.0) -> torch.Tensor:
    """Keys of which some channels are far from 0 in one direction."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HEADS, tokens, SIZE, generator=rng)
    x[:, 0, :, :2] += offset
    return x


def flat(x: torch.Tensor) -> np.ndarray:
    return x.transpose(1, 2).flatten(2).numpy()


SCHEMES = [
    f"released{bits}-{sign}-{granularity}"
    for bits in (2, 3, 8)
    for sign in ("sym", "asym")
    for granularity in ("tensor", "channel", "token", "group4", "group5")
]


@pytest.mark.parametrize("text", SCHEMES)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5]), st.sampled_from([0.0, 3.0, -50.0]), st.sampled_from([1, 3]))
def test_a_batch_is_rounded_as_in_plain_arithmetic(text: str, seed: int, tokens: int, offset: float, rows: int) -> None:
    """Bit for bit, scales shared by the rows of a batch; group5 leaves two channels to zeros."""
    scheme, x = Scheme.parse(text), drawn(seed, rows, tokens, offset)
    quantizer = BatchQuantizer(Recipe.uniform(1, scheme), Placement.released())
    expected = rounded(flat(x), scheme.bits, scheme.symmetric, scheme.granularity, scheme.group_size or 0)
    np.testing.assert_array_equal(flat(quantizer(0, "k", x)), expected)
    error = ((expected.astype(np.float64) - flat(x)) ** 2).mean()
    assert quantizer.errors[0, "k"] == [pytest.approx(error, rel=1e-5)]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("sign", ["sym", "asym"])
@given(st.integers(0, 10**6), st.sets(st.integers(0, HEADS * SIZE - 1), min_size=1))
def test_some_channels_have_scales_of_their_own(granularity: str, sign: str, seed: int, channels: set[int]) -> None:
    x = drawn(seed, 2, 3, 20.0)
    scheme = Scheme.parse(f"released3-{sign}-{granularity}").only(channels)
    quantizer = BatchQuantizer(Recipe.uniform(1, scheme), Placement.released())
    expected = rounded(flat(x), 3, sign == "sym", granularity, channels=sorted(channels))
    np.testing.assert_array_equal(flat(quantizer(0, "k", x)), expected)
    alone = rounded(flat(x[:1]), 3, sign == "sym", granularity, channels=sorted(channels))
    np.testing.assert_array_equal(flat(fake_quantize(x[:1], scheme)), alone)


def test_channels_of_other_formats_keep_the_scale_of_the_tensor() -> None:
    x = drawn(0, 1, 4, 50.0)
    whole, some = Scheme.parse("int3-sym-tensor"), Scheme.parse("int3-sym-tensor").only([5])
    assert torch.equal(fake_quantize(x, some)[:, 0, :, 5], fake_quantize(x, whole)[:, 0, :, 5])
    own = Scheme.parse("released3-sym-tensor").only([5])
    assert not torch.equal(fake_quantize(x, own)[:, 0, :, 5], fake_quantize(x, whole)[:, 0, :, 5])
    with pytest.raises(InputError, match="scales of their own"):
        Scheme.parse("released3-sym-group64").only([5])


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["tensor", "channel", "token", "group4"]))
def test_symmetric_grids_are_those_of_int_to_the_bit(seed: int, bits: int, granularity: str) -> None:
    x = drawn(seed, 2, 5, 7.0)
    ours, theirs = (Scheme.parse(f"{name}{bits}-sym-{granularity}") for name in ("int", "released"))
    assert torch.equal(fake_quantize(x, ours), fake_quantize(x, theirs))


@given(
    st.floats(1.0, 1e3), st.floats(1e-3, 1.0), st.integers(2, 8), st.booleans(), st.integers(2, 9),
)  # fmt: skip
def test_a_channel_that_does_not_straddle_zero_is_destroyed(
    mean: float, spread: float, bits: int, negative: bool, tokens: int
) -> None:
    """Closed form: every value of a channel in [mean, mean + spread] comes back as the same value, which is no part of it.

    Codes run to ``2**bits - 1`` and the zero point is clamped to 0, so that the largest value there is is the range of the
    channel; of a negative channel it is the negative of that.
    """
    assume(mean > 1.01 * spread)
    values = torch.linspace(mean, mean + spread, tokens)
    x = (-values if negative else values).view(1, 1, tokens, 1)
    found = fake_quantize(x, Scheme.parse(f"released{bits}-asym-channel"))
    end = float(values[-1] - values[0])
    expected = torch.full_like(x, -end if negative else end)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    plain = fake_quantize(x, Scheme.parse(f"int{bits}-asym-channel"))
    assert float((plain - x).abs().max()) <= end / (2**bits - 1) / 2 * 1.001 + 1e-5 * mean


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.integers(2, 6))
def test_a_channel_that_straddles_zero_is_rounded_well(seed: int, bits: int, tokens: int) -> None:
    """Then the clamp does nothing, and rounding the zero point costs half a step more at most."""
    x = torch.randn(1, 1, tokens, 3, generator=torch.Generator().manual_seed(seed))
    x[:, :, 0], x[:, :, 1] = x[:, :, 0].abs(), -x[:, :, 1].abs()
    step = (x.amax(2, keepdim=True) - x.amin(2, keepdim=True)) / (2**bits - 1)
    found = fake_quantize(x, Scheme.parse(f"released{bits}-asym-channel"))
    assert bool(((found - x).abs() <= step * 1.001).all())


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.sampled_from([0.0, 2.0, -40.0]))
def test_without_the_clamp_it_is_the_same_grid_with_0_among_its_levels(seed: int, bits: int, offset: float) -> None:
    """Channel by channel as in plain arithmetic; equal to the clamped one where a channel straddles 0."""
    x = drawn(seed, 1, 5, offset)
    found, clamped = (
        fake_quantize(x, Scheme.parse(f"{name}{bits}-{end}"))
        for name, end in (("unclamped", "channel"), ("released", "asym-channel"))
    )
    for c, values in enumerate(flat(x)[0].T):
        np.testing.assert_array_equal(flat(found)[0][:, c], block(values, bits, False, clamp=False))
        if values.min() < 0 < values.max():
            np.testing.assert_array_equal(flat(found)[0][:, c], flat(clamped)[0][:, c])
    zeros = torch.cat([x, torch.zeros(1, HEADS, 1, SIZE)], 2)
    assert bool((fake_quantize(zeros, Scheme.parse(f"unclamped{bits}-channel"))[:, :, -1] == 0).all())


def test_a_lone_token_by_channel() -> None:
    """Symmetric exact, asymmetric nothing; with a scale for the token, as the released KIVI has it, neither."""
    x = drawn(1, 1, 1, 4.0)

    def of(text: str, **options: str) -> torch.Tensor:
        placement = Placement(where="projection", scales="call", **options)  # type: ignore[arg-type]
        return Quantizer(Recipe.uniform(1, text), placement)(0, "k", x)

    torch.testing.assert_close(of("released4-sym-channel"), x)
    assert float(of("released4-asym-channel").abs().max()) < 1e-5
    by_token = of("released4-asym-channel", alone="token")
    assert torch.equal(by_token, of("released4-asym-token"))


@pytest.mark.parametrize("alone", ["scheme", "token"])
def test_one_pass_over_prompt_and_response_rounds_as_step_by_step(alone: str) -> None:
    placement = Placement(where="projection", scales="call", alone=alone)  # type: ignore[arg-type]
    recipe, x = Recipe.uniform(1, "released4-asym-channel"), drawn(2, 1, 6, 4.0)
    stepwise = Quantizer(recipe, placement)
    parts = [stepwise(0, "k", x[:, :, :3]), *(stepwise(0, "k", x[:, :, t : t + 1]) for t in (3, 4, 5))]
    assert torch.equal(Quantizer(recipe, placement, prompt_tokens=3)(0, "k", x), torch.cat(parts, 2))


def test_placements_of_batches_are_checked_and_named() -> None:
    assert str(Placement.released()) == "projection, scales of the call, shared by batches of 4 padded on the left"
    assert "comes alone" in str(Placement(where="projection", scales="call", alone="token"))
    assert str(Placement.paper()) == "projection, scales of the call"
    for wrong in ({"batch": 4}, {"alone": "token"}, {"batch": 2, "where": "projection"}):
        with pytest.raises(InputError, match=r"Placement\.released"):
            Placement(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 or more"):
        Placement(where="projection", scales="call", batch=0)
