"""LMDeploy: integers of its TurboMind, 8-bit floats and TurboQuant of its PyTorch engine."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine
from kvgeom.quant.scheme import Scheme

LMDEPLOY = register_engine(
    Engine(
        name="lmdeploy",
        title="LMDeploy",
        version="(source of commits 035dd4e, TurboMind, and 1263d5c, PyTorch)",
        source=(
            "https://github.com/InternLM/lmdeploy (src/turbomind/kernels/attention/kv_cache_utils_v2.cu, quantization.h; "
            "lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py, turbo_quant.py)"
        ),
        checked="integers: its source alone; TurboQuant: the functions of its own tests, run on a CPU; FP8: the casts of torch",
        page="engine-lmdeploy.md",
        presets=(
            *(
                Preset(f"lmdeploy-int{bits}", f"quant_policy={bits}", (bits,), both("int{bits}-asym-token-head/f16"))
                for bits in (4, 8)
            ),
            *(
                Preset(f"lmdeploy-fp8-{kind}", f"quant_policy={policy}, scales 1.0", (8,), both(f"fp8_{kind}"))
                for kind, policy in (("e4m3", 16), ("e5m2", 17))
            ),
            Preset(
                "lmdeploy-turboquant",
                "quant_policy=42",
                (4,),
                lambda _: (Scheme.parse("lmdeploy_qjl+hadamard"), Scheme.parse("lmdeploy_lloyd+hadamard")),
            ),
        ),
    )
)
