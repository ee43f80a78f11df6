"""Formats of engines against code that we did not write: the gguf package and torch's casts; and their laws."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvgeom.errors import InputError
from kvgeom.quant.fake_quantize import encode, fake_quantize
from kvgeom.quant.formats.base import formats
from kvgeom.quant.packing import Packed, pack_bits, unpack_bits
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import frame
from tests.builders.tensors import keys

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
BLOCK_FORMATS = [known.name for known in formats() if known.block_size is not None and len(known.widths) == 1]
GGUF = {
    name: getattr(gguf.GGMLQuantizationType, name.upper())
    for name in BLOCK_FORMATS
    if hasattr(gguf.GGMLQuantizationType, name.upper())
}
ALL = [
    *BLOCK_FORMATS,
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3-token-head",
    "fp8_e5m2-channel",
    "fp8_e4m3_rz",
    "fp8_e5m2_rz",
    "mlx4-group64",
    "mlx3-group32",
    "hqq4-group64",
    "hqq2-group32",
    "vllm8-token-head",
    "vllm4-token-head",
    "vllm_fp8",
    "vllm_turboquant3",
    "vllm_uniform3",
    "lmdeploy_qjl",
    "lmdeploy_lloyd",
    "exllama4",
    "exllama3",
    "turboquant3",
    "turboquant_prod4",
    "released4-asym-channel",
    "released3-sym-group48",
    "int4-asym-token-head/f16",
    "int2-asym-channel-group32/bf16",
    "int5-sym-channel-group7",
]


#: Formats without a level for the values of a constant block.
CODEBOOKS = ("turboquant3", "turboquant_prod4", "lmdeploy_qjl", "lmdeploy_lloyd")
MIDDLES = ("exllama4", "exllama3")


def flat(x: torch.Tensor) -> np.ndarray:
    return x.transpose(1, 2).flatten().numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in GGUF if name not in ("iq4_nl", "nvfp4")])
def test_blocks_are_those_of_the_gguf_package(name: str, seed: int) -> None:
    x = keys(seed=seed)
    theirs = dequantize(quantize(flat(x), GGUF[name]), GGUF[name])
    np.testing.assert_array_equal(flat(fake_quantize(x, Scheme.parse(name))), theirs)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_codes_and_scales_are_those_of_the_gguf_package(name: str) -> None:
    """Bit for bit in memory, once the bytes are put in GGML's order: scale, offset, low nibbles, high nibbles."""
    x = keys()[:, :1]
    packed = encode(x, Scheme.parse(name))
    form = Packed.of(packed, Scheme.parse(name), frame(Scheme.parse(name).transform, None, x), x, x.dtype)
    theirs = quantize(flat(x), GGUF[name]).reshape(-1, gguf.GGML_QUANT_SIZES[GGUF[name]][1])
    scales = [
        part.contiguous().view(torch.uint8).reshape(len(theirs), 2)
        for part in (form.step, form.offset)
        if part is not None
    ]
    codes = unpack_bits(form.codes, form.scheme.bits, form.row).reshape(len(theirs), 32)
    if name == "q8_0":
        body = (codes.int() - 128).to(torch.int8).view(torch.uint8)
    else:
        body = codes[:, :16] | (codes[:, 16:] << 4)
    np.testing.assert_array_equal(torch.cat([*scales, body], dim=1).numpy(), theirs)


def test_iq4_nl_levels_and_step() -> None:
    """The gguf package reads but does not write it: its levels are ours, and our step is the weighted least squares one."""
    x = keys()
    scheme = Scheme.parse("iq4_nl")
    encoded = encode(x, scheme)
    levels = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.float64)
    blocks = x.reshape(-1, 32).double().numpy()
    codes = encoded.codes.reshape(-1, 32).long().numpy()
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    first = blocks * (levels[0] / extreme)
    nearest = np.abs(first[..., None] - levels).argmin(-1)
    assert (np.abs(levels[codes] - first) <= np.abs(levels[nearest] - first) + 1e-4).all()
    weight = blocks**2
    step = (weight * levels[codes] * blocks).sum(1) / (weight * levels[codes] ** 2).sum(1)
    np.testing.assert_allclose(encoded.scales.step.flatten().numpy(), step, rtol=1e-3)
    np.testing.assert_allclose(flat(fake_quantize(x, scheme)).reshape(-1), flat(fake_quantize(x, scheme)))
    raw = np.concatenate(
        [
            encoded.scales.step.half().view(torch.uint8).reshape(-1, 2).numpy(),
            (codes[:, :16] | (codes[:, 16:] << 4)).astype(np.uint8),
        ],
        axis=1,
    )
    theirs = dequantize(raw.reshape(1, -1), GGUF["iq4_nl"])
    np.testing.assert_array_equal(fake_quantize(x, scheme).reshape(-1).numpy(), theirs.reshape(-1))


def test_nvfp4_is_nearest_under_the_scale_of_the_gguf_package() -> None:
    """The gguf package has no quantizer of it, but its scale and its levels."""
    x = keys(40)
    blocks = x.reshape(-1, 16).numpy()
    form = gguf.quants.NVFP4
    step = form.ue4m3_to_fp32(form.fp32_to_ue4m3(np.abs(blocks).max(1, keepdims=True) / np.float32(6)))[..., None]
    reachable = step * np.array(form.kvalues, dtype=np.float32)
    nearest = np.take_along_axis(reachable[:, 0], np.abs(reachable - blocks[..., None]).argmin(-1), 1)
    np.testing.assert_array_equal(fake_quantize(x, Scheme.parse("nvfp4")).reshape(-1, 16).numpy(), nearest)


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_stays_and_everything_between_goes_to_the_nearest(name: str) -> None:
    """All 256 codes are fixed points, and values between two of them go to the nearer one, up to the largest and beyond."""
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8[name]).float()
    finite = every[every.isfinite()].double().unique()
    scheme = Scheme.parse(name)
    assert torch.equal(fake_quantize(finite.float().reshape(1, 1, 1, -1), scheme).flatten(), finite.float())
    x = (
        torch.empty(1, 1, 1, 20_000).uniform_(-1.3, 1.3, generator=torch.Generator().manual_seed(0))
        * finite.max().float()
    )
    x = torch.cat([x, x * 1e-3, x * 1e-6], dim=-1)
    reached = (fake_quantize(x, scheme).double() - x.double()).abs().flatten()
    possible = (x.double().flatten()[:, None] - finite).abs().amin(1)
    torch.testing.assert_close(reached, possible, rtol=0, atol=0)


@pytest.mark.parametrize("name", FLOAT8)
@given(hnp.arrays(np.float32, (1, 2, 3, 4), elements=st.floats(-400, 400, width=32)))
def test_unscaled_float8_is_torchs_cast(name: str, x: np.ndarray) -> None:
    ours = fake_quantize(torch.from_numpy(x), Scheme.parse(name))
    assert torch.equal(ours, torch.from_numpy(x).to(FLOAT8[name]).float())


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_saturates_and_keeps_nan_to_itself(name: str) -> None:
    x = torch.tensor([1e9, -torch.inf, torch.nan, 1.0]).reshape(1, 1, 1, 4)
    largest = torch.finfo(FLOAT8[name]).max
    found = fake_quantize(x, Scheme.parse(name)).flatten()
    assert found[[0, 1, 3]].tolist() == [largest, -largest, 1.0]
    assert found[2].isnan()


def test_mxfp4_ties_go_to_even_and_large_values_saturate() -> None:
    """By the OCP specification; the largest entry 7 sets a scale of 1, under which it saturates at 6."""
    ties = [7.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0]
    x = torch.tensor([*ties, *[0.0] * (32 - len(ties))]).reshape(1, 1, 1, 32)
    found = fake_quantize(x, Scheme.parse("mxfp4")).flatten()[: len(ties)].tolist()
    assert found == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -4.0]


def test_vllms_ties_go_away_from_zero_and_its_four_bits_saturate_blocks_of_one_sign() -> None:
    x = torch.tensor([127.0, 1.5, -2.5, 0.49]).reshape(1, 1, 1, 4)
    assert fake_quantize(x, Scheme.parse("vllm8-token-head")).flatten().tolist() == [127.0, 2.0, -3.0, 0.0]
    # From 10 to 25 a step of 1 would do, but the zero point cannot be negative: everything from 15 on is 15.
    x = torch.arange(10.0, 26.0).reshape(1, 1, 1, 16)
    found = fake_quantize(x, Scheme.parse("vllm4-token-head")).flatten()
    torch.testing.assert_close(found, torch.arange(10.0, 26.0).clamp(max=15), rtol=1e-5, atol=0)


def test_mlx_has_zero_and_the_larger_end_among_its_levels() -> None:
    x = torch.cat([torch.linspace(-1.0, 3.0, 63), torch.zeros(1)]).reshape(1, 1, 1, 64)
    found = fake_quantize(x, Scheme.parse("mlx4-group64")).flatten()
    assert found[-1] == 0
    assert found[62] == 3.0


def test_hqq_lowers_the_robust_error_of_plain_rounding() -> None:
    """What its solver is for: the l_0.7 error falls, on values with outliers, and its grid is as fine."""
    x = keys(64, offset=8.0)
    plain = (fake_quantize(x, Scheme.parse("int2-asym-group64")) - x).abs().pow(0.7).mean()
    solved = (fake_quantize(x, Scheme.parse("hqq2-group64")) - x).abs().pow(0.7).mean()
    assert solved < plain


@pytest.mark.parametrize("text", ALL)
def test_every_format_keeps_its_promises(text: str) -> None:
    """Sequences apart, zeros and constants bounded, range kept, NaN and inf confined to their sequence.

    LMDeploy's norms are never zero.
    """
    scheme = Scheme.parse(text)
    x = torch.cat([keys(seed=1), keys(seed=2)])
    together = fake_quantize(x, scheme)
    for row in range(2):
        assert torch.equal(together[row : row + 1], fake_quantize(x[row : row + 1], scheme))
    nothing = torch.zeros_like(x)
    torch.testing.assert_close(
        fake_quantize(nothing, scheme), nothing, rtol=0, atol=1e-4 if text.startswith("lmdeploy") else 0
    )
    # q4_0, q5_0 and iq4_nl may overshoot where the opposite end saturates, never by more than a step; a codebook may where a
    # direction is not a random one, and signs of a projection add what they do not know.
    assert together.abs().max() <= x.abs().max() * (1.5 if text in CODEBOOKS else 1.15)
    assert torch.isfinite(fake_quantize(x[:, :, :1], scheme)).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[0, 1, 2, 5] = bad
        found = fake_quantize(spoilt, scheme)
        assert torch.equal(found[1], together[1])


@pytest.mark.parametrize(
    "text", [text for text in ALL if text not in ("vllm4-token-head", "released4-asym-channel", *CODEBOOKS, *MIDDLES)]
)
@pytest.mark.parametrize("value", [-37.5, -1.0, 0.0, 0.01, 3.3])
def test_constants_stay_what_they_are(text: str, value: float) -> None:
    """As far as the floats of a format go: a step or offset of 16 bits, a value of 8, or E2M1, which may saturate under its scale.

    vLLM's 4 bits and the asymmetric grid of the paper's code saturate blocks of one sign, which tests of their own show. A codebook has
    a level for a random direction, not for this one, and ExLlamaV3's outer levels lie half a step within the range.
    """
    x = torch.full((1, 2, 3, 64), value)
    floats = ("mxfp4", "nvfp4", "nvfp4_4over6", "fp4_e2m1")
    precise = 0.25 if text in floats or "_rz" in text else 0.125 if text.startswith("fp8") else 0.004
    torch.testing.assert_close(fake_quantize(x, Scheme.parse(text)), x, rtol=precise, atol=1e-6)


@pytest.mark.parametrize("text", [text for text in ALL if not text.startswith(("hqq", "lmdeploy"))])
@pytest.mark.parametrize("factor", [0.25, 2.0, 16.0])
def test_powers_of_two_pass_through_every_format(text: str, factor: float) -> None:
    """What is held is a float of its own or a scale, so that only the exponent changes. HQQ's solver knows absolute sizes, and
    so does what LMDeploy adds to squared norms."""
    x, scheme = keys(), Scheme.parse(text)
    if text.removesuffix("_rz") in FLOAT8:
        x = x.sign() * x.abs().clamp(0.0625, 16)  # as far as the range of the float goes
    assert torch.equal(fake_quantize(factor * x, scheme), factor * fake_quantize(x, scheme))


@pytest.mark.parametrize(
    "text",
    [
        text
        for text in ALL
        if not text.startswith(("vllm", "hqq", "iq4", "mlx", "released4")) and text not in (*CODEBOOKS, *MIDDLES)
    ],
)
def test_rounding_again_changes_next_to_nothing(text: str) -> None:
    """Values on a grid stay there; only the 16-bit scale that the second pass finds may differ in its last digit.

    Not so for the grids left out: where a block saturates, or moves its zero, its ends are not what they were.
    """
    once = fake_quantize(keys(), Scheme.parse(text))
    torch.testing.assert_close(fake_quantize(once, Scheme.parse(text)), once, rtol=2e-2, atol=2e-2)


@given(
    st.integers(1, 8),
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 20))),
)
def test_packed_bits_come_back(bits: int, codes: np.ndarray) -> None:
    codes &= (1 << bits) - 1
    packed = pack_bits(torch.from_numpy(codes), bits)
    assert packed.shape[-1] == (codes.shape[-1] if bits == 8 else -(-codes.shape[-1] // 8) * bits)
    assert torch.equal(unpack_bits(packed, bits, codes.shape[-1]), torch.from_numpy(codes))


@pytest.mark.parametrize("text", ALL)
def test_packed_tensors_hold_the_same_values(text: str) -> None:
    scheme, x = Scheme.parse(text), keys()
    packed = Packed.of(encode(x, scheme), scheme, frame(scheme.transform, None, x), x, x.dtype)
    assert torch.equal(packed.unpack(), fake_quantize(x, scheme))
    assert int(unpack_bits(packed.codes, scheme.bits, packed.row).max()) < 1 << scheme.bits


def test_engine_blocks_must_divide_a_head() -> None:
    with pytest.raises(InputError, match="head_dim=48"):
        fake_quantize(torch.zeros(1, 2, 3, 48), Scheme.parse("q4_0"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheme(4, True, "group", 32, format="q8_0"),
        lambda: Scheme(8, True, "none"),
        lambda: Scheme(8, False, "none", format="fp8_e4m3"),
        lambda: Scheme(5, False, "token-head", format="vllm"),
        lambda: Scheme(7, False, "group", 64, format="mlx"),
        lambda: Scheme(4, format="gptq"),
        lambda: Scheme(4, transform="whiten"),  # type: ignore[arg-type]
        lambda: Scheme.parse("hqq4-token"),
        lambda: Scheme.parse("fp8_e4m3-sym-token"),
        lambda: Scheme.parse("mlx4-asym-group64"),
        lambda: Scheme.parse("int4-asym-token/f32x"),
        lambda: Scheme.parse("int4-asym-none"),
    ],
)
def test_combinations_that_are_none(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("text", [*ALL, "q4_0+hadamard@0-2,4", "int3-sym-tensor/f16+center", "vllm4-token-head+rht"])
def test_spelling_of_formats(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("name", FLOAT8)
def test_toward_zero_is_the_largest_float_that_is_no_larger(name: str) -> None:
    """Of every bfloat16 against a search among all finite codes."""
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8[name]).double()
    grid = np.unique(codes[codes.isfinite() & (codes >= 0)].numpy())
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()]
    found = fake_quantize(x[None, None, :, None].float().expand(1, 1, -1, 2), Scheme.parse(f"{name}_rz"))[0, 0, :, 0]
    wanted = grid[np.searchsorted(grid, x.double().abs().numpy(), side="right") - 1] * np.sign(x.double().numpy())
    np.testing.assert_array_equal(found.double().numpy(), wanted)
