"""TurboQuant by its theorems, and what engines make of it by what they say they do, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from kvgeom.quant.codebooks import normal_levels, sphere_levels
from kvgeom.quant.fake_quantize import encode, fake_quantize
from kvgeom.quant.formats.vllm_turboquant import vllm_levels
from kvgeom.quant.packing import Packed
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import frame
from tests.builders.tensors import keys

SPIKE = torch.zeros(1, 1, 1, 64)
SPIKE[..., 5] = 10.0


def vectors(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors, none of them random: a few large channels, and small ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, count, channels, generator=generator) * torch.rand(channels, generator=generator).mul(4).exp()
    return x / x.norm(dim=-1, keepdim=True)


def rounded(x: torch.Tensor, text: str) -> torch.Tensor:
    return fake_quantize(x, Scheme.parse(text))


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.117), (3, 0.03), (4, 0.009)])
def test_distortion_of_unit_vectors(bits: int, distortion: float) -> None:
    """Theorem 1 of arXiv:2504.19874, for vectors that are not random; the rotation is."""
    x = vectors(4000, 128)
    error = (rounded(x, f"turboquant{bits}+rotation") - x).square().sum(-1).mean()
    assert float(error) == pytest.approx(distortion, rel=0.17)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.56), (3, 0.18), (4, 0.047)])
def test_inner_products_under_residual_signs(bits: int, distortion: float) -> None:
    """Theorem 2: the mean squared error of inner products with unit vectors, times the number of channels."""
    channels = 128
    x, y = vectors(4000, channels), torch.randn(1, 1, 4000, channels, generator=torch.Generator().manual_seed(1))
    y = torch.nn.functional.normalize(y, dim=-1)
    wrong = ((rounded(x, f"turboquant_prod{bits}+rotation") - x) * y).sum(-1).flatten()
    assert float(wrong.square().mean() * channels) == pytest.approx(distortion, rel=0.15)


def test_signs_take_the_bias_away_that_the_codebook_has() -> None:
    """The expected inner product of a vector with what is stored of it: 1 with signs, less without."""
    x = vectors(4000, 128)
    along = {
        name: float((rounded(x, f"{name}2+rotation") * x).sum(-1).mean()) for name in ("turboquant", "turboquant_prod")
    }
    assert along["turboquant"] == pytest.approx(1 - 0.117, abs=0.01)
    assert along["turboquant_prod"] == pytest.approx(1, abs=0.01)


def test_signs_make_the_error_larger() -> None:
    """What they cost: at the same width the vector itself is further away."""
    x = vectors(500, 128)
    plain, signs = ((rounded(x, f"{name}3+rotation") - x).norm() for name in ("turboquant", "turboquant_prod"))
    assert signs > 2 * plain


def test_residual_signs_written_out() -> None:
    """Algorithm 2, with the projection of the format, in double precision."""
    from kvgeom.quant.formats.turboquant import _projection

    x = vectors(50, 64)[0, 0].double().numpy() * 3
    matrix = _projection(torch.zeros(64)).numpy()
    assert abs(matrix.mean()) < 0.05
    assert matrix.std() == pytest.approx(1, abs=0.05)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    levels = sphere_levels(2, 64) / 8
    near = levels[np.abs((x / norm)[..., None] - levels).argmin(-1)]
    left = x / norm - near
    signs = np.where(left @ matrix.T >= 0, 1.0, -1.0)
    length = np.linalg.norm(left, axis=1, keepdims=True)
    wanted = norm * (near + np.sqrt(np.pi / 2) / 64 * length * signs @ matrix)
    found = rounded(torch.from_numpy(x).float()[None, None], "turboquant_prod3")[0, 0].double().numpy()
    np.testing.assert_allclose(found, wanted, atol=3e-3)  # norms are float16


@pytest.mark.parametrize("bits", [3, 4])
def test_vllms_keys_written_out(bits: int) -> None:
    """Rotate the unit vector, take the nearest level, make it a unit vector again, give it its norm, rotate back."""
    x = keys(40)[0].double().numpy()
    matrix = hadamard(64) / 8
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    levels = vllm_levels(bits) / 8
    unit = levels[np.abs((x / norm @ matrix)[..., None] - levels).argmin(-1)]
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    found = rounded(torch.from_numpy(x).float()[None], f"vllm_turboquant{bits}+hadamard")[0]
    np.testing.assert_allclose(found.numpy(), (unit * norm.astype(np.float16)) @ matrix, atol=1e-4)


def test_norm_correction_keeps_norms() -> None:
    x = keys(40)
    size = rounded(x, "vllm_turboquant3+hadamard").norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=0)
    shrunk = rounded(x, "turboquant3+rotation").norm(dim=-1) / x.norm(dim=-1)
    assert float(shrunk.mean()) < 0.995


@pytest.mark.parametrize("bits", [3, 4])
def test_vllms_values_written_out(bits: int) -> None:
    x = keys(40)[0].numpy()
    levels = np.float32(2**bits - 1)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = (high - low) / levels
    codes = np.floor((x - low) / step + np.float32(0.5)).clip(0, levels)
    wanted = codes * step.astype(np.float16).astype(np.float32) + low.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rounded(torch.from_numpy(x)[None], f"vllm_uniform{bits}")[0].numpy(), wanted)


def test_lmdeploys_keys_and_values_written_out() -> None:
    x = keys(40)[0].double().numpy()
    matrix = hadamard(64) / 8
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    three, two = normal_levels(3) / 8, normal_levels(2) / 8
    turned = x / norm @ matrix
    near = three[np.abs(turned[..., None] - three).argmin(-1)]
    left = turned - near
    size = np.linalg.norm(left, axis=-1, keepdims=True) / 8
    wanted = norm * (near + np.where(left >= 0, size, -size)) @ matrix
    given = torch.from_numpy(x).float()[None]
    np.testing.assert_allclose(rounded(given, "lmdeploy_qjl+hadamard")[0].numpy(), wanted, atol=2e-2)
    wanted = norm * two[np.abs(turned[..., None] - two).argmin(-1)] @ matrix
    np.testing.assert_allclose(rounded(given, "lmdeploy_lloyd+hadamard")[0].numpy(), wanted, atol=2e-2)


def test_a_spike_is_a_random_direction_only_after_a_random_rotation() -> None:
    """A Hadamard matrix gives all coordinates of a lone outlier one size, for which no codebook has a level."""
    random, fixed = (
        torch.stack([(rounded(SPIKE.roll(n, -1), text) - SPIKE.roll(n, -1)).square().sum() for n in range(64)]).mean()
        / 100
        for text in ("turboquant3+rotation", "turboquant3+hadamard")
    )
    assert float(random) == pytest.approx(0.034, rel=0.15)
    assert float(fixed) > 1.5 * float(random)


@given(st.integers(1, 40), st.integers(3, 96), st.integers(0, 2**31))
def test_the_rotation_is_orthogonal_and_undone(tokens: int, channels: int, seed: int) -> None:
    x = torch.randn(2, 1, tokens, channels, generator=torch.Generator().manual_seed(seed))
    turn = frame("rotation", None, x)
    y = turn.enter(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(turn.leave(y), x, rtol=1e-5, atol=1e-5)
    # Whatever comes with it, a token is turned alike.
    assert torch.equal(turn.enter(x[1:, :, -1:]), y[1:, :, -1:])


def test_rotations_of_a_direction_have_the_density_of_the_sphere() -> None:
    """The first axis, turned: mean, variance and fourth moment of its coordinates."""
    turned = frame("rotation", None, torch.zeros(1, 1, 1, 512)).enter(torch.eye(512)[None, None])
    scaled = (turned * 512**0.5).flatten().double()
    assert float(scaled.mean().abs()) < 0.01
    assert float(scaled.square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(scaled.pow(4).mean()) == pytest.approx(3 * 512 / 514, rel=0.02)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("turboquant3", 64 * 3 // 8 + 2),
        ("turboquant_prod3", 64 * 3 // 8 + 4),
        ("vllm_turboquant4", 64 // 2 + 2),
        ("vllm_uniform4", 64 // 2 + 4),
        ("lmdeploy_qjl", 64 // 2 + 4),
        ("lmdeploy_lloyd", 64 // 4 + 2),
        ("vllm_fp8", 64 + 4),
        ("nvfp4_4over6", 64 // 2 + 4),
        ("fp4_e2m1", 64 // 2 + 4),
        ("exllama5", 64 * 5 // 8 + 4),
        ("q6_0", 64 * 6 // 8 + 4),
    ],
)
def test_bytes_of_a_head_of_a_token(text: str, size: int) -> None:
    """By what the engines say that a slot takes."""
    scheme, x = Scheme.parse(text), keys(3)
    packed = Packed.of(encode(x, scheme), scheme, frame("none", None, x), x, x.dtype)
    assert packed.nbytes == 2 * 3 * size
    assert torch.equal(packed.unpack(), fake_quantize(x, scheme))
