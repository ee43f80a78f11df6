"""The presets that come with kvgeom, each with engine, version and source; the documentation has a page for each."""

from __future__ import annotations

from collections.abc import Callable

from kvgeom.engines.engine import Preset
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Schemes
from kvgeom.quant.scheme import Scheme


def _both(text: str) -> Callable[[int], Schemes]:
    return lambda bits: (Scheme.parse(text.format(bits=bits)),) * 2


#: The presets that come with kvgeom.
BUILT_IN: list[Preset] = []


def _add(
    name: str,
    engine: str,
    source: str,
    checked: str,
    widths: tuple[int, ...],
    schemes: Callable[[int], Schemes],
    page: str,
    placement: Placement | None = None,
) -> None:
    BUILT_IN.append(Preset(name, engine, source, checked, widths, schemes, placement or Placement(), page))


_add(
    "paper",
    "code released with arXiv:2606.09864, per tensor",
    "https://arxiv.org/abs/2606.09864",
    "an independent straight-line implementation",
    (3, 2, 4, 5, 6, 7, 8),
    _both("int{bits}-sym-tensor"),
    "engine-paper.md",
    Placement.paper(),
)
_add(
    "paper-channel",
    "code released with arXiv:2606.09864, per channel",
    "https://arxiv.org/abs/2606.09864",
    "an independent straight-line implementation",
    (3, 2, 4, 5, 6, 7, 8),
    _both("int{bits}-sym-channel"),
    "engine-paper.md",
    Placement.paper(),
)
_TRANSFORMERS = "https://github.com/huggingface/transformers (src/transformers/cache_utils.py, QuantizedLayer)"
_WAITS = Placement(prefill_reads="exact", residual=128, flush="all")
_add(
    "hf-quanto",
    "transformers 5.23, QuantizedCache('quanto'), optimum-quanto 0.2.7",
    _TRANSFORMERS,
    "the engine itself",
    (4, 2),
    _both("int{bits}-asym-group64"),
    "engine-transformers.md",
    _WAITS,
)
_add(
    "hf-hqq",
    "transformers 5.23, QuantizedCache('hqq', axis 1), hqq 0.2.8",
    _TRANSFORMERS,
    "the engine itself",
    (4, 2, 8),  # the engine also takes 3, and fails at every length
    _both("hqq{bits}-group64"),
    "engine-transformers.md",
    _WAITS,
)
_add(
    "hf-fp8",
    "transformers 5.23, QuantizedCache('fp8')",
    _TRANSFORMERS,
    "the engine itself",
    (8,),
    _both("fp8_e4m3-tensor"),
    "engine-transformers.md",
    Placement(prefill_reads="exact"),
)
_add(
    "kivi",
    "KIVI (arXiv:2402.02750), released code, group 32, residual 128",
    "https://github.com/jy-yuan/KIVI (models/llama_kivi.py)",
    "a straight-line implementation of its attention; its kernels need a GPU",
    (2, 4),
    lambda bits: (
        Scheme.parse(f"int{bits}-asym-channel-group32/f16"),
        Scheme.parse(f"int{bits}-asym-group32/f16"),
    ),
    "engine-kivi.md",
    Placement(prefill_reads="exact", residual=128),
)
_VLLM = "https://github.com/vllm-project/vllm"
for _kind in ("e4m3", "e5m2"):
    _add(
        f"vllm-fp8-{_kind}",
        f"vLLM 0.28, kv_cache_dtype='fp8_{_kind}', scales 1.0",
        f"{_VLLM} (csrc/cache_kernels.cu, docs/features/quantization/quantized_kvcache.md)",
        "the casts of torch and ml_dtypes",
        (8,),
        _both(f"fp8_{_kind}"),
        "engine-vllm.md",
    )
_add(
    "vllm-int8-per-token-head",
    "vLLM 0.28, kv_cache_dtype='int8_per_token_head'",
    f"{_VLLM} (vllm/v1/attention/ops/triton_reshape_and_cache_flash.py)",
    "its kernel in Triton's interpreter, bit for bit",
    (8,),
    _both("vllm8-token-head"),
    "engine-vllm.md",
)
_add(
    "vllm-int4-per-token-head",
    "vLLM 0.28, kv_cache_dtype='int4_per_token_head'",
    f"{_VLLM} (vllm/v1/attention/ops/int4_per_token_head.py)",
    "its kernel in Triton's interpreter, bit for bit",
    (4,),
    _both("vllm4-token-head+rht"),
    "engine-vllm.md",
)


def _rotated_blocks(kind: str) -> Callable[[int], Schemes]:
    return lambda _: (Scheme.parse(f"{kind}+hadamard"), Scheme.parse(f"{kind}+hadamard64"))


for _kind, _bits in (("q8_0", 8), ("q4_0", 4)):
    _add(
        f"llamacpp-{_kind}",
        f"llama.cpp (July 2026, in llama-cpp-python 0.3.36), type_k = type_v = {_kind}",
        "https://github.com/ggml-org/llama.cpp (src/llama-kv-cache.cpp, ggml/src/ggml-quants.c)",
        "its blocks bit for bit (gguf package); the engine itself in greedy tokens and logits",
        (_bits,),
        _rotated_blocks(_kind),
        "engine-llamacpp.md",
    )
for _bits in (4, 8):
    _add(
        f"lmdeploy-int{_bits}",
        f"LMDeploy (TurboMind, source of commit 035dd4e), quant_policy={_bits}",
        "https://github.com/InternLM/lmdeploy (src/turbomind/kernels/attention/kv_cache_utils_v2.cu, quantization.h)",
        "its source alone",
        (_bits,),
        _both("int{bits}-asym-token-head/f16"),
        "engine-lmdeploy.md",
    )
_add(
    "mlx-4bit-g64",
    "MLX-LM 0.32.2 (MLX 0.32.4), kv_group_size=64, quantized_kv_start=0",
    "https://github.com/ml-explore/mlx-lm (mlx_lm/models/cache.py), mx.quantize",
    "mx.quantize bit for bit; MLX-LM itself in greedy tokens and logits",
    (4, 2, 3, 6, 8),
    _both("mlx{bits}-group64"),
    "engine-mlx.md",
    Placement(prefill_reads="last"),
)
_add(
    "rotated",
    "no single engine: a Hadamard rotation of each head, then integers per token and head (as QuaRot)",
    "https://arxiv.org/abs/2404.00456",
    "properties of the rotation",
    (4, 2, 3, 5, 6, 7, 8),
    _both("int{bits}-asym-token-head/f16+hadamard"),
    "engine-rotated.md",
)
