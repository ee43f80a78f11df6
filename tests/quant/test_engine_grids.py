"""Grids of engines against the same in numpy, value by value, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.linalg import hadamard

from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme
from tests.builders.tensors import keys

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
#: Ordinary numbers of float16, so that no scale is below the range of its float.
BLOCKS = hnp.arrays(np.float32, (1, 1, 2, 32), elements=st.floats(-1000, 1000, width=16, allow_subnormal=False))


def rounded(x: np.ndarray, text: str) -> np.ndarray:
    found: np.ndarray = fake_quantize(
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), Scheme.parse(text)
    ).numpy()
    return found


def e2m1(x: np.ndarray, tie: str) -> np.ndarray:
    """Nearest level by distance; of two that are as near the even one, or the larger one."""
    size = np.abs(x)[..., None]
    gap = np.abs(size - E2M1)
    prefer = np.arange(8) % 2 if tie == "even" else -np.arange(8)
    best = np.lexsort((np.broadcast_to(prefer, gap.shape), gap), axis=-1)[..., 0]
    return E2M1[best] * np.sign(x)


def e4m3(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.minimum(x, 448).astype(np.float32)).to(torch.float8_e4m3fn).float().numpy()


@given(BLOCKS)
def test_sglangs_blocks(x: np.ndarray) -> None:
    """The least power of two that keeps all of a block within 6; ties away from zero."""
    blocks = x.reshape(-1, 16).astype(np.float64)
    largest = np.abs(blocks).max(1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(largest / 6, 1e-10)))
    found = rounded(x, "fp4_e2m1").reshape(-1, 16)
    np.testing.assert_array_equal(found, e2m1(blocks / scale, "away") * scale)
    # Nothing saturates: the error is at most half of the widest interval.
    assert (np.abs(found - blocks) <= scale).all()


def test_sglangs_ties_go_away_from_zero() -> None:
    ties = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]
    x = np.array([*ties, *[0.0] * 6]).reshape(1, 1, 1, 16)
    assert rounded(x, "fp4_e2m1").flatten()[:10].tolist() == [6, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6]


@given(BLOCKS)
def test_four_over_six(x: np.ndarray) -> None:
    """Of the two scales the one with the smaller squared error, as each is in NVFP4's own arithmetic; so never worse than NVFP4."""
    blocks = x.reshape(-1, 16)
    largest = np.abs(blocks).max(1, keepdims=True)
    tried = []
    for top in (6, 4):
        scale = e4m3(largest / np.float32(top))
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        tried.append(e2m1((blocks * inverse).astype(np.float64), "even") * scale)
    errors = [np.square(each - blocks).sum(1) for each in tried]
    found = rounded(x, "nvfp4_4over6").reshape(-1, 16)
    clear = np.abs(errors[0] - errors[1]) > 1e-5 * (errors[0] + errors[1])
    wanted = np.where((errors[1] < errors[0])[:, None], tried[1], tried[0])
    np.testing.assert_array_equal(found[clear], wanted[clear])
    plain = np.square(rounded(x, "nvfp4").reshape(-1, 16) - blocks).sum(1)
    assert (np.square(found - blocks).sum(1) <= plain * (1 + 1e-5)).all()


def test_four_over_six_takes_four_where_five_would_be_lost() -> None:
    """Values at 5 sixths of the largest lie between 4 and 6, and are as far from both as can be."""
    x = np.full((1, 1, 1, 16), 5.0)
    x[..., 0] = 6
    assert np.abs(rounded(x, "nvfp4") - x).max() == 1
    assert np.abs(rounded(x, "nvfp4_4over6") - x).max() == 0.5


@pytest.mark.parametrize("bits", range(2, 9))
def test_exllamas_blocks(bits: int) -> None:
    """Rotated in blocks of 32, in equal intervals from one end to the other, each value the middle of its own."""
    x = keys(30)[0].double().numpy()
    matrix = hadamard(32) / np.sqrt(32)
    blocks = x.reshape(-1, 32) @ matrix
    size = np.abs(blocks).max(1, keepdims=True)
    count = 2**bits
    index = np.floor((blocks / size + 1) * count / 2).clip(0, count - 1)
    wanted = ((2 * index + 1) / count - 1) * size.astype(np.float16)
    found = rounded(x[None], f"exllama{bits}+hadamard32")[0].reshape(-1, 32)
    off = np.abs(found - wanted @ matrix).max(1) > 1e-4 * size[:, 0]
    assert off.mean() < 0.02  # a value at the border of two intervals may fall into either
    assert (np.abs(found @ matrix - blocks) <= size / count * 1.01 + size * 1e-3).all()


@given(BLOCKS, st.integers(2, 8))
def test_exllamas_error_is_at_most_half_an_interval(x: np.ndarray, bits: int) -> None:
    blocks = x.reshape(-1, 32)
    size = np.abs(blocks).max(1, keepdims=True)
    wrong = np.abs(rounded(x, f"exllama{bits}").reshape(-1, 32) - blocks)
    assert (wrong <= size * (2.0**-bits + 1e-3) + 1e-7).all()


@given(BLOCKS)
def test_ik_llamas_six_bits(x: np.ndarray) -> None:
    """The entry of largest size becomes -32; then the step of least squared error, weighted by squared values."""
    blocks = x.reshape(-1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    step = extreme / np.float32(-32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    codes = np.floor(blocks * inverse + np.float32(32.5)).clip(0, 63) - 32
    weight = blocks.astype(np.float64) ** 2
    size = (weight * codes**2).sum(1, keepdims=True)
    fitted = np.divide((weight * blocks * codes).sum(1, keepdims=True), size, out=np.zeros_like(size), where=size > 0)
    np.testing.assert_allclose(rounded(x, "q6_0").reshape(-1, 32), codes * fitted, rtol=1e-3, atol=1e-6)


def test_vllms_float8_of_a_head_differs_from_division_in_ties_alone() -> None:
    x = keys(400).bfloat16().float()
    ours, divided = (fake_quantize(x, Scheme.parse(text)) for text in ("vllm_fp8", "fp8_e4m3-token-head"))
    step = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-6)
    assert torch.equal(ours, (x * (1 / step)).to(torch.float8_e4m3fn).float() * step)
    apart = ours != divided
    assert 0 < apart.float().mean() < 0.01
    # Both floats are as near to such a value.
    torch.testing.assert_close((ours - x).abs()[apart], (divided - x).abs()[apart], rtol=1e-3, atol=0)


def test_vllms_float8_of_a_head_has_a_least_scale() -> None:
    x = torch.full((1, 1, 1, 16), 1e-5)
    found = fake_quantize(x, Scheme.parse("vllm_fp8"))
    assert torch.equal(found, torch.full_like(x, 10).to(torch.float8_e4m3fn).float() * torch.tensor(1e-6))
