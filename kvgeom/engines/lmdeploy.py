"""LMDeploy's TurboMind: integers with one scale and offset for a head of a token."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine

LMDEPLOY = register_engine(
    Engine(
        name="lmdeploy",
        title="LMDeploy",
        version="(TurboMind, source of commit 035dd4e)",
        source=(
            "https://github.com/InternLM/lmdeploy (src/turbomind/kernels/attention/kv_cache_utils_v2.cu, quantization.h)"
        ),
        checked="its source alone",
        page="engine-lmdeploy.md",
        presets=tuple(
            Preset(f"lmdeploy-int{bits}", f"quant_policy={bits}", (bits,), both("int{bits}-asym-token-head/f16"))
            for bits in (4, 8)
        ),
    )
)
