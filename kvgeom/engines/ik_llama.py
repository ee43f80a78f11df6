"""ik_llama.cpp: llama.cpp's blocks and ``q6_0``, rotated only where it is asked for (``-khad``, ``-vhad``)."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine

_TYPES = (("q8_0", 8), ("q6_0", 6), ("q4_0", 4))

IK_LLAMA = register_engine(
    Engine(
        name="ik_llama",
        title="ik_llama.cpp",
        version="(source of commit 8337e4c)",
        source=(
            "https://github.com/ikawrakow/ik_llama.cpp (src/llama-build-context.cpp, src/llama-model.h, "
            "ggml/src/ggml-quants.c, docs/parameters.md)"
        ),
        checked="q8_0 and q4_0: the gguf package; q6_0: its own quantizer, compiled; rotation: scipy's matrix",
        page="engine-ik_llama.md",
        presets=(
            *(Preset(f"ik_llama-{kind}", f"-ctk {kind} -ctv {kind}", (bits,), both(kind)) for kind, bits in _TYPES),
            *(
                Preset(
                    f"ik_llama-{kind}-had", f"-ctk {kind} -ctv {kind} -khad -vhad", (bits,), both(f"{kind}+hadamard")
                )
                for kind, bits in _TYPES
            ),
        ),
    )
)
