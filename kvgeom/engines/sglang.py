"""SGLang: 4-bit floats in blocks of 16 channels under a power of two."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine

SGLANG = register_engine(
    Engine(
        name="sglang",
        title="SGLang",
        version="0.5.23",
        source=(
            "https://github.com/sgl-project/sglang (python/sglang/srt/layers/quantization/kvfp4_tensor.py and "
            "fp4_kv_cache_quant_method.py, docs/advanced_features/quantized_kv_cache.md)"
        ),
        checked="its own quantizer, run on a CPU",
        page="engine-sglang.md",
        presets=(
            Preset(
                "sglang-fp4-e2m1",
                "--kv-cache-dtype fp4_mx_block16, which was called fp4_e2m1 before",
                (4,),
                both("fp4_e2m1"),
            ),
        ),
    )
)
