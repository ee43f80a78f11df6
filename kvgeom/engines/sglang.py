"""SGLang: 4-bit floats in blocks of 16 channels under a power of two, and 8-bit floats."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine

SGLANG = register_engine(
    Engine(
        name="sglang",
        title="SGLang",
        version="(source of commit 0dae407)",
        source=(
            "https://github.com/sgl-project/sglang (python/sglang/srt/layers/quantization/kvfp4_tensor.py, "
            "docs/advanced_features/quantized_kv_cache.md)"
        ),
        checked="FP4: its own quantizer, run on a CPU; FP8: the casts of torch",
        page="engine-sglang.md",
        presets=(
            Preset("sglang-fp4-e2m1", "--kv-cache-dtype fp4_e2m1", (4,), both("fp4_e2m1")),
            *(
                Preset(f"sglang-fp8-{kind}", f"--kv-cache-dtype fp8_{kind}, scales 1.0", (8,), both(f"fp8_{kind}"))
                for kind in ("e4m3", "e5m2")
            ),
        ),
    )
)
