"""A rotated cache, as QuaRot has it: each head is rotated, then rounded with one scale and offset for a head of a token."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine

QUAROT = register_engine(
    Engine(
        name="quarot",
        title="QuaRot-like",
        version="(arXiv:2404.00456)",
        source="https://arxiv.org/abs/2404.00456",
        checked="properties of the rotation",
        page="engine-rotated.md",
        presets=(
            Preset(
                "rotated",
                "each head is rotated, then integers per token and head",
                (4, 2, 3, 5, 6, 7, 8),
                both("int{bits}-asym-token-head/f16+hadamard"),
            ),
        ),
    )
)
